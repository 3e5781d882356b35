"""The stages on a real Ray: what they write does not depend on where they ran."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capfilt.models.checkpoints import store


@pytest.mark.slow
def test_a_round_on_ray_writes_what_it_wrote_in_one_process(run_copy: Path, finished_run: Path, capfilt: Any) -> None:
    """Annotate and select on actors, pretrain by two ranks under Ray Train, evaluate on an actor."""
    for name in ("annotations", "dataset", "pretrain", *(f"ledger/{s}" for s in ("annotate", "select", "pretrain"))):
        shutil.rmtree(run_copy / "round-1" / name)
    words = ["bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy, "--set", "cluster.train.workers=2"]
    done = capfilt(*words, address="start")
    assert done.code == 0, done.err
    for name in ("annotations", "dataset"):
        made = {path.name: path.read_bytes() for path in (finished_run / "round-1" / name).iterdir()}
        again = {path.name: path.read_bytes() for path in (run_copy / "round-1" / name).iterdir()}
        assert again == made
    resumed = {line.split("  ")[0] for line in done.err.splitlines() if "resumed" in line}
    assert {"round 0 pretrain", "round 1 captioner", "round 1 filter"} <= resumed
    assert not {"round 1 annotate", "round 1 select", "round 1 pretrain"} & resumed
    # Two ranks choose their hard negatives apart, so the weights are others; the steps are as many.
    assert store.load(run_copy / "round-1/pretrain/checkpoint").capabilities >= {"fuse", "decode"}
    log = [json.loads(line) for line in (run_copy / "round-1/pretrain/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    answer = json.loads((run_copy / "summary.json").read_text())["rounds"][1]
    assert answer["samples_in"] == 60 == sum(answer["samples"].values())
    assert pq.read_table(run_copy / "round-1/annotations/00000.parquet").num_rows == 40


@pytest.mark.slow
def test_a_selection_is_the_same_in_this_process_and_on_ray(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    """By size it works in this process; three workers write the same bytes, and either goes on where the other was."""
    words = ["select", finished_run / "data/web", "--annotations", finished_run / "round-1", "--keep-rate", "0.3"]
    here, there = tmp_path / "here", tmp_path / "there"
    assert "few enough for this process" in capfilt(*words, "--out", here, address=None).err
    done = capfilt(*words, "--out", there, "--workers", 2, address=None)
    assert done.code == 0, done.err
    assert "few enough" not in done.err
    names = sorted(path.relative_to(here) for path in here.rglob("*") if path.suffix in (".tar", ".parquet", ".json"))
    written = [name for name in names if not name.name.endswith("pace.json")]
    assert len(written) == 3 * 3 + 3, "of each shard a tar, verdicts, a record; sizes.json, plan.json, select.rule.json"
    assert [(here / name).read_bytes() for name in written] == [(there / name).read_bytes() for name in written]
    assert "resumed" in capfilt(*words, "--out", there, address=None).err
