from __future__ import annotations

import io

import pytest
from rich.console import Console

from capfilt.runs import progress
from capfilt.runs.progress import Progress


def test_a_pipe_gets_one_plain_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    show = Progress()
    with show.stage("round 1 annotate", 3) as line:
        line.update(1, "20 images")
        line.update(2)
    with show.stage("round 1 select", 2) as line:
        line.resume(2)
    show.say("a [line] between")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "round 1 annotate         2/3  0s  20 images\n"
        "round 1 select           2/2  0s  resumed\n"
        "a [line] between\n"
    )  # fmt: skip


def test_a_long_stage_speaks_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Progress().stage("pretrain", 100) as line:
        for step in range(1, 41):
            clock[0] += 1
            line.update(step, f"lm {step}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["16/100", "32/100", "40/100"]
    assert lines[0] == "pretrain                 16/100  16s  lm 16"


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    show = Progress(quiet=True)
    with show.stage("select", 1) as line:
        line.update(1)
    show.say("done")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar() -> None:
    screen = io.StringIO()
    show = Progress()
    show.console = Console(file=screen, force_terminal=True, width=100, highlight=False)
    with show.stage("round 1 filter", 4) as line:
        line.update(3, "itm 0.5 [sic]")
    drawn = screen.getvalue()
    assert "round 1 filter" in drawn
    assert "3/4" in drawn
    assert "itm 0.5" in drawn
    assert "━" in drawn


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
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted              1/3  0s  on it"
