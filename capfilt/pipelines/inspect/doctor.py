"""doctor: whether this machine is fit for work, a line for each thing that has cost somebody a day.

Nothing is mended and no secret is read: of credentials it is said that they are there, and where.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

import capfilt
from capfilt.cluster.session import connect
from capfilt.errors import ClusterError
from capfilt.pipelines.inspect import machine
from capfilt.pipelines.inspect.machine import GB
from capfilt.runs.progress import Progress

State = Literal["ok", "warning", "broken"]
SHOWN = ("torch", "ray", "transformers", "pyarrow", "webdataset", "pydantic")
"""Packages whose versions are asked for in every report of a fault."""
FILES, PROCESSES = 4096, 4096
"""Open files and processes below which large runs have failed: Ray's workers and stores' connections take them."""
INODES = 100_000
"""A run keeps six files or more for each shard and round."""
_STORES = {
    "s3": ("s3fs", ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"), (".aws/credentials", ".aws/config")),
    "gs": ("gcsfs", ("GOOGLE_APPLICATION_CREDENTIALS",), (".config/gcloud/application_default_credentials.json",)),
    "az": ("adlfs", ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_CLIENT_ID"), ()),
    "Hugging Face hub": ("huggingface_hub", ("HF_TOKEN",), (".cache/huggingface/token",)),
}
"""By the name of a store: the package that reads it, and the variables and files in the home folder with credentials."""


@dataclass(frozen=True)
class Check:
    """One line of the answer."""

    name: str
    state: State
    found: str
    do: str = ""
    """What to do about a warning or what is broken."""


def run(address: str, folder: Path, show: Progress) -> dict[str, Any]:
    """The verb: every check; `folder` is where run folders will lie, `address` where the work will be done."""
    listed = machine.gpus()
    looks: tuple[Callable[[], Iterator[Check]], ...] = (_packages, _limits, lambda: _room(folder), _stores, _extras)
    checks = [check for look in looks for check in look()]
    with show.wait("importing torch"):
        checks += _gpus(listed)
    checks += _ray(address, len(listed), show)
    states = [check.state for check in checks]
    lines = [{name: value for name, value in asdict(check).items() if value} for check in checks]
    return {"checks": lines, "warnings": states.count("warning"), "broken": states.count("broken")}


def _packages() -> Iterator[Check]:
    required = [Requirement(line) for line in metadata.requires("capfilt") or ()]
    wrong, mend = [], "pip install -c constraints.txt -e . (in a checkout), or pip install --upgrade capfilt"
    for need in required:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{need.name} is missing")
            continue
        if not need.specifier.contains(version, prereleases=True):
            wrong.append(f"{need.name} {version}, needed is {need.specifier}")
    if wrong:
        yield Check("packages", "broken", "; ".join(wrong), mend)
    versions = [f"{name} {metadata.version(name)}" for name in SHOWN if find_spec(name)]
    yield Check("versions", "ok", ", ".join([f"capfilt {capfilt.__version__}", *versions]))


def _limits() -> Iterator[Check]:
    for name, kind, least, option in (
        ("open files", resource.RLIMIT_NOFILE, FILES, "-n"),
        ("processes", resource.RLIMIT_NPROC, PROCESSES, "-u"),
    ):
        soft, hard = resource.getrlimit(kind)
        found = "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,}"
        few = soft != resource.RLIM_INFINITY and soft < least
        do = f"ulimit {option} {least if hard == resource.RLIM_INFINITY else min(hard, 65_536)}"
        yield Check(name, "warning", found, f"{do}; large runs take more than {least:,}") if few else Check(name, "ok", found)
    memory = machine.memory_bytes()
    low = memory < 4 * GB
    yield Check("memory", "warning" if low else "ok", f"{memory / GB:,.1f} GB", "use small models, one worker" if low else "")
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Check("/dev/shm", "warning", "there is none", "Ray then uses /tmp, which is slower")
        return
    free = shutil.disk_usage(shm).free
    do = "docker run --shm-size=2g, or in Kubernetes an emptyDir of medium Memory there" if free < GB else ""
    yield Check("/dev/shm", "warning" if do else "ok", f"{free / GB:,.1f} GB free", do)


def _room(folder: Path) -> Iterator[Check]:
    """The disk of run folders: bytes, inodes, and whether a file can be written, flushed and renamed."""
    home = machine.nearest(folder)
    free = shutil.disk_usage(home).free
    state: State = "broken" if free < GB else "warning" if free < 20 * GB else "ok"
    do = "" if state == "ok" else "free some, or give --out another disk: cleaned shards are as large as what is kept"
    yield Check("disk", state, f"{free / GB:,.1f} GB free at {home}", do)
    status = os.statvfs(home)
    if status.f_files:
        few = status.f_favail < INODES
        what = f"{status.f_favail:,} files can be made at {home}"
        yield Check("inodes", "warning" if few else "ok", what, "use shards of more samples, or another disk" if few else "")
    try:
        with tempfile.TemporaryDirectory(prefix=".capfilt-doctor-", dir=home) as scratch:
            file = Path(scratch, "a")
            with file.open("wb") as stream:
                stream.write(b"a")
                os.fsync(stream.fileno())
            file.rename(Path(scratch, "b"))
    except OSError as error:
        yield Check("writing", "broken", f"{home}: {error}", "give --out a folder that may be written to")
        return
    yield Check("writing", "ok", f"files can be written and renamed at {home}")


def _stores() -> Iterator[Check]:
    for name, (package, variables, files) in _STORES.items():
        there = [f"${variable}" for variable in variables if os.environ.get(variable)]
        there += [f"~/{file}" for file in files if (Path.home() / file).is_file()]
        what = f"credentials are in {', '.join(there)}" if there else "no credentials in the usual places"
        if find_spec(package) is None:
            if there:
                yield Check(name, "warning", f"{what}, and {package} is not installed", f"pip install {package}")
            else:
                yield Check(name, "ok", f"{package} is not installed; only for data that lies there")
        else:
            yield Check(name, "ok", what)


def _extras() -> Iterator[Check]:
    for package, extra, what in (
        ("py3langid", "language", "rules about languages"),
        ("openai", "endpoint", "captions from an endpoint"),
    ):
        there = find_spec(package) is not None
        yield Check(what, "ok", f"{package} {metadata.version(package)}" if there else f"needs pip install 'capfilt[{extra}]'")
    yield Check("not needed", "ok", "chromium and prometheus: only tests and monitoring use them")


def _gpus(listed: list[str]) -> Iterator[Check]:
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(listed) > seen:
        build = f"torch {torch.__version__} is built for {torch.version.cuda or 'CPUs'}"
        do = "install torch for your driver's CUDA (pytorch.org), and look at CUDA_VISIBLE_DEVICES"
        yield Check("GPUs", "broken", f"the driver lists {len(listed)}, torch sees {seen}; {build}", do)
    elif seen:
        yield Check("GPUs", "ok", ", ".join(torch.cuda.get_device_name(i) for i in range(seen)))
    else:
        yield Check("GPUs", "ok", "none: models run on CPUs")


def _ray(address: str, listed: int, show: Progress) -> Iterator[Check]:
    """A Ray is started, or connected to, as a command would."""
    if address == "local":
        yield Check("Ray", "ok", "not asked: --address local works without it")
        return
    try:
        with connect(address, show=show) as session:
            cpus, gpus = session.capacity(1), session.capacity(0, 1)
    except ClusterError as error:
        yield Check("Ray", "broken", str(error), "the error says what; --address local works without Ray")
        return
    if address == "start" and gpus < listed:
        do = "unset CUDA_VISIBLE_DEVICES, or start Ray with --num-gpus"
        yield Check("Ray", "broken", f"the driver lists {listed} GPUs, Ray sees {gpus}", do)
    else:
        where = "starts here" if address == "start" else f"answers at {address}"
        yield Check("Ray", "ok", f"{where}: {cpus} CPUs, {gpus} GPUs")
