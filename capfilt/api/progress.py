"""Progress as callbacks: each step of a stage as an event, each line between stages as a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from capfilt.printable import MAX_MESSAGE, printable
from capfilt.runs.progress import Progress, StageLine


@dataclass(frozen=True)
class ProgressEvent:
    """How far one stage is: totals of all that is done, and rates of what this call did."""

    stage: str
    """Its label, such as "annotate" or "round 1 pretrain"."""
    done: int
    total: int
    """Of shards, steps or whatever else the stage counts."""
    resumed: int = 0
    """How many of `done` an earlier call had done."""
    note: str = ""
    """The newest figures, in a few words; before the first item is done, what the stage waits for."""
    ended: bool = False
    """Whether this is the stage's last event; with `done < total` it failed or was interrupted."""
    unit: str = ""
    """What `done` and `total` count: "shards", "steps", or "" where it is something else."""
    samples: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Samples "in", "kept", "dropped" and "failed" of all that is done, without those that are 0; empty for a stage
    that counts none."""
    seconds: float = field(default=0.0, compare=False)
    """Since this call began the stage."""
    per_second: float | None = field(default=None, compare=False)
    """Of `done`, without what was resumed; None before the first."""
    samples_per_second: float | None = field(default=None, compare=False)
    """The same of samples; None for a stage that counts none."""
    seconds_left: float | None = field(default=None, compare=False)
    """At this rate; None while too little is done to say, and at the end."""


OnProgress = Callable[[ProgressEvent], object]
"""Called with each event, in the thread that called the verb. What it raises ends the verb, as Ctrl-C does: what is
committed stays, and the same call continues from there."""

OnLog = Callable[[str], object]
"""Called with each line that the command line prints between stages."""


class CallbackProgress(Progress):
    """Shows nothing and calls back."""

    def __init__(self, on_progress: OnProgress | None, on_log: OnLog | None) -> None:
        super().__init__(quiet=True)
        self._on_progress, self._on_log = on_progress, on_log

    @contextmanager
    def _show_stage(self, label: str, total: int, unit: str) -> Iterator[StageLine]:
        def report(line: StageLine, ended: bool = False) -> None:
            if self._on_progress is not None:
                self._on_progress(_event(line, ended))

        line = StageLine(label, total, report, unit)
        report(line)
        try:
            yield line
        finally:
            report(line, ended=True)

    def say(self, text: str) -> None:
        if self._on_log is not None:
            self._on_log(printable(text, MAX_MESSAGE))


def _event(line: StageLine, ended: bool) -> ProgressEvent:
    return ProgressEvent(
        stage=line.label,
        done=line.done,
        total=line.total,
        resumed=line.done_before,
        note=f"waiting for {line.waiting}" if line.waiting else line.note,
        ended=ended,
        unit=line.unit,
        samples=dict(line.samples),
        seconds=line.seconds,
        per_second=line.per_second,
        samples_per_second=line.samples_per_second,
        seconds_left=line.seconds_left,
    )


def progress_of(on_progress: OnProgress | Progress | None, on_log: OnLog | None) -> Progress:
    """What the pipelines report to; a `Progress` is itself."""
    return on_progress if isinstance(on_progress, Progress) else CallbackProgress(on_progress, on_log)
