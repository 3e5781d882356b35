from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.runs.ledger import Ledger, fingerprint
from capfilt.runs.tally import Tally
from capfilt.storage.atomic import PART, atomic, link_or_copy, sha256_file, sweep, write_json


def tally(num: int = 1) -> Tally:
    return Tally(samples=Counter({"in": num, "kept": num}))


def output(path: Path, data: bytes = b"abc") -> Path:
    with atomic(path) as file:
        file.write(data)
    return path


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


# ---- atomic ----


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
    assert sweep(tmp_path, over=True) == 1
    foreign.touch()
    day_ago = time.time() - 25 * 3600
    os.utime(foreign, (day_ago, day_ago))
    assert sweep(tmp_path) == 1


def test_sweep_keeps_everything_that_is_no_part(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()
    (tmp_path / f"x{PART}{socket.gethostname()}-{dead_pid()}-0").touch()
    assert sweep(tmp_path) == 0
    assert len(os.listdir(tmp_path)) == 2


# ---- json and hashes ----


def test_write_json_is_sorted_and_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1], "a": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "a": "é",\n "b": [\n  1\n ]\n}\n'


def test_write_json_refuses_nan_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a\.json would hold a figure that is no number"):
        write_json(tmp_path / "a.json", {"auc": float("nan")})
    assert os.listdir(tmp_path) == []


def test_sha256_file(tmp_path: Path) -> None:
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(output(tmp_path / "a")) == expected


def test_a_fingerprint_is_of_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint("a")
    monkeypatch.setattr("capfilt.runs.ledger.FORMAT", 0)
    assert fingerprint("a") != before


def test_fingerprint_depends_on_what_and_not_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}, "x") == fingerprint({"b": 2, "a": 1}, "x")
    different = [
        fingerprint(),
        fingerprint(""),
        fingerprint("ab"),
        fingerprint("a", "b"),
        fingerprint(["a", "b"]),
    ]
    assert len(set(different)) == len(different)


# ---- the ledger ----


def test_a_commit_is_found_again_with_its_fingerprint_only(tmp_path: Path) -> None:
    book = Ledger(tmp_path, "annotate")
    assert book.completion("00000", "f") is None
    done = book.commit("00000", "f", [output(tmp_path / "annotations/00000.parquet")], tally())
    assert Ledger(tmp_path, "annotate").completion("00000", "f") == done
    assert book.completion("00000", "g") is None
    assert book.completion("00001", "f") is None
    assert Ledger(tmp_path, "select").completion("00000", "f") is None


def test_the_completion_file_says_what_the_design_asks(tmp_path: Path) -> None:
    Ledger(tmp_path, "annotate").commit("00000", "f", [output(tmp_path / "d/00000.tar")], tally(2))
    held = json.loads((tmp_path / "ledger/annotate/00000.json").read_text())
    assert held["fingerprint"] == "f"
    assert held["outputs"] == [{"path": "d/00000.tar", "bytes": 3, "sha256": sha256_file(tmp_path / "d/00000.tar")}]
    assert held["tally"]["samples"] == {"in": 2, "kept": 2, "dropped": 0, "failed": 0}


def test_an_unbalanced_tally_is_not_committed(tmp_path: Path) -> None:
    book = Ledger(tmp_path, "select")
    with pytest.raises(RunError, match=r"select, shard 00007: samples: 1 in, but 0 kept"):
        book.commit("00007", "f", [], Tally(samples=Counter({"in": 1})))
    assert book.completion("00007", "f") is None


def test_missing_or_changed_outputs_are_not_trusted(tmp_path: Path) -> None:
    book = Ledger(tmp_path, "select")
    path = output(tmp_path / "00000.tar")
    done = book.commit("00000", "f", [path], tally())
    path.write_bytes(b"abcd")
    assert book.completion("00000", "f") is None
    assert "has 4 bytes, 3 were committed" in book.doubt(done)
    path.write_bytes(b"abd")
    assert book.doubt(done) == ""
    assert "does not have the bytes" in book.doubt(done, hashes=True)
    path.unlink()
    assert book.completion("00000", "f") is None
    assert "is not there" in book.doubt(done)


