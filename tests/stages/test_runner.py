from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capfilt.cluster.session import connect
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config
from capfilt.errors import DataError, RunError
from capfilt.runs import stage_status
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.tally import Tally
from capfilt.stages.runner import CommandOptions, digests, run_stage
from capfilt.storage.atomic import sha256_file


class Copies(Config):
    """Copies files, one an item; an empty one cannot be copied."""

    out: Path
    version: int = 1
    forgets: bool = False

    @property
    def name(self) -> str:
        return "copy"

    def identity(self, item: str) -> str:
        return f"{self.version}-{Path(item).stat().st_size}"

    def open(self) -> Callable[[str], str]:
        def work(item: str) -> str:
            data = Path(item).read_bytes()
            if not data:
                raise DataError(f"{item} is empty.")
            path = self.out / Path(item).name
            path.write_bytes(data)
            tally = Tally.zero()
            tally.samples.update(["in", "kept"])
            Ledger(self.out, self.name).commit(path.name, self.identity(item), [path], tally)
            if self.forgets:
                path.unlink()
            return "copied"

        return work


@pytest.fixture
def items(tmp_path: Path) -> dict[str, str]:
    for name, text in (("a", "aa"), ("b", ""), ("c", "c")):
        (tmp_path / name).write_text(text)
    (tmp_path / "out").mkdir()
    return {name: str(tmp_path / name) for name in "abc"}


def go(job: Copies, items: dict[str, str]) -> Tally:
    return run_stage(connect("local"), job, items, Resources(), Progress(quiet=True), "copy")


def test_one_failure_stops_no_other_and_is_reported_with_what_to_do(tmp_path: Path, items: dict[str, str]) -> None:
    job = Copies(out=tmp_path / "out")
    with pytest.raises(RunError) as caught:
        go(job, items)
    assert str(caught.value) == (
        f"copy: 1 of 3 failed, first {items['b']}: {items['b']} is empty."
        " What is done stays done: the same command goes on here."
    )
    assert sorted(done.shard for done in Ledger(job.out, "copy").completions()) == ["a", "c"]
    Path(items["b"]).write_text("b")
    stamps = {name: (job.out / name).stat().st_mtime_ns for name in "ac"}
    assert go(job, items).samples["kept"] == 3
    assert {name: (job.out / name).stat().st_mtime_ns for name in "ac"} == stamps


def test_a_stage_of_one_item_says_only_its_reason(tmp_path: Path, items: dict[str, str]) -> None:
    with pytest.raises(RunError, match=rf"^copy: {items['b']} is empty\. What"):
        go(Copies(out=tmp_path / "out"), {"b": items["b"]})


def test_another_fingerprint_is_another_result(tmp_path: Path, items: dict[str, str]) -> None:
    del items["b"]
    go(Copies(out=tmp_path / "out"), items)
    (tmp_path / "out/a").write_text("xx")  # of the same size: trusted
    go(Copies(out=tmp_path / "out"), items)
    assert (tmp_path / "out/a").read_text() == "xx"
    go(Copies(out=tmp_path / "out", version=2), items)
    assert (tmp_path / "out/a").read_text() == "aa"


def test_the_tally_counts_what_was_asked_and_nothing_older(tmp_path: Path, items: dict[str, str]) -> None:
    del items["b"]
    go(Copies(out=tmp_path / "out"), items)
    assert go(Copies(out=tmp_path / "out"), {"c": items["c"]}).samples["kept"] == 1


def test_an_output_that_vanishes_is_noticed(tmp_path: Path, items: dict[str, str]) -> None:
    with pytest.raises(RunError, match="a was done, but its outputs are not there"):
        go(Copies(out=tmp_path / "out", forgets=True), {"a": items["a"]})


def test_the_digests_of_what_was_made(tmp_path: Path, items: dict[str, str]) -> None:
    del items["b"]
    out = tmp_path / "out"
    assert digests(Ledger(out, "copy")) == {}
    go(Copies(out=out), items)
    assert digests(Ledger(out, "copy")) == {str(out / name): sha256_file(out / name) for name in "ac"}


def test_what_failed_is_written_down_until_it_is_done(tmp_path: Path, items: dict[str, str]) -> None:
    job = Copies(out=tmp_path / "out")
    with pytest.raises(RunError):
        go(job, items)
    ledger = Ledger(job.out, "copy")
    assert stage_status.read_failures(ledger) == {"b": f"{items['b']} is empty."}
    assert stage_status.read_plan(ledger)[0] == stage_status.StagePlan("copy", 3, 0)
    Path(items["b"]).write_text("bb")
    go(job, items)
    assert stage_status.read_failures(ledger) == {}
    assert stage_status.read_plan(ledger) == (
        stage_status.StagePlan("copy", 3, 2), {name: job.identity(item) for name, item in items.items()},
    )  # fmt: skip


def test_a_completion_that_does_not_balance_stops_the_run(tmp_path: Path, items: dict[str, str]) -> None:
    del items["b"]
    job = Copies(out=tmp_path / "out")
    go(job, items)
    path = job.out / "ledger/copy/c.json"
    path.write_text(path.read_text().replace('"in": 1', '"in": 2'))
    with pytest.raises(RunError, match=r"copy, shard c: samples: 2 in, but 1 kept .* verify --mend"):
        go(job, items)


def test_models_get_a_gpu_where_there_is_one() -> None:
    class Place:
        local = False

        def __init__(self, gpus: int):
            self.gpus = gpus

        def capacity(self, cpus: float, gpus: float) -> int:
            return int(self.gpus // gpus)

    for place, asked, given in ((Place(2), None, 1), (Place(0), None, 0), (Place(2), 0.25, 0.25), (Place(2), 0, 0)):
        assert CommandOptions(gpus=asked).resources(place).gpus == given  # type: ignore[arg-type]
    assert CommandOptions(gpus=None).resources(connect("local")).gpus == 0
