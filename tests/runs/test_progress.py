from __future__ import annotations

import io
import re
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from capfilt.runs import progress
from capfilt.runs.progress import Progress, StageLine, duration


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of stages; no thread looks whether a line is due, only the stage's own updates do."""
    made = Clock()
    monkeypatch.setattr(progress.time, "monotonic", made)
    monkeypatch.setattr(progress, "TICK", 3600.0)
    return made


def line_of(total: int, changed: Callable[[StageLine], None] = lambda line: None) -> StageLine:
    return StageLine("annotate", total, changed, "shards")


# ---- what a line says ----


def test_a_pipe_gets_one_plain_line_per_short_stage(capsys: pytest.CaptureFixture[str]) -> None:
    show = Progress()
    with show.stage("round 1 annotate", 3, "shards") as line:
        line.update(1, "20 at a time")
        line.update(2)
    with show.stage("round 1 select", 2) as line:
        line.resume(2)
    show.say("a [line] between")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "round 1 annotate         2/3 shards  0 s  20 at a time\n"
        "round 1 select           2/2  0 s  resumed\n"
        "a [line] between\n"
    )  # fmt: skip


def test_samples_are_those_of_all_shards_and_not_of_the_last() -> None:
    line = line_of(4)
    line.update(1, samples={"in": 1000, "kept": 1000, "dropped": 0, "failed": 0})
    assert line.figures() == "1,000 images"
    line.update(2, samples={"in": 2000, "kept": 1990, "dropped": 0, "failed": 10})
    assert line.figures() == "1,990 images, 10 failed"
    line.update(3, samples={"in": 3000, "kept": 1200, "dropped": 1790, "failed": 10})
    assert line.figures() == "1,200 of 3,000 images kept, 10 failed"


def test_the_rate_counts_what_this_command_did(clock: Clock) -> None:
    line = line_of(100)
    line.resume(60, {"in": 600, "kept": 600})
    assert line.per_second is None
    clock.now += 30  # workers start
    clock.now += 10
    line.start_clock(seconds_ago=10)
    line.update(61, samples={"in": 610, "kept": 610})
    assert line.per_second == pytest.approx(0.1)
    assert line.samples_per_second == pytest.approx(1.0)
    assert line.seconds_left == pytest.approx(390)
    assert line.figures() == "610 images  1.0 images/s  60 done before"
    assert line.time() == "40 s, 6 min left"
    clock.now += 90  # meanwhile, until the next shard is done, it counts down
    assert line.seconds_left == pytest.approx(300)
    line.start_clock()
    clock.now += 10
    line.update(100, samples={"in": 1000, "kept": 1000})
    assert line.samples_per_second == pytest.approx(400 / 110), "the clock was started once"
    assert line.seconds_left is None


def test_nothing_is_estimated_before_it_means_something(clock: Clock) -> None:
    line = line_of(100)
    line.start_clock(parallel=4)
    clock.now += 60
    for done in (1, 2, 3):  # of four that began together
        line.update(done)
        assert line.seconds_left is None
    line.update(4)
    assert line.seconds_left == pytest.approx(24 * 60)
    quick = line_of(3)
    quick.start_clock(seconds_ago=1)
    quick.update(1)
    assert quick.per_second == pytest.approx(1)
    assert quick.seconds_left is None, "a second of work is no measure"


def test_what_is_waited_for_is_said_until_something_is_done() -> None:
    seen: list[str] = []
    line = line_of(2, lambda line: seen.append(line.figures()))
    line.wait("the models to load")
    line.update(1, "first")
    assert seen == ["waiting for the models to load", "first"]


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 119, 120, 3600, 7200, 100_000)] == [
        "0 s", "119 s", "2 min", "60 min", "2.0 h", "27.8 h",
    ]  # fmt: skip


# ---- without a terminal ----


def test_a_long_stage_speaks_now_and_then(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress().stage("pretrain", 100, "steps") as line:
        for step in range(1, 41):
            clock.now += 1
            line.update(step, f"lm {step}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["2/100", "18/100", "34/100", "40/100"]
    assert lines[1] == "pretrain                 18/100 steps  18 s  lm 18"


def test_a_line_that_says_nothing_new_is_not_repeated(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress().stage("annotate", 2, "shards") as line:
        line.wait("the models to load")
        for _ in range(10):
            clock.now += 20
            line.wait("the models to load")
        line.update(1)
        clock.now += 20
        line.update(2)
        clock.now += 20
        line.update(2)
    assert [re.sub(" +", " ", line) for line in capsys.readouterr().err.splitlines()] == [
        "annotate 0/2 shards 20 s waiting for the models to load",
        "annotate 1/2 shards 3 min",
        "annotate 2/2 shards 4 min",
    ]


def test_a_stage_that_hangs_is_announced_nevertheless(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_AFTER", 0.05)
    monkeypatch.setattr(progress, "TICK", 0.01)
    with Progress().stage("annotate", 2, "shards") as line:
        line.wait("workers to start")
        said = wait_for_output(capsys)
    assert said == "annotate                 0/2 shards  0 s  waiting for workers to start\n"
    assert capsys.readouterr().err == "", "and not again at the end"


def wait_for_output(capsys: pytest.CaptureFixture[str]) -> str:
    for _ in range(1000):
        if said := capsys.readouterr().err:
            return said
        time.sleep(0.01)
    return ""


def test_what_takes_time_between_stages_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show = Progress()
    with show.wait("starting Ray"):
        pass
    assert capsys.readouterr().err == "", "it took no time"
    monkeypatch.setattr(progress, "FIRST_AFTER", 0.01)
    with show.wait("starting Ray"):
        assert wait_for_output(capsys) == "starting Ray ...\n"
    with pytest.raises(KeyboardInterrupt), show.wait("starting Ray"):
        raise KeyboardInterrupt


def test_the_first_line_comes_in_time_though_no_step_alone_takes_long(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    show = Progress()
    with show.wait("importing libraries"):
        clock.now += 0.6
    with show.stage("annotate", 3, "shards") as line:
        line.wait("the models to load")
        assert capsys.readouterr().err == ""
        clock.now += 0.6
        line.wait("the models to load")
        assert "waiting for the models" in capsys.readouterr().err


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show = Progress(quiet=True)
    with show.wait("importing torch"), show.stage("select", 1) as line:
        line.update(1)
    show.say("done")
    assert capsys.readouterr() == ("", "")


# ---- on a terminal ----


def test_a_terminal_gets_a_bar(clock: Clock) -> None:
    screen = io.StringIO()
    show = Progress()
    show.console = Console(file=screen, force_terminal=True, width=140, highlight=False)
    with show.wait("importing torch"):
        pass
    with show.stage("round 1 filter", 4, "shards") as line:
        line.start_clock()
        clock.now += 30
        line.update(3, "itm 0.5 [sic]", {"in": 60, "kept": 57, "failed": 3})
    drawn = screen.getvalue()
    for shown in (
        *("importing torch", "round 1 filter", "3/4 shards", "30 s, 10 s left"),
        *("57 images, 3 failed", "2.0 images/s", "itm 0.5 [sic]", "━"),
    ):
        assert shown in drawn


def test_it_knows_which_stages_had_something_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    show = Progress()
    with show.stage("done before", 3) as line:
        line.resume(3)
    assert show.num_worked == 0
    with show.stage("half done", 3) as line:
        line.resume(1)
        line.update(2)
    assert show.num_worked == 1
    with pytest.raises(KeyboardInterrupt), show.stage("interrupted", 3) as line:
        line.update(1, "on it")
        raise KeyboardInterrupt
    assert show.num_worked == 2
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted              1/3  0 s  on it"