def test_outputs_must_be_there_and_inside_the_folder(tmp_path: Path) -> None:
    book = Ledger(tmp_path / "run", "select")
    with pytest.raises(RunError, match="was to be committed and is not there"):
        book.commit("0", "f", [tmp_path / "run/absent.tar"], tally())
    with pytest.raises(RunError, match="lies outside"):
        book.commit("0", "f", [output(tmp_path / "elsewhere.tar")], tally())


def test_a_run_folder_may_be_moved(tmp_path: Path) -> None:
    output(tmp_path / "a/00000.tar")
    Ledger(tmp_path / "a", "s").commit("00000", "f", [tmp_path / "a/00000.tar"], tally())
    (tmp_path / "a").rename(tmp_path / "b")
    assert Ledger(tmp_path / "b", "s").completion("00000", "f") is not None


def test_a_torn_completion_is_done_again_but_never_counted(tmp_path: Path) -> None:
    book = Ledger(tmp_path, "s")
    book.commit("00000", "f", [], tally())
    (tmp_path / "ledger/s/00000.json").write_text('{"shard": "000')
    assert book.completion("00000", "f") is None
    with pytest.raises(RunError, match=r"00000\.json cannot be read"):
        book.total()
    book.commit("00000", "f", [], tally())
    assert book.total() == tally()


def test_total_adds_all_shards_and_no_half_written_one(tmp_path: Path) -> None:
    book = Ledger(tmp_path, "s")
    assert book.total() == Tally.zero()
    for number in (2, 0, 1):
        book.commit(f"0000{number}", "f", [], tally(number))
    (tmp_path / f"ledger/s/{PART}h-1-0").write_text("{")
    assert [done.shard for done in book.completions()] == ["00000", "00001", "00002"]
    assert book.total() == tally(3)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "a\0b"])
def test_a_shard_s_name_must_be_a_file_s_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match="a shard cannot be called"):
        Ledger(tmp_path, "s").commit(name, "f", [], tally())


def test_a_commit_costs_two_fsyncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = output(tmp_path / "a")
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    Ledger(tmp_path, "s").commit("0", "f", [path], tally())
    assert len(calls) == 2


# ---- what was withdrawn, and what another run has ----


def test_a_shard_that_is_withdrawn_is_to_be_done_again(tmp_path: Path) -> None:
    book = Ledger(tmp_path, "annotate")
    book.commit("00000", "f", [output(tmp_path / "a")], tally())
    book.withdraw("00000")
    assert book.completion("00000", "f") is None
    assert (tmp_path / "a").is_file()
    book.withdraw("00000")


def test_share_links_and_replaces_what_was_there(tmp_path: Path) -> None:
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


def test_a_fork_takes_over_what_holds_and_only_what_is_asked_for(tmp_path: Path) -> None:
    old, new = tmp_path / "old/round-1", tmp_path / "new/round-1"
    book = Ledger(old, "annotate")
    for shard in ("00000", "00001", "00002"):
        book.commit(shard, "f", [output(old / f"annotations/{shard}")], tally())
    (old / "annotations/00001").write_bytes(b"ab")  # does not hold any more
    write_json(tmp_path / "new/plan.json", {})
    write_json(tmp_path / "new/fork.json", {"from": str(tmp_path / "old")})
    fork = Ledger(new, "annotate")
    assert fork.completion("00000", "f") == book.completion("00000", "f")
    assert fork.completion("00001", "f") is None
    assert fork.completion("00002", "g") is None
    assert os.listdir(new / "annotations") == ["00000"]
    assert [done.shard for done in fork.completions()] == ["00000"]
    assert Ledger(new, "select").completion("00000", "f") is None


def test_what_a_fork_withdraws_is_not_taken_over_again(tmp_path: Path) -> None:
    old, new = tmp_path / "old/round-1", tmp_path / "new/round-1"
    for shard in ("00000", "00001"):
        Ledger(old, "annotate").commit(shard, "f", [output(old / f"annotations/{shard}")], tally())
    write_json(tmp_path / "new/plan.json", {})
    write_json(tmp_path / "new/fork.json", {"from": str(tmp_path / "old")})
    fork = Ledger(new, "annotate")
    assert fork.completion("00000", "f") is not None
    fork.withdraw("00000")
    assert fork.completion("00000", "f") is None, "the origin still has it"
    assert fork.begun() == {"00001"}
    fork.commit("00000", "f", [output(new / "annotations/00000")], tally())
    assert fork.completion("00000", "f") is not None
    assert os.listdir(fork.path) == ["00000.json"]
