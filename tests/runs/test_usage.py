from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.runs import usage
from capfilt.runs.ledger import Ledger
from capfilt.runs.usage import Meter, Usage, read_usage


class Clock:
    """A monotonic clock that a test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(usage, "time", clock)
    return clock


def lines(ledger: Ledger) -> list[dict[str, float]]:
    path = ledger.path.with_name("annotate.usage.jsonl")
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_workers_cost_from_their_beginning_to_their_end_and_are_busy_in_between(tmp_path: Path, clock: Clock) -> None:
    ledger = Ledger(tmp_path, "annotate")
    assert read_usage(ledger) is None, "nothing was measured"
    with Meter.of(ledger, cpus=2, gpus=0.5) as meter:
        meter.hold("a", ago=5)
        meter.hold("b")
        clock.now += 10
        meter.work(8)
        meter.end(1, 100)
        meter.release("a")
        meter.release("a")  # it has ended once
        clock.now += 10
        meter.work(4)  # a try that failed
    assert read_usage(ledger) == Usage(
        done=1, samples=100, busy=12, cpu_busy=24, cpu_reserved=70, gpu_busy=6, gpu_reserved=17.5
    )
    assert read_usage(ledger).samples_per_second == pytest.approx(100 / 12)  # type: ignore[union-attr]


def test_commands_add_up_whatever_size_their_workers_have_and_however_they_end(tmp_path: Path, clock: Clock) -> None:
    ledger = Ledger(tmp_path, "annotate")
    for cpus, error in ((1, None), (4, KeyboardInterrupt)):
        with suppress(KeyboardInterrupt), Meter.of(ledger, cpus, 0) as meter:
            meter.hold("a")
            clock.now += 10
            meter.work(6)
            if error:
                raise error
    with Meter.of(ledger, 1, 0):
        pass  # a rerun that has nothing to do
    assert len(lines(ledger)) == 2
    assert read_usage(ledger) == Usage(busy=12, cpu_busy=30, cpu_reserved=50)


def test_lines_are_few_and_a_killed_command_leaves_what_it_wrote(tmp_path: Path, clock: Clock) -> None:
    ledger = Ledger(tmp_path, "annotate")
    meter = Meter.of(ledger, 1, 0)
    meter.hold("a")
    for _ in range(100_000):
        clock.now += 1
        meter.work(1)
        meter.end(1, 10)
    assert 500 < len(lines(ledger)) < 700
    killed = read_usage(ledger)
    assert killed is not None
    assert 98_900 < killed.done == killed.busy == killed.cpu_reserved <= 100_000
    with (tmp_path / "ledger/annotate.usage.jsonl").open("a") as file:
        file.write('{"done": 1, "sam')  # by a machine that went down
    with Meter.of(ledger, 1, 0) as after:
        after.work(3)
    assert read_usage(ledger).busy == killed.busy + 3  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [-1, 1e300, "1", None, True, [1]])
def test_what_is_no_time_is_refused(tmp_path: Path, value: object) -> None:
    ledger = Ledger(tmp_path, "annotate")
    (tmp_path / "ledger").mkdir()
    line = dict.fromkeys(("done", "samples", "busy", "reserved", "cpus", "gpus"), 1)
    (tmp_path / "ledger/annotate.usage.jsonl").write_text(json.dumps({**line, "busy": value}) + "\n")
    with pytest.raises(RunError, match=r"annotate\.usage\.jsonl has a line without the times of workers; remove"):
        read_usage(ledger)
