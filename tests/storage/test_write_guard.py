from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capfilt.errors import LockLostError
from capfilt.runs.ledger import Ledger
from capfilt.runs.locking import lock
from capfilt.runs.locking.lock_file import LOCK_NAME, find_lock
from capfilt.runs.run import Run
from capfilt.runs.tally import Tally
from capfilt.storage import write_guard
from capfilt.storage.append_log import RemoteLog, append_line
from capfilt.storage.atomic import atomic, link_or_copy, write_json
from capfilt.storage.paths import StoragePath, listing, storage_path


@pytest.fixture(autouse=True)
def release_locks() -> Iterator[None]:
    lock.release_all()  # those of runs that earlier tests made in this process
    yield
    lock.release_all()


@pytest.fixture(params=["folder", "store"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoragePath:
    """An opened run folder, and a file in it."""
    monkeypatch.setattr(write_guard, "STORE_SECONDS", 0.0)
    out: StoragePath = tmp_path / "run" if request.param == "folder" else request.getfixturevalue("store")
    Run.open(out, "", {"verb": "toy"}, min_free_bytes=0)
    write_json(out / "there.json", {})
    return out


def taken_over(out: StoragePath) -> None:
    """Create the lock of a driver that takes over."""
    found = find_lock(out)
    assert found is not None
    assert found.owner is not None
    owner = {**vars(found.owner), "token": "another"}
    successor = found.path.with_name(f"lock-{found.number + 1}.json")
    if isinstance(successor, Path):
        successor.write_text(json.dumps(owner) + "\n")
    else:
        assert successor.create(json.dumps(owner).encode() + b"\n")


def removed(out: StoragePath) -> None:
    """Remove the lock, as a person may who thinks that the driver is dead."""
    found = find_lock(out)
    assert found is not None
    found.path.unlink()


def remote_log(out: StoragePath) -> None:
    with RemoteLog(out / "j.jsonl") as log:  # type: ignore[arg-type]
        log.add(b"{}")


WRITES: dict[str, Callable[[StoragePath], Any]] = {
    "commit": lambda out: Ledger(out, "toy").commit("a", "f", [], Tally.zero()),
    "withdraw": lambda out: Ledger(out, "toy").invalidate("a"),
    "output": lambda out: write_json(out / "round-1" / "dataset" / "x.json", {}),
    "log": lambda out: append_line(out / "log.jsonl", b"{}\n"),
    "link": lambda out: link_or_copy(out / "there.json", out / "too.json"),
}


@pytest.mark.parametrize("lose", [taken_over, removed])
def test_a_process_that_lost_the_lock_writes_nothing(run: StoragePath, lose: Callable[[StoragePath], None]) -> None:
    for write in WRITES.values():
        write(run)
    before = {name: (run / name).read_bytes() for name, stat in listing(run).items() if stat is not None}
    lose(run)
    for write in WRITES.values():
        with pytest.raises(LockLostError, match=r"was removed or taken over: another driver may be at work on "):
            write(run)
    after = {name: (run / name).read_bytes() for name, stat in listing(run).items() if stat is not None}
    locks = {name for name in {*before, *after} if LOCK_NAME.fullmatch(name)}
    assert {name: data for name, data in after.items() if name not in locks} == {
        name: data for name, data in before.items() if name not in locks
    }, "nothing new, nothing half-written"


def test_a_remote_log_is_not_written_after_the_lock_was_lost(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_guard, "STORE_SECONDS", 0.0)
    Run.open(store, "", {"verb": "toy"})
    remote_log(store)
    taken_over(store)
    with pytest.raises(LockLostError):
        remote_log(store)


def test_a_worker_gets_the_guard_of_its_driver_pickled(run: StoragePath) -> None:
    [sent] = pickle.loads(pickle.dumps(write_guard.active_guards()))
    assert sent.is_held()
    assert sent.covers(run / "round-1/ledger/toy/a.json")
    assert not sent.covers(storage_path(f"{run}-too"))
    assert not sent.covers(Path("/elsewhere"))
    removed(run)
    assert not sent.is_held()


def test_a_worker_that_was_kept_forgets_the_lock_of_the_driver_before(run: StoragePath) -> None:
    removed(run)
    with pytest.raises(LockLostError):
        write_json(run / "x.json", {})
    write_guard.activate_only(())
    write_json(run / "x.json", {})


def test_other_folders_and_released_locks_are_not_guarded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    lock.acquire_once(tmp_path / "a").path.unlink()
    write_json(tmp_path / "b" / "x.json", {})
    with pytest.raises(LockLostError):
        write_json(tmp_path / "a" / "x.json", {})
    lock.release_all()
    write_json(tmp_path / "a" / "x.json", {})


def test_a_folder_by_another_name_is_the_same_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    lock.acquire_once(tmp_path / "link").path.unlink()
    for name in ("real", "link"):
        with pytest.raises(LockLostError), atomic(tmp_path / name / "x"):
            pass
