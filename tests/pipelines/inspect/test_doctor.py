from __future__ import annotations

import json
import os
import resource
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from capfilt.errors import ClusterError
from capfilt.pipelines.inspect import doctor, machine
from capfilt.runs.progress import Progress


def look(folder: Path, address: str = "local") -> dict[str, dict[str, str]]:
    record = doctor.run(address, folder, Progress(quiet=True))
    return {check["name"]: check for check in record["checks"]}


def test_a_machine_that_is_fit(tmp_path: Path, capfilt: Any) -> None:
    done = capfilt("doctor", tmp_path, "--json")
    record = json.loads(done.out)
    assert (done.code, record["broken"]) == (0, 0), record
    names = [check["name"] for check in record["checks"]]
    assert {"packages", "open files", "processes", "memory", "/dev/shm", "disk", "writing", "s3", "GPUs", "Ray"} <= set(
        names
    )
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    assert metadata.version("torch") in record["checks"][0]["found"]
    told = capfilt("doctor", tmp_path)
    assert f"ok       writing: files can be written and renamed at {tmp_path}" in told.out


def test_credentials_are_named_and_never_printed(tmp_path: Path, monkeypatch: Any, capfilt: Any) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIASECRET")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/a/secret/path.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("aws_secret_access_key = hush")
    done = capfilt("doctor", tmp_path)
    assert done.code == 0
    assert "s3: credentials in $AWS_ACCESS_KEY_ID, ~/.aws/credentials" in done.out
    assert not any(secret in done.out + done.err for secret in ("AKIASECRET", "hush", "secret/path"))
    gs = look(tmp_path)["gs"]
    assert (gs["state"], gs["do"]) == ("warning", "pip install gcsfs"), "there are credentials, and nothing to use them"


def test_what_is_short_is_said_with_what_to_do(tmp_path: Path, monkeypatch: Any, capfilt: Any) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    monkeypatch.setattr(machine, "memory", lambda: 2 * 10**9)
    full = os.statvfs(tmp_path)
    few = type("few", (), {"f_files": 1000, "f_favail": 10})
    monkeypatch.setattr(doctor.os, "statvfs", lambda _: few)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10**8}))
    checks = look(tmp_path)
    assert {name: check["state"] for name, check in checks.items() if check["state"] != "ok"} == {
        "open files": "warning", "processes": "warning", "memory": "warning", "/dev/shm": "warning",
        "disk": "broken", "inodes": "warning",
    }  # fmt: skip
    assert checks["open files"]["do"].startswith("ulimit -n 4096")
    assert all(check.get("do") for check in checks.values() if check["state"] != "ok")
    assert full.f_files
    done = capfilt("doctor", tmp_path)
    assert done.code == 1, "a full disk must be mended"
    assert "broken   disk: 0.1 GB free" in done.out


def test_a_folder_that_cannot_be_written_is_broken(tmp_path: Path) -> None:
    writing = look(Path("/proc/nowhere"))["writing"]
    assert writing["state"] == "broken"
    assert look(tmp_path / "not/there/yet")["writing"]["found"].endswith(str(tmp_path))


def test_packages_are_those_that_capfilt_requires(tmp_path: Path, monkeypatch: Any) -> None:
    wanted = ["torch>=99", "no-such-package", "pytest ; extra == 'dev'", "absent ; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: wanted)
    packages = look(tmp_path)["packages"]
    assert packages["state"] == "broken"
    assert "needed is >=99" in packages["found"]
    assert "no-such-package none" in packages["found"]
    assert "absent" not in packages["found"]


def test_gpus_that_torch_or_ray_cannot_see_are_broken(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'NVIDIA H200\\nNVIDIA H200\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    assert machine.gpus() == ["NVIDIA H200"] * 2
    gpus = look(tmp_path)["GPUs"]
    assert gpus["state"] == "broken"
    assert "the driver lists 2, torch sees 0" in gpus["found"]
    here = machine.Machine.look("local", tmp_path, Progress(quiet=True))
    assert "2 x NVIDIA H200" in str(here)

    class NoGpus:
        capacity = staticmethod(lambda cpus, gpus=0: 0 if gpus else 8)
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    monkeypatch.setattr(doctor, "connect", lambda *_, **__: NoGpus())
    assert look(tmp_path, "start")["Ray"]["state"] == "broken"

    def fails(*_: Any, **__: Any) -> None:
        raise ClusterError("Ray could not be started on this machine: no sockets.")

    monkeypatch.setattr(doctor, "connect", fails)
    assert look(tmp_path, "auto")["Ray"]["found"].endswith("no sockets.")


def test_a_container_s_limits_count(tmp_path: Path) -> None:
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    whole = machine.memory(tmp_path)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine.memory(tmp_path) == whole
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1000000\n")
    assert machine.memory(tmp_path) == 1_000_000


@pytest.mark.slow
def test_ray_is_really_started(tmp_path: Path) -> None:
    done = subprocess.run(["capfilt", "doctor", str(tmp_path), "--json"], capture_output=True, text=True, check=False)
    ray = json.loads(done.stdout)["checks"][-1]
    assert (ray["name"], ray["state"]) == ("Ray", "ok"), done.stderr
