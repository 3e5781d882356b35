from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from capfilt.errors import FolderError
from capfilt.runs import stage_status
from capfilt.runs.ledger import Ledger
from capfilt.runs.locking import lock
from capfilt.runs.stage_status import StagePlan


def told(run: Path, capfilt: Any) -> dict[str, Any]:
    done = capfilt("status", run, "--json")
    assert done.code == 0, done.err
    result: dict[str, Any] = json.loads(done.out)
    return result


def test_a_finished_bootstrap(finished_run: Path, capfilt: Any) -> None:
    result = told(finished_run, capfilt)
    assert result["state"] == "done: every stage that was begun"
    table = [(s["folder"], s["stage"], s["done"], s["total"], s["unit"]) for s in result["stages"]]
    assert table == [
        (".", "rows", 3, 3, "shards"),
        ("data", "world", 4, 4, "shards"),
        ("round-0", "pretrain", 4, 4, "steps"),
        ("round-0", "evaluate", 1, 1, "shards"),
        ("round-1", "captioner", 4, 4, "steps"),
        ("round-1", "filter", 4, 4, "steps"),
        ("round-1", "annotate", 3, 3, "shards"),
        ("round-1", "select", 3, 3, "shards"),
        ("round-1", "pretrain", 4, 4, "steps"),
        ("round-1", "evaluate", 1, 1, "shards"),
        ("data/held-out", "held-out", 2, 2, "shards"),
        ("data/held-out", "decontaminate-exact", 5, 5, "shards"),
        ("data/held-out", "contaminated", 1, 1, "shards"),
    ]
    annotated = result["stages"][6]
    assert annotated["label"] == "round 1 annotate"
    assert annotated["samples"] == {"in": 60, "kept": 60}
    assert annotated["per_second"] > 0
    assert annotated["seconds_left"] == 0


def test_what_a_bootstrap_used_and_what_that_costs(finished_run: Path, capfilt: Any) -> None:
    """Measured in this process, by the stages and the trainings; the machine has as many CPUs as the process."""
    result = told(finished_run, capfilt)
    used = {(stage["folder"], stage["stage"]): stage["usage"] for stage in result["stages"] if "usage" in stage}
    assert {stage["stage"] for stage in result["stages"] if "usage" not in stage} <= {"contaminated"}, (
        "no worker does it"
    )
    assert used.keys() >= {
        ("round-0", "pretrain"),
        ("round-1", "captioner"),
        ("round-1", "annotate"),
        ("data", "world"),
    }
    assert all(0 <= one["cpu_seconds"]["busy"] <= one["cpu_seconds"]["reserved"] for one in used.values())
    assert used["round-1", "annotate"]["cpu_seconds"]["busy"] > 0 < used["round-0", "pretrain"]["cpu_seconds"]["busy"]
    assert used["round-1", "annotate"]["images_per_second_per_worker"] > 0
    assert used["round-0", "pretrain"]["images_per_second_per_worker"] > 0
    assert all(one["gpu_seconds"] == {"busy": 0, "reserved": 0} for one in used.values())
    assert "cost" not in result
    summary = json.loads((finished_run / "summary.json").read_text())["usage"]
    assert summary["round-1/annotate"] == used["round-1", "annotate"]

    priced = json.loads(capfilt("status", finished_run, "--json", "--price", "cpu=3600").out)
    seconds = sum(one["cpu_seconds"]["reserved"] for one in used.values())
    assert priced["cost"]["usd"] == pytest.approx(seconds, abs=0.05 * len(used) + 0.001 * seconds)
    assert priced["cost"]["usd_expected"] == priced["cost"]["usd"], "it has ended"
    assert priced["cost"]["usd_per_million_images"] == pytest.approx(priced["cost"]["usd"] / 60 * 1e6, rel=0.01)
    kept = json.loads((finished_run / "summary.json").read_text())["rounds"][1]["kept"]
    wanted = priced["cost"]["usd"] / sum(kept.values()) * 1e6
    assert priced["cost"]["usd_per_million_kept_texts"] == pytest.approx(wanted, rel=0.01)
    said = capfilt("status", finished_run, "--price", "cpu=3600")
    assert "What the workers used" in said.out
    assert "USD so far" in said.out
    assert "GPU-seconds" not in said.out
    assert capfilt("status", finished_run, "--price", "cpus=3").code == 2


