from __future__ import annotations

import pickle
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from capfilt.storage import remote_path
from capfilt.storage.append_log import append_line
from capfilt.storage.atomic import atomic, link_or_copy
from capfilt.storage.paths import StoragePath, listing, relative_to, table_source
from capfilt.storage.remote_path import RemotePath


def put(path: StoragePath, data: bytes = b"abc") -> StoragePath:
    with atomic(path) as file:
        file.write(data)
    return path


def test_names_are_those_of_pathlib() -> None:
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
    monkeypatch.setattr(remote_path, "PART_BYTES", 100)
    put(path, b"x" * 1000)
    assert path.open().read() == b"x" * 1000


def test_reading_is_as_in_a_folder(store: RemotePath, tmp_path: Path) -> None:
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


def test_a_missing_object_is_a_file_not_found_error(store: RemotePath) -> None:
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
        append_line(log, b"one\n")
        append_line(log, b"two\n")
        assert log.read_bytes() == b"one\ntwo\n"
    for source, target in (("a", "b"), ("c", tmp_path / "d"), (tmp_path / "d", "e")):
        ends = [store / end if isinstance(end, str) else end for end in (source, target)]
        if not ends[0].exists():
            put(ends[0], str(source).encode())
        link_or_copy(*ends)
        assert ends[1].read_bytes() == ends[0].read_bytes()
    assert table_source(tmp_path / "d") == tmp_path / "d"


def test_errors_of_a_client_become_os_errors_that_name_the_path(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", broken)
    with pytest.raises(OSError, match=re.escape(f"{store}/a: RuntimeError: no route")):
        (store / "a").read_bytes()
