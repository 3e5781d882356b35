from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from capfilt.storage import local_copies
from capfilt.storage.atomic import atomic
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath, Stat


def put(path: StoragePath, data: bytes = b"abc") -> StoragePath:
    with atomic(path) as file:
        file.write(data)
    return path


def test_what_lies_on_a_store_is_copied_once(store: RemotePath, tmp_path: Path) -> None:
    model = store / "deep/model"
    put(model / "a.bin", b"1")
    put(model / "sub/b.bin", b"2")
    here = local_copy(str(model))
    assert here == local_copy(model)
    assert here.name == "model"
    assert [path.name for path in here.iterdir()] == ["a.bin"]
    assert (here.parent.parent.stat().st_mode & 0o777, here.parents[2]) == (0o700, tmp_path)
    put(model / "a.bin", b"3")
    assert (local_copy(model) / "a.bin").read_bytes() == b"3"
    assert (here / "a.bin").read_bytes() == b"1", "somebody may still read it"
    assert local_copy(model / "a.bin").read_bytes() == b"3"
    assert local_copy(model / "a.bin").name == "a.bin"
    for path in (tmp_path, str(tmp_path)):
        assert local_copy(path) == tmp_path
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"{store}/nowhere: no object has this name or lies below it")
    ):
        local_copy(store / "nowhere")


def test_of_many_that_copy_one_does(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store / "model/a.bin", b"1" * 1000)
    opened: list[str] = []
    open_object = RemotePath.open

    def counted(self: RemotePath, mode: str = "rb") -> Any:
        opened.append(self.name)
        time.sleep(0.05)
        return open_object(self, mode)

    monkeypatch.setattr(RemotePath, "open", counted)
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(lambda _: (local_copy(store / "model") / "a.bin").read_bytes(), range(8)))
    assert copies == [b"1" * 1000] * 8
    assert opened == ["a.bin"]


def test_a_copy_that_lost_a_file_is_made_again_and_old_ones_go(store: RemotePath) -> None:
    put(store / "model/a.bin", b"1")
    put(store / "other/a.bin", b"2")
    here, other = local_copy(store / "model"), local_copy(store / "other")
    (here / "a.bin").unlink()  # as a machine tidies up
    os.utime(other.parent, (0, 0))
    assert (local_copy(store / "model") / "a.bin").read_bytes() == b"1"
    assert not other.exists()


def test_a_store_that_tells_no_version_is_copied_by_each_process(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(store / "a.bin", b"1")
    monkeypatch.setattr(RemotePath, "stat", lambda self: Stat(1, 0.0))
    here = local_copy(store / "a.bin")
    assert local_copy(store / "a.bin") == here
    monkeypatch.setattr(local_copies, "_THIS_PROCESS", "another")
    assert local_copy(store / "a.bin") != here


def test_copies_do_not_lie_in_a_folder_of_somebody_else(store: RemotePath, tmp_path: Path) -> None:
    put(store / "a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"capfilt-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="belongs to another user; let TMPDIR"):
        local_copy(store / "a")


def test_copies_do_not_lie_where_others_may_write(store: RemotePath, tmp_path: Path) -> None:
    put(store / "a")
    home = tmp_path / f"capfilt-{os.getuid()}"
    home.mkdir()
    home.chmod(0o777)
    with pytest.raises(PermissionError, match="other users may write into"):
        local_copy(store / "a")
    home.chmod(0o700)
    assert local_copy(store / "a").is_file()
