from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.runs import quarantine, stage_status
from capfilt.runs.ledger import Ledger, check_balance, fingerprint
from capfilt.runs.run import Run, fork
from capfilt.runs.tally import Tally
from capfilt.storage.atomic import PART, atomic, sha256_file, write_json
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath


def tally(num: int = 1) -> Tally:
    return Tally(samples=Counter({"in": num, "kept": num}))


def output(path: StoragePath, data: bytes = b"abc") -> StoragePath:
    with atomic(path) as file:
        file.write(data)
    return path


# ---- fingerprints ----


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
    assert "has 4 bytes, 3 were committed" in book.find_damage(done)
    path.write_bytes(b"abd")
    assert book.find_damage(done) == ""
    assert "does not have the bytes" in book.find_damage(done, hashes=True)
    path.unlink()
    assert book.completion("00000", "f") is None
    assert "is not there" in book.find_damage(done)


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
    book.invalidate("00000")
    assert book.completion("00000", "f") is None
    assert (tmp_path / "a").is_file()
    book.invalidate("00000")


def test_a_fork_takes_over_what_is_still_valid_and_only_what_is_named(tmp_path: Path) -> None:
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
    fork.invalidate("00000")
    assert fork.completion("00000", "f") is None, "the origin still has it"
    assert fork.recorded_shards() == {"00001"}
    fork.commit("00000", "f", [output(new / "annotations/00000")], tally())
    assert fork.completion("00000", "f") is not None
    assert os.listdir(fork.path) == ["00000.json"]


def test_a_ledger_on_a_store(store: RemotePath) -> None:
    ledger = Ledger(store / "run", "toy")
    stage_status.write_plan(ledger, stage_status.StagePlan("toy", 2), {"00000": "f0", "00001": "f1"})
    for shard in ("00000", "00001"):
        data = output(store / f"run/annotations/{shard}.parquet")
        ledger.commit(shard, f"f{shard[-1]}", [data], Tally.zero())
    assert ledger.completion("00001", "f1") == list(ledger.completions())[1]
    assert ledger.completion("00001", "f2") is None
    stage_status.record_failure(ledger, "00001", "no luck")
    (stand,) = map(stage_status.read_status, stage_status.find_ledgers(store / "run"))
    assert (stand.done, stand.plan.total, dict(stand.errors)) == (2, 2, {"no luck": 1})
    output(store / "run/annotations/00001.parquet", b"abd")
    assert "does not have the bytes" in ledger.find_damage(ledger.completion("00001", "f1"), hashes=True)  # type: ignore[arg-type]
    output(store / "run/annotations/00001.parquet", b"abcd")
    assert ledger.completion("00001", "f1") is None
    (store / "run/annotations/00000.parquet").unlink()
    assert ledger.completion("00000", "f0") is None
    ledger.invalidate("00000")
    assert [path.name for path in ledger.files()] == ["00001.json"]
    assert quarantine.read(ledger, "00000", "f0") == {}
    quarantine.add(ledger, "00000", "f0", 3, "why")
    assert list(quarantine.read(ledger, "00000", "f0")) == [3]


@pytest.mark.parametrize("ends", [("store", "store"), ("store", "disk"), ("disk", "store")])
def test_a_fork_takes_over_from_wherever_the_run_is(store: RemotePath, tmp_path: Path, ends: tuple[str, str]) -> None:
    old, new = ({"store": store / n, "disk": tmp_path / n}[end] for n, end in zip(("old", "new"), ends, strict=True))
    Run.open(old, "", {"verb": "toy"})
    Ledger(old, "toy").commit("00000", "f", [output(old / "a.bin")], Tally.zero())
    Run.open(fork(old, new), "", {"verb": "toy", "seed": 1})
    assert Ledger(new, "toy").completion("00000", "f") is not None
    assert (new / "a.bin").read_bytes() == b"abc"
    with pytest.raises(RunError, match="lies in"):
        fork(old, old / "new")


# ---- annotations and their verdicts ----


def balanced(kept: int, dropped: int = 0, failed: int = 0, texts: int | None = None) -> Tally:
    num = kept + dropped + failed
    made = Tally(samples=Counter({"in": num, "kept": kept, "dropped": dropped, "failed": failed}))
    made.failed.update({"no image": failed})
    made.texts["in"]["web"] = made.texts["kept"]["web"] = kept + dropped if texts is None else texts
    return made


@pytest.mark.parametrize(
    ("selected_tally", "why"),
    [
        (balanced(2, 2, 1), ""),
        (balanced(2, 1, 1), "5 samples were annotated, 4 have a verdict"),
        (balanced(2, 3, 0), "1 samples failed, 0 of them have a verdict"),
        (balanced(2, 2, 1, texts=3), "4 web texts were annotated, 3 have a verdict"),
    ],
)
def test_what_was_annotated_has_a_verdict(tmp_path: Path, selected_tally: Tally, why: str) -> None:
    annotated, selected = Ledger(tmp_path, "annotate"), Ledger(tmp_path, "select")
    for shard in ("00000", "00001"):
        annotated.commit(shard, "f", [], balanced(4, 0, 1))
    selected.commit("00000", "f", [], balanced(2, 2, 1))
    selected.commit("00001", "f", [], selected_tally)
    if why:
        with pytest.raises(RunError, match=f"shard 00001: {why}"):
            check_balance(annotated, selected, ["00000", "00001"])
    check_balance(annotated, selected, ["00000"])


def test_annotations_from_elsewhere_have_no_ledger(tmp_path: Path) -> None:
    selected = Ledger(tmp_path, "select")
    selected.commit("00000", "f", [], balanced(1))
    check_balance(Ledger(tmp_path / "elsewhere", "annotate"), selected, ["00000"])
    Ledger(tmp_path / "here", "annotate").commit("00000", "f", [], balanced(2))
    with pytest.raises(RunError, match="Nothing may get lost"):
        check_balance(Ledger(tmp_path / "here", "annotate"), selected, ["00000"])
