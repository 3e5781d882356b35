from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from capfilt.data import labels
from capfilt.errors import RunError
from capfilt.runs import quarantine, stage_status
from capfilt.runs.ledger import Ledger
from capfilt.runs.run import Run
from capfilt.storage import safe_paths
from capfilt.storage.append_log import append_line
from capfilt.storage.atomic import PART, atomic, link_or_copy, sweep
from capfilt.storage.paths import make_folder, remove_folder

LABEL = labels.Label("0" * 32, "a text", "web", "right", True)


def put(path: Path) -> None:
    with atomic(path) as file:
        file.write(b"new")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run, and beside it a folder that is nobody's business."""
    folder, outside = tmp_path / "run", tmp_path / "outside"
    (folder / "round-1").mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    (outside / "annotate").mkdir(parents=True)
    for name in ("00000.json", "annotate/00000.json", f"{PART}elsewhere-1-0", "labels.jsonl"):
        (outside / name).write_text("theirs")
        os.utime(outside / name, (0, 0))
    return folder


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


ACTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "write": ("annotations", lambda run: put(run / "annotations/00000.json")),
    "write deeper": ("round-1/ledger", lambda run: put(run / "round-1/ledger/annotate/00000.json")),
    "append": ("round-1/pretrain", lambda run: append_line(run / "round-1/pretrain/labels.jsonl", b"{}\n")),
    "append to a link": ("log.jsonl", lambda run: Run(run, {}, True).log("event")),
    "label": ("labels.jsonl", lambda run: labels.append(run, LABEL)),
    "make a folder": ("dataset", lambda run: make_folder(run / "dataset/deeper")),
    "begin a stage": (
        "ledger",
        lambda run: stage_status.write_plan(Ledger(run, "annotate"), stage_status.StagePlan("a", 1)),
    ),
    "tell of a failure": ("ledger", lambda run: stage_status.record_failure(Ledger(run, "annotate"), "00000", "why")),
    "withdraw": ("ledger", lambda run: Ledger(run, "annotate").invalidate("00000")),
    "withdraw in a linked stage": ("ledger/annotate", lambda run: Ledger(run, "annotate").invalidate("00000")),
    "list": ("ledger", lambda run: Ledger(run, "annotate").files()),
    "forget": ("poison", lambda run: quarantine.clear(Ledger(run, "annotate"), "00000")),
    "sweep": ("round-2", lambda run: sweep(run / "round-2", finished=True)),
    "remove all": ("states", lambda run: remove_folder(run / "states/annotate")),
    "take over": ("annotations", lambda run: link_or_copy(run / "plan.json", run / "annotations/00000.json")),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_link_planted_in_a_run_is_never_gone_through(run: Path, act: str) -> None:
    """However late: nothing looked at the folder before."""
    name, do = ACTS[act]
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(run.parent / "outside" / ("labels.jsonl" if name.endswith("jsonl") else ""))
    before = state(run.parent / "outside")
    with pytest.raises(RunError, match="is a link, and in a run folder none is followed"):
        do(run)
    assert state(run.parent / "outside") == before


def test_a_sweep_follows_no_link_and_leaves_files_that_are_not_temporary(run: Path) -> None:
    (run / "round-1/link").symlink_to(run.parent / "outside")
    for name in (f"{PART}foo", f"{PART}elsewhere-0-0", f"{PART}elsewhere-x-0", f"{PART}elsewhere-1-0"):
        (run / "round-1" / name).write_text("")
        os.utime(run / "round-1" / name, (0, 0))
    assert sweep(run) == 1
    assert not (run / "round-1" / f"{PART}elsewhere-1-0").exists()
    assert (run.parent / "outside" / f"{PART}elsewhere-1-0").exists()


def test_a_run_folder_may_itself_be_a_link_and_lie_below_one(run: Path) -> None:
    (run.parent / "scratch").symlink_to(run.parent)
    for way in (run.parent / "scratch/run", run.parent / "scratch/scratch/run"):
        put(way / "annotations/00000.parquet")
        append_line(way / "log.jsonl", b"{}\n")
        assert Ledger(way, "annotate").files() == []
        make_folder(way / "round-2/dataset")
        Run.load(way)
    assert (run / "log.jsonl").read_bytes() == b"{}\n" * 2


def test_a_working_directory_that_was_removed_is_no_fault_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with atomic(run / "new/file") as file:
        file.write(b"x")
    assert sweep(run) == 0
    assert (run / "new/file").read_bytes() == b"x"


def test_a_link_within_the_run_is_no_fault_of_the_run(run: Path) -> None:
    (run / "newest").symlink_to("round-1")
    Run.load(run)
    (run / "newest").unlink()
    (run / "newest").symlink_to(run.parent / "outside")
    with pytest.raises(RunError, match="newest is a link"):
        Run.load(run)


def test_a_log_with_a_second_name_is_not_written_to(run: Path) -> None:
    """A hard link of somebody's file."""
    os.link(run.parent / "outside/labels.jsonl", run / "labels.jsonl")
    with pytest.raises(RunError, match="second hard link"):
        labels.append(run, LABEL)
    assert (run.parent / "outside/labels.jsonl").read_text() == "theirs"


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a", "a/../../b", "", "..", "s3://bucket/a", "a\0b", None, 3, ["a"]]
)
def test_a_path_from_a_file_leads_down_or_nowhere(name: object) -> None:
    with pytest.raises(ValueError, match=r"leads out|is needed"):
        safe_paths.check_relative(name)
    with pytest.raises(ValueError, match=r"leads out|is needed"):
        safe_paths.check_file_name(name)


def test_a_name_from_a_file_is_one_part() -> None:
    assert safe_paths.check_relative("annotations/00000.parquet") == "annotations/00000.parquet"
    assert safe_paths.check_file_name(".metadata") == ".metadata"
    for name in ("a/b", "./a"):
        with pytest.raises(ValueError, match="a file name is needed"):
            safe_paths.check_file_name(name)
