from __future__ import annotations

import os
import pickle
import re
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import ValidationError

from capfilt.config import Config
from capfilt.data import labels
from capfilt.data.labels import Label
from capfilt.errors import RunError, UsageError
from capfilt.runs import lock, quarantine, stage_status
from capfilt.runs.ledger import Ledger
from capfilt.runs.run import Run, fork
from capfilt.runs.tally import Tally
from capfilt.storage import paths
from capfilt.storage.append_log import append
from capfilt.storage.atomic import atomic, link_or_copy, staging_folder, write_json
from capfilt.storage.paths import (
    RemotePath,
    StoragePath,
    listing,
    map_concurrent,
    relative_to,
    remove_all,
    storage_path,
    table_source,
)


def put(path: StoragePath, data: bytes = b"abc") -> StoragePath:
    with atomic(path) as file:
        file.write(data)
    return path


def test_a_link_to_nowhere_hides_nothing(tmp_path: Path) -> None:
    put(tmp_path / "important")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    assert listing(tmp_path).keys() == {"important", "link", "folder"}
    assert listing(tmp_path / "gone") == {}


# ---- names ----


def test_a_place_is_a_path_or_a_url(tmp_path: Path) -> None:
    assert storage_path("runs/a") == Path("runs/a")
    assert storage_path(f"file://{tmp_path}") == tmp_path
    assert storage_path("s3://bucket/run/") == RemotePath("s3://bucket/run")
    assert storage_path(RemotePath("s3://bucket/run")) == RemotePath("s3://bucket/run")
    assert storage_path(tmp_path) is tmp_path


