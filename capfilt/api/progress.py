"""Progress as callbacks: each step of a stage as an event, each line between stages as a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from capfilt.printable import MAX_MESSAGE, printable
from capfilt.runs.progress import Progress, StageLine


@dataclass(frozen=True)
class ProgressEvent:
    """How far one stage is."""

    stage: str
    """Its label, such as "annotate" or "round 1 pretrain"."""
    done: int
    total: int
    """Of shards, steps or whatever else the stage counts."""
    resumed: int = 0
    """How many of `done` an earlier call had done."""
    note: str = ""
    """The newest figures, in a few words."""
    ended: bool = False
    """Whether this is the stage's last event; with `done < total` it failed or was interrupted."""


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
    def _show_stage(self, label: str, total: int) -> Iterator[StageLine]:
        def report(line: StageLine, ended: bool = False) -> None:
            if self._on_progress is not None:
                self._on_progress(ProgressEvent(line.label, line.done, line.total, line.done_before, line.note, ended))

        line = StageLine(label, total, report)
        report(line)
        try:
            yield line
        finally:
            report(line, ended=True)

    def say(self, text: str) -> None:
        """Hand on a line between stages."""
        if self._on_log is not None:
            self._on_log(printable(text, MAX_MESSAGE))


def progress_of(on_progress: OnProgress | Progress | None, on_log: OnLog | None) -> Progress:
    """What the pipelines report to; a `Progress` is itself."""
    return on_progress if isinstance(on_progress, Progress) else CallbackProgress(on_progress, on_log)
