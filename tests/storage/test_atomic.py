from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.storage.atomic import PART, atomic, link_or_copy, sha256_file, staging_folder, sweep, write_json
from capfilt.storage.paths import listing, remove_folder
from capfilt.storage.remote_path import RemotePath


def output(path: Path, data: bytes = b"abc") -> Path:
    with atomic(path) as file:
        file.write(data)
    return path


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_atomic_writes_all_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.bin"
    with atomic(target) as file:
        file.write(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["a.bin"]


def test_atomic_keeps_the_old_file_when_the_block_raises(tmp_path: Path) -> None:
    target = output(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt), atomic(target) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_atomic_syncs_the_file_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(fd: int) -> None:
        steps.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    def watched_replace(src: str, dst: str, **folders: int) -> None:
        steps.append("rename")
        replace(src, dst, **folders)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    output(tmp_path / "a")
    assert steps == ["file", "rename", "folder"]


def test_a_kill_leaves_a_part_that_a_sweep_removes(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; from capfilt.storage.atomic import atomic\n"
        "with atomic(pathlib.Path(sys.argv[1])) as f: f.write(b'half'); print(1, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert sweep(tmp_path) == 0, "its writer lives"
        child.send_signal(signal.SIGKILL)
    assert len(os.listdir(tmp_path)) == 1
    assert sweep(tmp_path) == 1
    assert os.listdir(tmp_path) == []


def test_sweep_leaves_another_host_s_parts_for_a_day(tmp_path: Path) -> None:
    foreign = tmp_path / f"{PART}node-7.example-{dead_pid()}-0123abcd"
    foreign.touch()
    assert sweep(tmp_path) == 0
    assert sweep(tmp_path, finished=True) == 1
    foreign.touch()
    day_ago = time.time() - 25 * 3600
    os.utime(foreign, (day_ago, day_ago))
    assert sweep(tmp_path) == 1


def test_sweep_keeps_everything_that_is_no_part(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    (tmp_path / f"x{PART}{socket.gethostname()}-{dead_pid()}-0").touch()
    assert sweep(tmp_path) == 0
    assert len(os.listdir(tmp_path)) == 2


def test_write_json_is_sorted_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1], "a": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "a": "é",\n "b": [\n  1\n ]\n}\n'


def test_write_json_refuses_nan_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a\.json would hold NaN or infinity"):
        write_json(tmp_path / "a.json", {"auc": float("nan")})
    assert os.listdir(tmp_path) == []


def test_sha256_file(tmp_path: Path) -> None:
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(output(tmp_path / "a")) == expected


def test_link_or_copy_links_and_replaces_what_was_there(tmp_path: Path) -> None:
    source, target = output(tmp_path / "a", b"new"), output(tmp_path / "deep/b", b"old")
    for _ in range(2):  # a link that replaces itself is none the less one file
        link_or_copy(source, target)
        assert target.stat().st_ino == source.stat().st_ino
        assert os.listdir(target.parent) == ["b"]
    with atomic(target) as file:
        file.write(b"other")
    assert source.read_bytes() == b"new"


def test_where_links_do_not_reach_it_is_a_copy_of_the_same_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    source = output(tmp_path / "a")
    os.utime(source, (100, 100))
    link_or_copy(source, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"abc"
    assert (tmp_path / "b").stat().st_mtime == 100
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_staging_folder_is_sent_whole_or_not_at_all(store: RemotePath, tmp_path: Path) -> None:
    for folder in (tmp_path / "run/model", store / "run/model"):
        with staging_folder(folder) as here:
            (here / "a").write_bytes(b"1")
            (here / "b").write_bytes(b"2")
        assert {name: (folder / name).read_bytes() for name in listing(folder)} == {"a": b"1", "b": b"2"}
        remove_folder(folder)
        remove_folder(folder)
        assert listing(folder) == {}
    with pytest.raises(ZeroDivisionError), staging_folder(store / "half") as here:
        (here / "a").write_bytes(b"1")
        raise ZeroDivisionError
    assert listing(store / "half") == {}