def test_commands_add_up_and_a_fork_does_not_pay_for_what_it_took_over(
    finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    words = ["annotate", finished_run / "data/web", "--captioner", finished_run / "round-1/captioner", "--filter"]
    words += [finished_run / "round-1/filter", "--json", "--price", "cpu=1"]

    def use(*more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        done = capfilt(*words, *more)
        assert done.code == 0, done.err
        record = json.loads(done.out)
        return record.get("usage", {}).get("annotate", {}), record.get("cost", {})

    first, cost = use("--out", tmp_path / "a")
    assert cost["usd"] > 0
    again, _ = use("--out", tmp_path / "a")
    assert again == first, "nothing was done"
    (tmp_path / "a/ledger/annotate/00001.json").unlink()
    more, dearer = use("--out", tmp_path / "a")
    assert more["cpu_seconds"]["reserved"] > first["cpu_seconds"]["reserved"]
    assert dearer["usd"] > cost["usd"]
    fork, nothing = use("--out", tmp_path / "a", "--fork", tmp_path / "b")
    assert (fork, nothing) == ({}, {})


def test_a_run_that_was_cut_short(run_copy: Path, capfilt: Any) -> None:
    ledger = run_copy / "round-1/ledger"
    (ledger / "annotate/00001.json").unlink()
    (ledger / "annotate/00002.json").write_text("{")
    shutil.rmtree(ledger / "pretrain")
    log = run_copy / "round-1/pretrain/log.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]) + b'{"step": 4')
    stage_status.record_failure(
        Ledger(run_copy / "round-1", "annotate"), "00001", "killed its worker 3 times: pid 17 in /tmp/x"
    )
    stage_status.record_failure(
        Ledger(run_copy / "round-1", "annotate"), "00002", "killed its worker 3 times: pid 19 in /tmp/y"
    )
    result = {(s["folder"], s["stage"]): s for s in told(run_copy, capfilt)["stages"]}
    annotated = result["round-1", "annotate"]
    assert (annotated["done"], annotated["total"]) == (1, 3)
    assert annotated["errors"] == {"killed its worker … times: pid … in …": 2}
    assert annotated["seconds_left"] is not None
    assert (result["round-1", "pretrain"]["done"], result["round-1", "pretrain"]["total"]) == (3, 4)
    assert told(run_copy, capfilt)["state"] == "stopped: the same command goes on"


def test_who_works_and_who_died(run_copy: Path, capfilt: Any) -> None:
    lock.acquire_once(run_copy)
    assert told(run_copy, capfilt)["state"] == f"working: process {os.getpid()} on {os.uname().nodename}"
    lock.release_all()
    code = (
        "import os, sys; from pathlib import Path; from capfilt.runs.locking import lock;"
        " lock.acquire_once(Path(sys.argv[1]))"
    )
    child = subprocess.Popen([sys.executable, "-c", f"{code}; os._exit(0)", str(run_copy)])
    child.wait()
    assert told(run_copy, capfilt)["state"] == (
        f"died: process {child.pid} on {os.uname().nodename} is gone; the same command goes on"
    )
    assert (run_copy / "lock-1.json").is_file(), "looking takes nothing over"


def test_completions_of_an_earlier_plan_are_none_of_it(run_copy: Path, capfilt: Any) -> None:
    stage_status.write_plan(
        Ledger(run_copy / "round-1", "annotate"), StagePlan("again", 3), {f"0000{i}": "other" for i in range(3)}
    )
    annotated = next(s for s in told(run_copy, capfilt)["stages"] if s["label"] == "again")
    assert (annotated["done"], annotated["total"]) == (0, 3)
    assert "per_second" not in annotated


def test_no_run_is_no_run(tmp_path: Path, capfilt: Any) -> None:
    done = capfilt("status", tmp_path)
    assert done.code == FolderError.exit_code == 2
    assert "is no run folder" in done.line


def test_status_loads_neither_ray_nor_torch(finished_run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from capfilt.pipelines.inspect import status, verify\n"
        "status.run(Path(sys.argv[1])); print([m for m in ('torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(finished_run)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


WATCH = (sys.executable, "-m", "capfilt", "status", "--watch", "--every", "0.2")


def until(stream: int, words: bytes) -> bytes:
    """What comes up to these words."""
    came = b""
    while words not in came:
        came += os.read(stream, 1)
    return came


def test_watching_ends_when_the_run_does(run_copy: Path) -> None:
    lock.acquire_once(run_copy)
    (run_copy / "round-1/ledger/annotate/00002.json").rename(run_copy / "later")
    watcher = subprocess.Popen([*WATCH, run_copy], stdout=subprocess.PIPE)
    assert watcher.stdout is not None
    assert b"round 1 annotate         2/3 shards" in until(watcher.stdout.fileno(), b"working")
    (run_copy / "later").rename(run_copy / "round-1/ledger/annotate/00002.json")
    assert until(watcher.stdout.fileno(), b"3/3 shards").count(b"shards") == 1, "only what went on is told"
    lock.release_all()
    said, _ = watcher.communicate(timeout=100)
    assert said.endswith(b"done: every stage that was begun\n")
    assert watcher.returncode == 0


def test_on_a_terminal_the_table_is_drawn_again_in_its_place(run_copy: Path, ignore_signals: Any) -> None:
    lock.acquire_once(run_copy)
    terminal, end = pty.openpty()
    watcher = subprocess.Popen([*WATCH, run_copy], stdout=end, preexec_fn=ignore_signals)
    os.close(end)
    until(terminal, b"round 1 annotate")
    assert b"\x1b[1A" in until(terminal, b"round 1 annotate"), "the cursor goes up"
    watcher.send_signal(signal.SIGINT)
    while watcher.poll() is None:  # a terminal holds what nobody reads
        with contextlib.suppress(OSError):
            os.read(terminal, 4096)
    os.close(terminal)
    assert watcher.returncode == 0, "leaving is no failure"
    lock.release_all()


def test_a_watcher_that_is_terminated_says_so(run_copy: Path, ignore_signals: Any) -> None:
    lock.acquire_once(run_copy)
    watcher = subprocess.Popen([*WATCH, run_copy, "--json"], stdout=subprocess.PIPE, preexec_fn=ignore_signals)
    assert watcher.stdout is not None
    assert json.loads(watcher.stdout.readline())["state"].startswith("working")
    watcher.terminate()
    watcher.communicate(timeout=100)
    assert watcher.returncode == 143
    lock.release_all()
