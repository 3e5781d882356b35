"""What a person sees while a run works: one line per stage, a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

PLAIN_EVERY = 15.0
"""Seconds between two lines of one stage where there is no terminal."""


class Line(Protocol):
    """The line of one stage."""

    def move(self, done: int, note: str = "") -> None:
        """Say how much of the stage's total is done, with the newest figures in a few words."""


class Progress:
    """Shows stages one after the other. Everything goes to stderr: stdout is for results."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, quiet=quiet)

    @contextmanager
    def stage(self, label: str, total: int) -> Iterator[Line]:
        """Open the line of a stage; it stays on the screen when the stage ends."""
        if not self.console.is_terminal or self.quiet:
            line = _Plain(label, total, self.quiet)
            yield line
            line.end()
            return
        columns = (TextColumn("{task.description:<24}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        with Bars(*columns, TextColumn("[dim]{task.fields[note]}"), console=self.console) as bars:
            yield _Bar(bars, label, total)

    def say(self, text: str) -> None:
        """Print a line between stages."""
        self.console.print(text, markup=False, soft_wrap=True)


class _Bar:
    def __init__(self, bars: Bars, label: str, total: int):
        self.bars = bars
        self.task = bars.add_task(label, total=total, note="")

    def move(self, done: int, note: str = "") -> None:
        self.bars.update(self.task, completed=done, **({"note": note} if note else {}))


class _Plain:
    def __init__(self, label: str, total: int, quiet: bool):
        self.label, self.total, self.quiet = label, total, quiet
        self.begun = self.told = time.monotonic()
        self.done, self.note = 0, ""

    def move(self, done: int, note: str = "") -> None:
        self.done, self.note = done, note or self.note
        if time.monotonic() - self.told > PLAIN_EVERY:
            self._tell()

    def end(self) -> None:
        self._tell()

    def _tell(self) -> None:
        self.told = time.monotonic()
        if not self.quiet:
            seconds = self.told - self.begun
            print(  # noqa: T201 (this is the one place that prints to a pipe)
                f"{self.label:<24} {self.done}/{self.total}  {seconds:.0f}s  {self.note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )
