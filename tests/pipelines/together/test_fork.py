"""--fork: a new run that takes over from another what still holds there; --retry failed: the shards with failures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from capfilt.data import shards
from capfilt.data.sample import Sample


def inode(path: Path) -> int:
    return path.stat().st_ino


def test_another_threshold_takes_over_all_but_the_verdicts(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    mine, new = finished_run.parent / "mine.yaml", tmp_path / "new"
    other = ("--set", "select.keep_rate=0.3")
    refused = capfilt("bootstrap", mine, "--out", finished_run, *other)
    assert refused.code == 1
    assert "select.keep_rate: 0.5 -> 0.3" in refused.line
    assert "--fork NEW_OUT" in refused.line
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()}
    done = capfilt("bootstrap", mine, "--out", finished_run, "--fork", new, *other)
    assert done.code == 0, done.err
    lines = {line[:24].strip(): line[24:].split() for line in done.err.splitlines() if "/" in line}
    assert {label for label, line in lines.items() if line[-1] == "resumed"} == {
        "write the world", "held-out pictures", "check held-out", "round 0 pretrain", "round 0 evaluate",
        "round 1 captioner", "round 1 filter", "round 1 annotate",
    }  # fmt: skip
    for shared in ("round-0/pretrain/checkpoint/model.safetensors", "round-1/annotations/00001.parquet"):
        assert inode(new / shared) == inode(finished_run / shared), "a link, no copy"
    assert (new / "round-1/dataset/00001.parquet").read_bytes() != (
        finished_run / "round-1/dataset/00001.parquet"
    ).read_bytes()
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*") if path.is_file()} == before
    assert capfilt("verify", new).code == 0
    again = capfilt("bootstrap", mine, "--out", new, *other)
    assert again.code == 0
    assert all("resumed" in line for line in again.err.splitlines() if "/" in line)


def test_a_fork_equals_a_run_from_scratch(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    words = ["annotate", finished_run / "data/web", "--captioner", finished_run / "round-1/captioner"]
    words += ["--filter", finished_run / "round-1/filter"]
    first = capfilt(*words, "--out", tmp_path / "a", "--seed", "3")
    assert first.code == 0, first.err
    os.unlink(tmp_path / "a/annotations/00001.parquet")  # what does not hold is not taken over
    for more in (["--out", tmp_path / "a", "--fork", tmp_path / "b"], ["--out", tmp_path / "c"]):
        done = capfilt(*words, *more, "--seed", "3")
        assert done.code == 0, done.err
    for path in (tmp_path / "c").rglob("*"):
        if path.is_file() and not path.name.endswith(("plan.jsonl", "pace.json", "usage.jsonl")):
            assert (tmp_path / "b" / path.relative_to(tmp_path / "c")).read_bytes() == path.read_bytes()
    assert inode(tmp_path / "b/annotations/00000.parquet") == inode(tmp_path / "a/annotations/00000.parquet")


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_a_fork_is_a_folder_of_its_own(finished_run: Path, capfilt: Any, where: str) -> None:
    done = capfilt(
        "bootstrap", finished_run.parent / "mine.yaml", "--out", finished_run, "--fork", finished_run / where
    )
    assert done.code == 1
    assert "a fork is a run of its own" in done.line


def test_a_fork_is_of_one_run(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    mine = finished_run.parent / "mine.yaml"
    assert capfilt("bootstrap", mine, "--out", tmp_path / "none", "--fork", tmp_path / "b").code == 2
    (tmp_path / "a").mkdir()
    (tmp_path / "a/plan.json").write_text("{}")
    done = capfilt("bootstrap", mine, "--out", finished_run, "--fork", tmp_path / "a")
    assert "is a run already, forked from no other run" in done.line
    (tmp_path / "b").mkdir()
    (tmp_path / "b/fork.json").write_text(json.dumps({"from": "/elsewhere"}))
    done = capfilt("bootstrap", mine, "--out", finished_run, "--fork", tmp_path / "b")
    assert "is a run already, forked from /elsewhere" in done.line


def test_retry_does_just_the_shards_with_failures(
    finished_run: Path, tmp_path: Path, capfilt: Any, picture: Any, snapshot: Any
) -> None:
    good = [Sample(f"g{i}", picture("PNG", seed=i), "png", "red", {}) for i in range(3)]
    shards.write(tmp_path / "web/00000.tar", good)
    shards.write(tmp_path / "web/00001.tar", [*good, Sample("x", b"no picture", "png", "red", {})])
    words = ["annotate", tmp_path / "web", "--captioner", finished_run / "round-1/captioner"]
    words += ["--filter", finished_run / "round-1/filter", "--out", tmp_path / "a"]
    assert capfilt(*words).code == 0
    before = snapshot(tmp_path / "a")
    bytes_ = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.parquet")}
    done = capfilt(*words, "--retry", "failed")
    assert done.code == 0, done.err
    after = snapshot(tmp_path / "a")
    assert {name for name in after if after[name] != before[name]} == {
        "annotations/00001.parquet", "ledger/annotate/00001.json",
    }  # fmt: skip
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.parquet")} == bytes_
    assert capfilt(*words, "--retry", "all").code == 2
    plan = json.loads((tmp_path / "a/plan.json").read_text())
    (tmp_path / "a/plan.json").write_text(json.dumps({**plan, "format": 1}))
    refused = capfilt(*words, "--retry", "failed")
    assert (refused.code, "format 1" in refused.line) == (1, True)
    assert snapshot(tmp_path / "a").keys() == after.keys(), "nothing was withdrawn"
    assert capfilt(*words[:-1], tmp_path / "new", "--retry", "failed").code == 0, "nothing to retry yet"
