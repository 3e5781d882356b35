"""doctor: whether this machine is fit for work, a line for each thing that has cost somebody a day.

Nothing is mended and no secret is read: of credentials it is said that they are there, and where.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

from capfilt.cluster.session import check_address, connect
from capfilt.errors import ClusterError
from capfilt.pipelines.inspect import machine
from capfilt.pipelines.inspect.machine import GB
from capfilt.runs.progress import Progress

SHOWN = ("capfilt", "torch", "ray", "transformers", "pyarrow", "webdataset")
"""Packages whose versions belong in a report of a fault."""
LIMITS = {"open files": (resource.RLIMIT_NOFILE, "-n", 4096), "processes": (resource.RLIMIT_NPROC, "-u", 4096)}
"""What Ray's workers and the connections to stores take: the limit, its option of `ulimit`, and how much is enough."""
INODES = 100_000
"""A run keeps six files or more for each shard and round."""
STORES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "s3": ("s3fs", ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE"), (".aws/credentials",)),
    "gs": ("gcsfs", ("GOOGLE_APPLICATION_CREDENTIALS",), (".config/gcloud/application_default_credentials.json",)),
    "az": ("adlfs", ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_CLIENT_ID"), ()),
    "Hugging Face hub": ("huggingface_hub", ("HF_TOKEN",), (".cache/huggingface/token",)),
}
"""The package that reads each store, and where its credentials may be: variables, and files in the home folder."""
EXTRAS = {"py3langid": "language", "openai": "endpoint"}


class Check(NamedTuple):
    """One line of the answer."""

    name: str
    found: str
    state: str = "ok"
    """ok | warning | broken"""
    do: str = ""
    """What to do about a warning or what is broken."""


def run(address: str, folder: Path, show: Progress) -> dict[str, Any]:
    """The verb: every check; `folder` is where run folders will lie, `address` where the work will be done.

    Raises:
        AddressError: an address of no form that there is.
    """
    check_address(address)
    listed = len(machine.gpus())
    looks: tuple[Callable[[], Iterator[Check]], ...] = (_packages, _limits, lambda: _room(folder), _stores)
    checks = [check for look in looks for check in look()]
    with show.wait("importing torch"):
        checks.append(_gpus(listed))
    checks.append(_ray(address, listed, show))
    lines = [{name: value for name, value in check._asdict().items() if value} for check in checks]
    return {"checks": lines, "broken": sum(check.state == "broken" for check in checks)}


def _least(name: str, found: str, enough: bool, do: str, state: str = "warning") -> Check:
    return Check(name, found) if enough else Check(name, found, state, do)


def _packages() -> Iterator[Check]:
    wrong = []
    for need in map(Requirement, metadata.requires("capfilt") or ()):
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            there = metadata.version(need.name) if _is_installed(need.name) else "none"
            if there == "none" or not need.specifier.contains(there, prereleases=True):
                wrong.append(f"{need.name} {there}, needed is {need.specifier or 'any'}")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in SHOWN if _is_installed(name))
    yield _least("packages", "; ".join(wrong) or versions, not wrong, "pip install -c constraints.txt -e .", "broken")
    for package, extra in EXTRAS.items():
        there = metadata.version(package) if _is_installed(package) else "not installed"
        yield Check(f"extra {extra}", f"{package} {there}; only what docs say needs pip install 'capfilt[{extra}]'")


def _is_installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


def _limits() -> Iterator[Check]:
    for name, (kind, option, enough) in LIMITS.items():
        soft, hard = (limit if limit != resource.RLIM_INFINITY else 2**31 for limit in resource.getrlimit(kind))
        yield _least(name, f"at most {soft:,}", soft >= enough, f"ulimit {option} {min(hard, 65_536)}: Ray takes many")
    memory = machine.memory()
    yield _least("memory", f"{memory / GB:,.1f} GB", memory >= 4 * GB, "take small models, and one worker")
    shm = Path("/dev/shm")
    free = shutil.disk_usage(shm).free if shm.is_dir() else 0
    yield _least("/dev/shm", f"{free / GB:,.1f} GB free", free >= GB, "docker run --shm-size=2g; Ray is slow without")


def _room(folder: Path) -> Iterator[Check]:
    """The disk of run folders: bytes, inodes, and whether a file can be written, flushed and renamed."""
    home = machine.nearest(folder)
    free, status = shutil.disk_usage(home).free, os.statvfs(home)
    do, state = "free some, or give --out another disk", "broken" if free < GB else "warning"
    yield _least("disk", f"{free / GB:,.1f} GB free at {home}", free >= 20 * GB, do, state)
    if status.f_files:  # some file systems have no such limit, and say 0
        found = f"{status.f_favail:,} more files at {home}"
        yield _least("inodes", found, status.f_favail >= INODES, "make shards of more samples, or take another disk")
    try:
        with tempfile.TemporaryDirectory(prefix=".capfilt-doctor-", dir=home) as scratch:
            file = Path(scratch, "a")
            with file.open("wb") as stream:
                stream.write(b"a")
                os.fsync(stream.fileno())
            file.rename(Path(scratch, "b"))
    except OSError as error:
        yield Check("writing", f"{home}: {error}", "broken", "give --out a folder that may be written to")
    else:
        yield Check("writing", f"files can be written and renamed at {home}")


def _stores() -> Iterator[Check]:
    for name, (package, variables, files) in STORES.items():
        there = [f"${variable}" for variable in variables if os.environ.get(variable)]
        there += [f"~/{file}" for file in files if (Path.home() / file).is_file()]
        credentials = f"credentials in {', '.join(there)}" if there else "no credentials in the usual places"
        installed = find_spec(package) is not None
        found = credentials if installed else f"{package} is not installed; {credentials}"
        yield _least(name, found, installed or not there, f"pip install {package}")


def _gpus(listed: int) -> Check:
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(number) for number in range(seen)) or "none: models run on CPUs"
    if listed <= seen:
        return Check("GPUs", names)
    build = f"torch {torch.__version__} is built for {torch.version.cuda or 'CPUs'}"
    do = "install torch for your driver's CUDA (pytorch.org), and look at CUDA_VISIBLE_DEVICES"
    return Check("GPUs", f"the driver lists {listed}, torch sees {seen}; {build}", "broken", do)


def _ray(address: str, listed: int, show: Progress) -> Check:
    """A Ray is started, or connected to, as a command would."""
    if address == "local":
        return Check("Ray", "not asked: --address local works without it")
    try:
        with connect(address, show=show) as session:
            cpus, gpus = session.capacity(1), session.capacity(0, 1)
    except ClusterError as error:
        return Check("Ray", str(error), "broken", "mend that, or work with --address local, without Ray")
    do = "unset CUDA_VISIBLE_DEVICES, or start Ray with --num-gpus"
    enough = address != "start" or gpus >= listed
    return _least("Ray", f"{address} has {cpus} CPUs, {gpus} GPUs; listed {listed}", enough, do, "broken")
