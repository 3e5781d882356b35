"""Progress of a run for a person: one line per stage, a bar on a terminal, plain lines elsewhere.

Everything goes to stderr: stdout is for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from capfilt.printable import MAX_MESSAGE, printable

PLAIN_EVERY = 15.0
"""Seconds between two lines of one stage where there is no terminal."""


class StageLine:
    """The line of one stage: how much of `total` is done, and a note with the newest figures."""

    def __init__(self, label: str, total: int, changed: Callable[[StageLine], None]):
        self.label, self.total = printable(label), total
        self.done_before = self.done = 0
        self.note = ""
        self._changed = changed

    def resume(self, done: int) -> None:
        """Show how much was done before this command."""
        self.done_before = done
        self.update(done, "resumed" if done else "")

    def update(self, done: int, note: str = "") -> None:
        """Show how much is done now; without a note the last one stays."""
        self.done, self.note = done, printable(note) or self.note
        self._changed(self)


class Progress:
    """Shows stages one after the other."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self.num_worked = 0
        """How many stages so far had something to do."""

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[StageLine]:
        """Show the line of a stage, which stays on the screen when the stage ends, however it ends."""
        with self._show_stage(label, total) as line:
            try:
                yield line
            finally:
                self.num_worked += line.done_before < total

    def _show_stage(self, label: str, total: int) -> AbstractContextManager[StageLine]:
        return (_bar if self.console.is_terminal and not self.quiet else _plain)(self, label, total)

    def say(self, text: str) -> None:
        """Print a line between stages."""
        self.console.print(printable(text, MAX_MESSAGE), markup=False, soft_wrap=True)


@contextmanager
def _bar(progress: Progress, label: str, total: int) -> Iterator[StageLine]:
    name = TextColumn("{task.description:<24}", markup=False)
    note = TextColumn("{task.fields[note]}", style="dim", markup=False)
    columns = (name, BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), note)
    with Bars(*columns, console=progress.console) as bars:
        task = bars.add_task(printable(label), total=total, note="")
        yield StageLine(label, total, lambda line: bars.update(task, completed=line.done, note=line.note))


@contextmanager
def _plain(progress: Progress, label: str, total: int) -> Iterator[StageLine]:
    started = printed = time.monotonic()

    def show(line: StageLine) -> None:
        nonlocal printed
        printed = time.monotonic()
        if not progress.quiet:
            text = f"{line.label:<24} {line.done}/{line.total}  {printed - started:.0f}s  {line.note}"
            print(text.rstrip(), file=sys.stderr, flush=True)  # noqa: T201 (the one place that prints to a pipe)

    line = StageLine(label, total, lambda line: show(line) if time.monotonic() - printed > PLAIN_EVERY else None)
    try:
        yield line
    finally:
        show(line)
