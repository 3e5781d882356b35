from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from capfilt.cluster import session
from capfilt.cluster.session import Session, connect, default_environment
from capfilt.errors import ClusterError


@pytest.mark.parametrize("address", ["http://host:8265", "https://host:8265", "cluster", "ray://", "host:"])
def test_an_address_of_another_kind_is_refused_with_what_is_allowed(address: str) -> None:
    with pytest.raises(ClusterError, match=re.escape(repr(address))) as caught:
        connect(address)
    assert 'Allowed: "local"' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cores_are_only_given_to_a_ray_that_is_started() -> None:
    with pytest.raises(ClusterError, match="its own cores"):
        connect("auto", cpus=2)
    with pytest.raises(ClusterError, match="1 or more"):
        connect("start", cpus=0)


def test_a_ray_of_our_own_has_the_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    began: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: began.append(options))
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        connect("start")
    finally:
        os.sched_setaffinity(0, allowed)
    connect("start", cpus=3)
    assert [options["num_cpus"] for options in began] == [1, 3]


BATCH = """\
import os, signal
import ray
from capfilt.cluster.session import connect

def leave(*_): raise SystemExit(17)

signal.signal(signal.SIGTERM, leave)
try:
    with connect("start", cpus=1) as session:
        folder = ray._private.worker._global_node.get_temp_dir_path()
        print(folder, session.capacity(1), os.listdir(folder) != [], len(os.environ["RAY_AUTH_TOKEN"]), flush=True)
        signal.raise_signal(signal.SIGTERM)
finally:
    print(os.path.exists(folder))
"""


@pytest.fixture(scope="module")
def batch_job(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A process with a Ray of its own, a long TMPDIR, a HOME that may not be written, and a SIGTERM in the middle."""
    long = tmp_path_factory.mktemp("batch") / ("x" * 90)
    long.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"TMPDIR": str(long), "HOME": "/proc/no-such-home"}
    return subprocess.run([sys.executable, "-c", BATCH], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_long_tmpdir_and_a_home_that_may_not_be_written_do_no_harm(
    batch_job: subprocess.CompletedProcess[str],
) -> None:
    """As batch systems have them. Ray begins, in a short folder that goes with it, and asks for a token."""
    assert re.fullmatch(r"/tmp/ray-\w+ 1 True 64\nFalse\n", batch_job.stdout), batch_job.stderr
    said = r"x{90} is too long for Ray's sockets \(\d+ bytes, and at most 39 will do\): Ray's files lie"
    assert re.search(said + r" in /tmp/ray-\w+; set RAY_TMPDIR", batch_job.stderr)


@pytest.mark.slow
def test_what_the_caller_does_on_sigterm_stays(batch_job: subprocess.CompletedProcess[str]) -> None:
    assert batch_job.returncode == 17, batch_job.stderr


@pytest.mark.parametrize(("extra", "moved"), [(0, False), (1, True)])
def test_a_tmpdir_is_too_long_from_one_byte_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: int, moved: bool
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/" + "x" * (session.MAX_TEMPORARY - 1 + extra))
    monkeypatch.setattr(session, "_SHORT_FOLDERS", (str(tmp_path / "not there"), str(tmp_path)))
    made = session._temporary_folder()
    assert (made is not None) is moved
    if moved:
        assert Path(str(made)).parent == tmp_path
        monkeypatch.setattr(session, "_SHORT_FOLDERS", (str(tmp_path / "not there"),))
        with pytest.raises(ClusterError, match=r"set RAY_TMPDIR to a short folder of this machine, or use .*local"):
            session._temporary_folder()


def test_a_quota_bounds_the_threads_of_a_local_session(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        for environment, allowed, then in (({}, 2, 2), ({}, 8, 4), ({"OMP_NUM_THREADS": "4"}, 2, 4)):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setattr("capfilt.cpus.available", lambda allowed=allowed: allowed)
            torch.set_num_threads(4)
            connect("local")
            assert torch.get_num_threads() == then
    finally:
        torch.set_num_threads(before)


def test_a_local_session_has_no_ray() -> None:
    code = (
        "import sys; from capfilt.cluster.session import connect; import capfilt.cluster.ray_train\n"
        "with connect('local') as session: assert session.local and session.capacity(8) == 1\n"
        "sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_started_ray_has_the_cores_asked_for(ray_session: Session) -> None:
    assert ray_session.started_ray
    assert ray_session.capacity(cpus=1) == 2
    assert ray_session.capacity(cpus=0.1) == 20
    assert ray_session.capacity(cpus=3) == 0
    assert ray_session.capacity(cpus=1, gpus=512) == 0


@pytest.mark.parametrize("address", ["start", "auto"])
def test_a_ray_of_the_caller_is_used_and_left_running(ray_session: Session, address: str) -> None:
    import ray

    with connect(address) as session:
        assert not session.started_ray
        assert session.capacity(cpus=1) == 2
    session.close()
    assert ray.is_initialized()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there_is_one_line_at_once(scheme: str) -> None:
    code = (
        "import socket; from capfilt.cluster.session import connect, ClusterError\n"
        "with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]\n"
        f"try: connect(f'{scheme}127.0.0.1:{{port}}')\n"
        "except ClusterError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout.startswith(f"No Ray cluster answers at '{scheme}127.0.0.1:"), done.stderr
    assert "Connection refused" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_server_of_ray_client_that_dies_at_once_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which happens by chance alone, so it is said here that it did."""
    import ray

    answers = iter([ConnectionAbortedError("Initialization failure from server"), None])
    requested = []

    def init(**options: object) -> None:
        requested.append(options["address"])
        if (error := next(answers)) is not None:
            raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as there:
        address = f"ray://127.0.0.1:{there.getsockname()[1]}"
        connect(address)
    assert requested == [address, address]


def test_environment_leaves_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPFILT_SET", "theirs")
    monkeypatch.delenv("CAPFILT_UNSET", raising=False)
    with default_environment({"CAPFILT_SET": "ours", "CAPFILT_UNSET": "ours"}):
        assert os.environ["CAPFILT_SET"] == "theirs"
        assert os.environ["CAPFILT_UNSET"] == "ours"
    assert os.environ["CAPFILT_SET"] == "theirs"
    assert "CAPFILT_UNSET" not in os.environ
