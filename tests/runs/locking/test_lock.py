from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from capfilt.errors import LockLostError, RunError
from capfilt.runs.locking import lock
from capfilt.runs.locking.lock import acquire, acquire_once, release_all
from capfilt.runs.locking.lock_file import JOB_VARIABLE, LOCK_FOLDER, Owner, driver_of, find_lock
from capfilt.runs.run import Run
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import listing
from capfilt.storage.remote_path import RemotePath

HOLD = (
    "import sys, time; from pathlib import Path; from capfilt.runs.locking.lock import acquire\n"
    "held = acquire(Path(sys.argv[1]), interval=0.05); print(held.path.name, flush=True)\n"
    "try: time.sleep(60)\n"
    "except KeyboardInterrupt: print(held.lost_reason)"
)


@contextmanager
def driver(folder: Path, code: str = HOLD, start: Any = None) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of `folder`; `start` is what it does before it begins."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": start}
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], **pipes) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith("lock-")
        try:
            yield child
        finally:
            child.kill()


def foreign(folder: Path, number: int = 1, beat: int = 0) -> Path:
    """The lock of a driver on another machine."""
    owner = replace(Owner.this_process(), token=f"t{number}", host="node-7", machine="another boot")
    path = folder / f"lock-{number}.json"
    path.write_text(f"{json.dumps(asdict(owner))}\n{beat:016d}\n")
    return path


@pytest.fixture(autouse=True)
def release_locks() -> Iterator[None]:
    yield
    release_all()


def test_the_second_driver_is_refused_and_learns_who_holds_the_lock(tmp_path: Path) -> None:
    with driver(tmp_path) as first, pytest.raises(RunError) as caught:
        acquire(tmp_path)
    assert f"{tmp_path} is in use by process {first.pid} on {os.uname().nodename}: two drivers" in str(caught.value)


def test_a_driver_that_was_killed_here_is_replaced_at_once(tmp_path: Path) -> None:
    with driver(tmp_path) as first:
        first.kill()
        first.wait()
        held = acquire(tmp_path)
        assert os.listdir(tmp_path) == [held.path.name] == ["lock-2.json"]
        held.release()
    assert os.listdir(tmp_path) == []


def test_a_killed_driver_that_is_still_a_zombie_is_replaced(tmp_path: Path) -> None:
    with driver(tmp_path) as first:
        os.kill(first.pid, signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        held = acquire(tmp_path)
    assert held.path.name == "lock-2.json"
    held.release()


def test_a_later_process_with_the_owner_s_id_is_not_the_owner(tmp_path: Path) -> None:
    owner = replace(Owner.this_process(), born="1")
    (tmp_path / "lock-1.json").write_text(f"{json.dumps(asdict(owner))}\n{0:016d}\n")
    held = acquire(tmp_path)
    assert held.path.name == "lock-2.json"
    held.release()


def test_a_suspended_driver_of_this_machine_keeps_its_lock(tmp_path: Path) -> None:
    with driver(tmp_path) as first:
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(RunError, match="is in use by"):
            acquire(tmp_path, stale_after=0.2)


def test_a_driver_elsewhere_is_alive_while_its_heartbeat_changes(tmp_path: Path) -> None:
    path, over = foreign(tmp_path), threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(0.1):
            count += 1
            foreign(tmp_path, beat=count)
            os.utime(path, (0, 0))  # a clock that stands still, or moved back by decades, is not asked

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(RunError, match=r"in use by process \d+ on node-7"):
            acquire(tmp_path, stale_after=30)
    finally:
        over.set()
        heart.join()


def test_a_driver_elsewhere_without_a_heartbeat_is_replaced(tmp_path: Path) -> None:
    path = foreign(tmp_path)
    os.utime(path, (time.time() + 1e6,) * 2)  # its clock runs ahead of ours
    began = time.monotonic()
    held = acquire(tmp_path, stale_after=0.5)
    assert time.monotonic() - began >= 0.5
    assert held.path.name == "lock-2.json"
    assert not path.exists()
    held.release()


def test_a_torn_lock_is_watched_like_one_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "lock-7.json").write_bytes(b'{"token": "a')
    held = acquire(tmp_path, stale_after=0.2)
    assert held.number == 8
    held.release()


def test_a_driver_that_was_taken_over_stops_whatever_signals_it_ignores(tmp_path: Path, ignore_signals: Any) -> None:
    with driver(tmp_path, start=ignore_signals) as first:
        foreign(tmp_path, 2)
        assert first.stdout is not None
        assert "was taken over by process" in first.stdout.readline()
        assert first.wait(100) == 0
    assert (tmp_path / "lock-2.json").is_file(), "a lock that was lost is not removed"


def test_a_driver_that_cannot_be_interrupted_is_ended(tmp_path: Path, ignore_signals: Any) -> None:
    stubborn = HOLD.partition("try:")[0].replace("acquire\n", "acquire, interrupt\ninterrupt.GRACE_SECONDS = 0.3\n") + (
        "while True:\n try: time.sleep(60)\n except BaseException: print('no', flush=True)"
    )
    with driver(tmp_path, stubborn, ignore_signals) as first:
        foreign(tmp_path, 2)
        out, err = first.communicate(timeout=100)
    assert (first.returncode, out) == (1, "no\n")
    assert err.startswith(f"error: {tmp_path} was taken over by process ")
    assert err.endswith("this command did not leave within 0 s and is ended\n")


