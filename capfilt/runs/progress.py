"""What a person sees while a run works: one line per stage, a bar on a terminal, plain lines elsewhere.

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


class Line:
    """The line of one stage: how much of `total` is done, and the newest figures in a few words."""

    def __init__(self, label: str, total: int, changed: Callable[[Line], None]):
        self.label, self.total = printable(label), total
        self.found = self.done = 0
        self.note = ""
        self._changed = changed

    def resume(self, done: int) -> None:
        """Say how much was done before this command."""
        self.found = done
        self.move(done, "resumed" if done else "")

    def move(self, done: int, note: str = "") -> None:
        """Say how much is done now."""
        self.done, self.note = done, printable(note) or self.note
        self._changed(self)


class Progress:
    """Shows stages one after the other."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self.worked = 0
        """Stages so far that had something to do."""

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Line]:
        """Open the line of a stage; it stays on the screen when the stage ends, however it ends."""
        with self._shown(label, total) as line:
            try:
                yield line
            finally:
                self.worked += line.found < total

    def _shown(self, label: str, total: int) -> AbstractContextManager[Line]:
        return (_bar if self.console.is_terminal and not self.quiet else _plain)(self, label, total)

    def say(self, text: str) -> None:
        """Print a line between stages."""
        self.console.print(printable(text, MAX_MESSAGE), markup=False, soft_wrap=True)


@contextmanager
def _bar(progress: Progress, label: str, total: int) -> Iterator[Line]:
    name = TextColumn("{task.description:<24}", markup=False)
    note = TextColumn("{task.fields[note]}", style="dim", markup=False)
    columns = (name, BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), note)
    with Bars(*columns, console=progress.console) as bars:
        task = bars.add_task(printable(label), total=total, note="")
        yield Line(label, total, lambda line: bars.update(task, completed=line.done, note=line.note))


@contextmanager
def _plain(progress: Progress, label: str, total: int) -> Iterator[Line]:
    begun = told = time.monotonic()

    def tell(line: Line) -> None:
        nonlocal told
        told = time.monotonic()
        if not progress.quiet:
            text = f"{line.label:<24} {line.done}/{line.total}  {told - begun:.0f}s  {line.note}"
            print(text.rstrip(), file=sys.stderr, flush=True)  # noqa: T201 (the one place that prints to a pipe)

    line = Line(label, total, lambda line: tell(line) if time.monotonic() - told > PLAIN_EVERY else None)
    try:
        yield line
    finally:
        tell(line)
