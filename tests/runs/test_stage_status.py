from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.runs import stage_status
from capfilt.runs.ledger import Ledger
from capfilt.runs.stage_status import StagePlan
from capfilt.runs.tally import Tally


def commit(ledger: Ledger, shard: str, fingerprint: str = "f", failed: int = 0) -> None:
    samples = Counter({"in": 2, "kept": 2 - failed, "failed": failed})
    ledger.commit(
        shard, fingerprint, [], Tally(samples=samples, failed=Counter({"no image": failed} if failed else {}))
    )


def test_stages_are_found_wherever_they_lie_and_in_their_order(tmp_path: Path) -> None:
    for folder, stage in (
        ("round-10", "annotate"), ("round-2", "select"), ("round-2", "annotate"), ("data", "world"),
        ("round-2", "brand-new"), ("", "download"),
    ):  # fmt: skip
        commit(Ledger(tmp_path / folder, stage), "00000")
    stage_status.write_plan(Ledger(tmp_path / "round-2", "calibrate"), StagePlan("round 2 calibrate", 1))
    found = [(str(ledger.folder.relative_to(tmp_path)), ledger.stage) for ledger in stage_status.find_ledgers(tmp_path)]
    assert found == [
        (".", "download"), ("data", "world"), ("round-2", "calibrate"), ("round-2", "annotate"),
        ("round-2", "select"), ("round-2", "brand-new"), ("round-10", "annotate"),
    ]  # fmt: skip


def test_a_plan_reads_back(tmp_path: Path) -> None:
    ledger, plan = Ledger(tmp_path, "annotate"), StagePlan("round 1 ännotate", 2, 1)
    assert stage_status.read_plan(ledger) == (None, {})
    stage_status.write_plan(ledger, plan, {"a b": "f", "ü": "g"})
    assert stage_status.read_plan(ledger) == (plan, {"a b": "f", "ü": "g"})
    (tmp_path / "ledger/annotate.plan.jsonl").write_text("{")
    with pytest.raises(RunError, match=r"annotate\.plan\.jsonl cannot be read"):
        stage_status.read_plan(ledger)


def test_the_rate_is_what_the_newest_command_wrote_down_and_no_time_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(stage_status.time, "monotonic", lambda: now)
    ledger = Ledger(tmp_path / "run", "annotate")
    commit(ledger, "00000")
    stage_status.write_plan(ledger, StagePlan("annotate", 8, 1), {f"0000{i}": "f" for i in range(8)})
    pace = stage_status.PaceFile(ledger)
    assert stage_status.read_status(ledger).rate is None, "nothing is done yet"
    for i in (1, 2):
        now += 10
        commit(ledger, f"0000{i}", failed=1)
        pace.add(1 + i, Tally.zero())
    commit(ledger, "00003", fingerprint="of another plan")
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (50, 50))
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    for folder in ("run", "copy"):
        stand = stage_status.read_status(Ledger(tmp_path / folder, "annotate"))
        assert (stand.done, stand.rate, stand.seconds_left) == (3, 0.1, 50)
        assert stand.tally.failed == {"no image": 2}
    stage_status.write_plan(ledger, StagePlan("annotate", 8, 3))
    assert stage_status.read_status(ledger).rate is None, "another command has done nothing yet"


def test_the_pace_is_written_down_at_once_then_now_and_then_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, kept = 0.0, []
    monkeypatch.setattr(stage_status.time, "monotonic", lambda: now)
    monkeypatch.setattr(stage_status, "write_json", lambda _, pace: kept.append((pace["done"], pace["seconds"])))
    pace = stage_status.PaceFile(Ledger(tmp_path, "annotate"))
    for _ in range(10):
        now += 0.5
        pace.add(1, Tally.zero())
    pace.write(1, Tally.zero())
    pace.write(1, Tally.zero())
    assert kept == [(1, 0.5), (5, 2.5), (9, 4.5), (10, 5.0)]


def test_of_a_large_stage_the_driver_s_count_is_taken_unless_something_was_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_status, "MAX_COUNTED", 3)
    ledger = Ledger(tmp_path, "annotate")
    for i in range(3):
        commit(ledger, f"0000{i}")
    plan = {f"0000{i}": "f" for i in range(4)}
    stage_status.write_plan(ledger, StagePlan("annotate", 4), plan)
    assert stage_status.read_status(ledger).done == 3, "nothing is counted yet"
    pace = stage_status.PaceFile(ledger, 4)
    pace.add(3, ledger.total())
    counted = stage_status.read_status(ledger)
    monkeypatch.setattr(Ledger, "readable_completions", None)
    stand = stage_status.read_status(ledger)
    assert (stand.done, stand.tally) == (counted.done, counted.tally) == (3, counted.tally)
    monkeypatch.undo()
    monkeypatch.setattr(stage_status, "MAX_COUNTED", 3)
    ledger.invalidate("00001")
    assert stage_status.read_status(ledger).done == 2
    commit(ledger, "00001")
    for forged in ({"in_all": 5}, {"in_all": -1}, {"tally": 3}, {"in_all": "x"}):
        record = json.loads((tmp_path / "ledger/annotate.pace.json").read_text())
        (tmp_path / "ledger/annotate.pace.json").write_text(json.dumps({**record, **forged}))
        assert stage_status.read_status(ledger).done == 3


def test_a_training_s_rate_is_that_of_its_log(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "pretrain")
    stage_status.write_plan(ledger, StagePlan("pretrain", 100, unit="steps", log="log.jsonl"), {"model": "f"})
    assert stage_status.read_status(ledger).rate is None
    lines = [{"step": step, "step_seconds": seconds} for step, seconds in ((10, 0.25), (20, 0.75))]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 3')
    os.utime(tmp_path / "log.jsonl", (10**9, 10**9))
    stand = stage_status.read_status(ledger)
    assert (stand.done, stand.rate, stand.seconds_left) == (20, 2.0, 40)


def test_failures_are_reported_until_the_stage_begins_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "annotate")
    assert stage_status.read_failures(ledger) == {}
    stage_status.record_failure(ledger, "00000", "it broke")
    stage_status.record_failure(ledger, "00001", "it broke, too")
    with (tmp_path / "ledger/annotate.failed.jsonl").open("a") as file:
        file.write(json.dumps({"shard": "x", "error": "cut"})[:10])
    assert stage_status.read_failures(ledger) == {"00000": "it broke", "00001": "it broke, too"}
    stage_status.write_plan(ledger, StagePlan("annotate", 2))
    assert stage_status.read_failures(ledger) == {}


def test_reasons_are_counted_without_what_is_a_shard_s_own() -> None:
    assert stage_status.error_kind("reading s3://b/00001.tar failed: reset. Run again.") == stage_status.error_kind(
        "reading s3://b/00002.tar failed: reset. Run again."
    )