@pytest.mark.parametrize(
    ("url", "said"),
    [("s4://b/run", "s4"), ("s3://", "names no place"), ("s3:///", "s3://BUCKET"), ("s3://b", "no place")],
)
def test_what_is_no_place_is_refused(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        storage_path(url)


def test_names_go_as_those_of_a_path_do() -> None:
    folder = RemotePath("s3://bucket/run")
    path = folder / "round-1" / "annotations/00000.parquet"
    assert str(path) == "s3://bucket/run/round-1/annotations/00000.parquet"
    assert (path.name, path.stem, path.parent.name) == ("00000.parquet", "00000", "annotations")
    assert path.parts == ("s3://bucket", "run", "round-1", "annotations", "00000.parquet")
    assert path.relative_to(folder) == PurePosixPath("round-1/annotations/00000.parquet")
    assert folder / str(path.relative_to(folder)) == path
    assert path.parents[:2] == [folder / "round-1/annotations", folder / "round-1"]
    assert folder.parent.parent == RemotePath("s3://bucket") == folder.parent
    assert path.with_name("b.json") == path.parent / "b.json"
    assert folder.joinpath() == folder.absolute() == folder.resolve() == folder / "."
    assert sorted([folder / "b", folder / "a"]) == [folder / "a", folder / "b"]
    assert pickle.loads(pickle.dumps(path)) == path
    with pytest.raises(ValueError, match="does not lie in"):
        RemotePath("s3://bucket/run2").relative_to(folder)
    for inner, outer in ((folder, Path("/a")), (Path("/a"), folder)):
        with pytest.raises(ValueError, match="does not lie in"):
            relative_to(inner, outer)


def test_a_config_holds_a_place_and_says_it_as_text(tmp_path: Path) -> None:
    class Job(Config):
        out: StoragePath

    assert Job(out="s3://bucket/run").out == RemotePath("s3://bucket/run")
    assert Job(out=tmp_path).out == tmp_path
    job = Job(out=RemotePath("s3://bucket/run"))
    assert job.model_dump(mode="json") == {"out": "s3://bucket/run"}
    assert Job.model_validate(job.model_dump(mode="json")) == job
    for given in (job, Job(out=tmp_path)):
        assert Job.model_validate_json(given.model_dump_json()) == given
    with pytest.raises(ValidationError, match="a path or a URL is needed, and this is a int"):
        Job.model_validate({"out": 1})


# ---- objects ----


def test_an_object_appears_whole_or_not_at_all(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store / "deep/a"
    with atomic(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert (path.read_bytes(), path.read_text(), path.stat().st_size) == (b"new", "new", 3)
    with pytest.raises(KeyboardInterrupt), atomic(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new"
    monkeypatch.setattr(paths, "PART_BYTES", 100)
    put(path, b"x" * 1000)
    assert path.open().read() == b"x" * 1000


def test_looking_is_as_in_a_folder(store: RemotePath, tmp_path: Path) -> None:
    for folder in (tmp_path, store):
        for name in ("round-1/ledger/a.json", "round-1/ledger/b.json", "round-10/annotations/a.parquet", "plan.json"):
            put(folder / name)
        found = {
            pattern: sorted(str(relative_to(path, folder)) for path in folder.glob(pattern))
            for pattern in ("*.json", "round-*/ledger", "*/ledger/*.json", "*/x", "ledger", "plan.json", "round-1/*")
        }
        assert found["*/ledger/*.json"] == ["round-1/ledger/a.json", "round-1/ledger/b.json"]
        if folder is tmp_path:
            local = found
    assert found == local
    for folder in (tmp_path, store):
        stats = listing(folder)
        assert {name: stat and stat.st_size for name, stat in stats.items()} == {
            "plan.json": 3, "round-1": None, "round-10": None
        }  # fmt: skip
        assert listing(folder / "nowhere") == {}
        assert (folder / "plan.json").is_file()
        assert not (folder / "plan.json").is_dir()
        assert (folder / "round-1").is_dir()
        assert not (folder / "round-1").is_file()
        assert not (folder / "nowhere").exists()
        assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "round-1", "round-10"]
    written = listing(store)["plan.json"]
    assert written is not None
    assert abs(written.st_mtime - (tmp_path / "plan.json").stat().st_mtime) < 60


def test_what_is_not_there_says_so(store: RemotePath) -> None:
    for look in (RemotePath.read_bytes, RemotePath.stat, RemotePath.unlink, RemotePath.open):
        with pytest.raises(FileNotFoundError):
            look(store / "a")
    (store / "a").unlink(missing_ok=True)
    put(store / "a")
    (store / "a").unlink()
    assert not (store / "a").exists()


def test_of_two_that_create_an_object_one_does(store: RemotePath) -> None:
    assert (store / "a").create(b"first")
    assert not (store / "a").create(b"second")
    assert (store / "a").create(b"first"), "the first answer was lost, and the request made again"
    assert (store / "a").read_bytes() == b"first"


def test_logs_grow_and_copies_are_copies(store: RemotePath, tmp_path: Path) -> None:
    for log in (store / "log", tmp_path / "log"):
        append(log, b"one\n")
        append(log, b"two\n")
        assert log.read_bytes() == b"one\ntwo\n"
    for source, target in (("a", "b"), ("c", tmp_path / "d"), (tmp_path / "d", "e")):
        ends = [store / end if isinstance(end, str) else end for end in (source, target)]
        if not ends[0].exists():
            put(ends[0], str(source).encode())
        link_or_copy(*ends)
        assert ends[1].read_bytes() == ends[0].read_bytes()
    assert table_source(tmp_path / "d") == tmp_path / "d"


def test_a_folder_is_filled_or_not(store: RemotePath, tmp_path: Path) -> None:
    for folder in (tmp_path / "run/model", store / "run/model"):
        with staging_folder(folder) as here:
            (here / "a").write_bytes(b"1")
            (here / "b").write_bytes(b"2")
        assert {name: (folder / name).read_bytes() for name in listing(folder)} == {"a": b"1", "b": b"2"}
        remove_all(folder)
        remove_all(folder)
        assert listing(folder) == {}
    with pytest.raises(ZeroDivisionError), staging_folder(store / "half") as here:
        (here / "a").write_bytes(b"1")
        raise ZeroDivisionError
    assert listing(store / "half") == {}


def test_what_cannot_be_tidied_up_stays(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("Forbidden")

    put(store / "a/b")
    monkeypatch.setattr(MemoryFileSystem, "rm", refused)
    remove_all(store / "a")
    assert f"{store}/a: Forbidden stays" in caplog.text


def test_what_a_client_raises_becomes_an_error_of_the_place(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    with pytest.raises(OSError, match=re.escape(f"{store}/a: RuntimeError: no route")):
        (store / "a").read_bytes()


def test_many_are_asked_at_once_and_answer_in_order() -> None:
    assert list(map_concurrent(lambda x: x * x, range(1000), remote=True)) == [x * x for x in range(1000)]
    assert list(map_concurrent(abs, [-1], remote=False)) == [1]
    with pytest.raises(ZeroDivisionError):
        list(map_concurrent(lambda x: 1 // x, [1, 0], remote=True))


# ---- a run ----


def test_a_run_folder_on_a_store(store: RemotePath) -> None:
    out = store / "run"
    run = Run.open(out, "a: 1\n", {"verb": "toy"})
    assert not run.resumed
    assert lock.state(out).startswith(f"process {os.getpid()}")
    run.log("begin", loss=float("nan"))
    run.log("end")
    assert len((out / "log.jsonl").read_bytes().splitlines()) == 2
    lock.release_all()
    assert listing(out / lock.FOLDER) == {}
    assert Run.open(out, "a: 1\n", {"verb": "toy"}).resumed
    with pytest.raises(RunError, match="was planned otherwise"):
        Run.open(out, "a: 1\n", {"verb": "other"})
    put(store / "else/a")
    with pytest.raises(RunError, match="holds 'a' but no plan"):
        Run.open(store / "else", "", {})
    with pytest.raises(RunError, match="is no run folder"):
        Run.load(store / "else")


def test_a_ledger_on_a_store(store: RemotePath) -> None:
    ledger = Ledger(store / "run", "toy")
    stage_status.begin(ledger, stage_status.Plan("toy", 2), {"00000": "f0", "00001": "f1"})
    for shard in ("00000", "00001"):
        data = put(store / f"run/annotations/{shard}.parquet")
        ledger.commit(shard, f"f{shard[-1]}", [data], Tally.zero())
    assert ledger.completion("00001", "f1") == list(ledger.completions())[1]
    assert ledger.completion("00001", "f2") is None
    stage_status.failed(ledger, "00001", "no luck")
    (stand,) = map(stage_status.standing, stage_status.find(store / "run"))
    assert (stand.done, stand.plan.total, dict(stand.errors)) == (2, 2, {"no luck": 1})
    put(store / "run/annotations/00001.parquet", b"abd")
    assert "does not have the bytes" in ledger.doubt(ledger.completion("00001", "f1"), hashes=True)  # type: ignore[arg-type]
    put(store / "run/annotations/00001.parquet", b"abcd")
    assert ledger.completion("00001", "f1") is None
    (store / "run/annotations/00000.parquet").unlink()
    assert ledger.completion("00000", "f0") is None
    ledger.withdraw("00000")
    assert [path.name for path in ledger.files()] == ["00001.json"]
    assert quarantine.read(ledger, "00000", "f0") == {}
    quarantine.mark(ledger, "00000", "f0", 3, "why")
    assert list(quarantine.read(ledger, "00000", "f0")) == [3]


@pytest.mark.parametrize("ends", [("store", "store"), ("store", "disk"), ("disk", "store")])
def test_a_fork_takes_over_from_wherever_the_run_is(store: RemotePath, tmp_path: Path, ends: tuple[str, str]) -> None:
    old, new = ({"store": store / n, "disk": tmp_path / n}[end] for n, end in zip(("old", "new"), ends, strict=True))
    Run.open(old, "", {"verb": "toy"})
    Ledger(old, "toy").commit("00000", "f", [put(old / "a.bin")], Tally.zero())
    Run.open(fork(old, new), "", {"verb": "toy", "seed": 1})
    assert Ledger(new, "toy").completion("00000", "f") is not None
    assert (new / "a.bin").read_bytes() == b"abc"
    with pytest.raises(RunError, match="lies in"):
        fork(old, old / "new")


def test_labels_on_a_store(store: RemotePath) -> None:
    assert labels.read(store) == {}
    given = Label("u1", "a dog", "web", "right", True)
    labels.append(store, given)
    labels.append(store, Label("u2", "a cat", "web", "wrong", False))
    assert labels.read(store)["u1", "a dog"] == given
    assert len(labels.read(store)) == 2


# ---- the lock ----


def test_the_second_driver_on_a_store_is_refused(store: RemotePath) -> None:
    held = lock.acquire(store, beat=0.02)
    with pytest.raises(RunError, match=f"{store} is in use by process {os.getpid()}"):
        lock.acquire(store)
    held.release()
    assert listing(store / lock.FOLDER) == {}
    lock.acquire(store).release()


def elsewhere(store: RemotePath, number: int, token: str) -> RemotePath:
    """The lock of a driver on another machine."""
    owner = {"token": token, "host": "node-7", "pid": 1, "machine": "another boot", "born": "1"}
    path = store / f"{lock.FOLDER}/lock-{number}.json"
    write_json(path, owner)
    path.write_bytes(path.read_bytes().replace(b"\n", b" ") + b"\n")
    return path


def test_a_driver_elsewhere_is_judged_by_its_heartbeat(store: RemotePath) -> None:
    path = elsewhere(store, 3, "abc")
    found = lock.find(store)
    assert found is not None
    assert found.beat == store / lock.FOLDER / "lock-3-abc.beat"
    assert found.pulse() == b""
    found.beat.write_bytes(b"7")
    assert found.pulse() == b"7"
    held = lock.acquire(store, stale=0.3)
    assert (held.number, path.exists(), found.beat.exists()) == (4, False, False)
    held.release()


def test_a_driver_that_slept_cannot_write_over_the_lock_of_a_third(store: RemotePath) -> None:
    """It was taken over, that run ended, and a third began: all while it slept."""
    slept = lock.acquire(store, beat=1000)
    slept.path.unlink()
    third = lock.acquire(store, beat=1000)
    assert third.path == slept.path
    before = third.path.read_bytes()
    slept._heart.beat(5)
    slept.release()
    assert third.path.read_bytes() == before
    assert slept.path.exists(), "nor remove it"
    third.release()


def test_a_driver_on_a_store_that_was_taken_over_stops(store: RemotePath) -> None:
    with pytest.raises(KeyboardInterrupt):
        held = lock.acquire(store, beat=0.02)
        elsewhere(store, 2, "abc")
        held._thread.join(60)
        held._over.wait(60)
    assert "was taken over by process 1 on node-7" in held.lost
    held.release()
    assert list(listing(store / lock.FOLDER)) == ["lock-1.json", "lock-2.json"], "its heartbeat is gone"


def test_a_store_that_writes_over_what_is_there_is_refused(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Any, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.open(path, mode="wb", data=value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", careless)
    with pytest.raises(RunError, match="writes over an object that must not be there"):
        Run.open(store, "", {})
    assert listing(store / lock.FOLDER) == {}


def test_a_store_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    fsspec.get_filesystem_class("zip")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises((RunError, UsageError)) as caught:
        Run.open(storage_path(f"zip://{tmp_path}/a.zip"), "", {})
    assert "\n" not in str(caught.value)