def test_a_lock_that_was_lost_and_is_taken_again_is_a_lock_again(tmp_path: Path) -> None:
    acquire_once(tmp_path).path.unlink()
    with pytest.raises(LockLostError):
        write_json(tmp_path / "plan.json", {})
    acquire_once(tmp_path)
    write_json(tmp_path / "plan.json", {})


def test_a_lock_that_is_removed_stops_its_driver(tmp_path: Path) -> None:
    with driver(tmp_path) as first:
        (tmp_path / "lock-1.json").unlink()
        assert first.stdout is not None
        assert "was removed while the run was working" in first.stdout.readline()


def test_a_run_that_is_deleted_interrupts_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    held = acquire(folder, interval=0.02)
    shutil.rmtree(folder)
    time.sleep(0.3)
    assert not held.lost_reason
    held.release()


def test_of_many_that_want_a_dead_driver_s_lock_one_gets_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from capfilt.errors import RunError\n"
        "from capfilt.runs.locking.lock import acquire\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "try: held = acquire(Path(sys.argv[1]), stale_after=0.3); print('mine', flush=True); sys.stdin.readline()\n"
        "except RunError: print('refused', flush=True)"
    )
    foreign(tmp_path)
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(8)]  # type: ignore[call-overload]
    for child in children:
        child.stdout.readline()
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    assert sorted(child.stdout.readline().strip() for child in children) == ["mine", *["refused"] * 7]
    for child in children:
        child.communicate("\n")


def test_a_disk_without_links_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    held = acquire(tmp_path)
    with pytest.raises(RunError, match="is in use"):
        acquire(tmp_path)
    held.release()
    assert os.listdir(tmp_path) == []


def test_a_process_holds_a_lock_once_and_until_it_releases_it(tmp_path: Path) -> None:
    held = acquire_once(tmp_path)
    assert acquire_once(tmp_path / "." / ".") is held
    newest = find_lock(tmp_path)
    assert newest is not None
    assert driver_of(tmp_path) == f"process {os.getpid()} on {os.uname().nodename}"
    release_all()
    assert find_lock(tmp_path) is None
    assert driver_of(tmp_path) == ""
    assert acquire_once(tmp_path) is not held


def test_a_process_that_ends_leaves_no_lock(tmp_path: Path) -> None:
    code = "import sys, pathlib; from capfilt.runs.locking import lock; lock.acquire_once(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert os.listdir(tmp_path) == []


def test_an_owner_that_is_a_job_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_VARIABLE, "capfilt-bootstrap-a")
    held = acquire(tmp_path)
    try:
        assert driver_of(tmp_path).endswith(", job capfilt-bootstrap-a")
    finally:
        held.release()


def test_the_second_driver_on_a_store_is_refused(store: RemotePath) -> None:
    held = lock.acquire(store, interval=0.02)
    with pytest.raises(RunError, match=f"{store} is in use by process {os.getpid()}"):
        lock.acquire(store)
    held.release()
    assert listing(store / LOCK_FOLDER) == {}
    lock.acquire(store).release()


def foreign_on_store(store: RemotePath, number: int, token: str) -> RemotePath:
    """The lock of a driver on another machine."""
    owner = {"token": token, "host": "node-7", "pid": 1, "machine": "another boot", "born": "1"}
    path = store / f"{LOCK_FOLDER}/lock-{number}.json"
    write_json(path, owner)
    path.write_bytes(path.read_bytes().replace(b"\n", b" ") + b"\n")
    return path


def test_the_heartbeat_on_a_store_is_an_object(store: RemotePath) -> None:
    path = foreign_on_store(store, 3, "abc")
    newest = find_lock(store)
    assert newest is not None
    assert newest.heartbeat_path == store / LOCK_FOLDER / "lock-3-abc.beat"
    assert newest.read_heartbeat() == b""
    newest.heartbeat_path.write_bytes(b"7")
    assert newest.read_heartbeat() == b"7"
    held = lock.acquire(store, stale_after=0.3)
    assert (held.number, path.exists(), newest.heartbeat_path.exists()) == (4, False, False)
    held.release()


def test_a_driver_that_slept_cannot_write_over_the_lock_of_a_third(store: RemotePath) -> None:
    """It was taken over, that run ended, and a third began: all while it slept."""
    slept = lock.acquire(store, interval=1000)
    slept.path.unlink()
    third = lock.acquire(store, interval=1000)
    assert third.path == slept.path
    before = third.path.read_bytes()
    slept._heartbeat.write(5)
    slept.release()
    assert third.path.read_bytes() == before
    assert slept.path.exists(), "nor remove it"
    third.release()


def test_a_driver_on_a_store_that_was_taken_over_stops(store: RemotePath) -> None:
    with pytest.raises(KeyboardInterrupt):
        held = lock.acquire(store, interval=0.02)
        foreign_on_store(store, 2, "abc")
        held._thread.join(60)
        held._released.wait(60)
    assert "was taken over by process 1 on node-7" in held.lost_reason
    held.release()
    assert list(listing(store / LOCK_FOLDER)) == ["lock-1.json", "lock-2.json"], "its heartbeat is gone"


def test_a_store_that_writes_over_what_is_there_is_refused(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Any, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.open(path, mode="wb", data=value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", careless)
    with pytest.raises(RunError, match="writes over an object that must not be there"):
        Run.open(store, "", {})
    assert listing(store / LOCK_FOLDER) == {}
