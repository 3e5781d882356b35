"""Progress of a run for a person: one line per stage, a bar on a terminal, plain lines elsewhere.

Everything goes to stderr: stdout is for results. Without a terminal a line is printed only when it says something new.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from capfilt.printable import MAX_MESSAGE, printable

FIRST_AFTER = 1.0
"""Seconds without a line, where there is no terminal, after which it is said what takes time."""
PLAIN_EVERY = 15.0
"""Seconds between two lines of one stage where there is no terminal."""
TICK = 0.25
"""Seconds between two looks at whether a line is due."""
ENOUGH = 5.0
"""Seconds of work before the time that is left is estimated."""
BAR, WIDE = 16, 100
"""Characters of a stage's bar, and of a terminal that has room for one."""
RESUMED = "resumed"
"""The note of a stage of which nothing was done but by earlier commands."""


def duration(seconds: float) -> str:
    """`65 s`, `12 min`, `3.5 h`."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


class StageLine:
    """How far one stage is: how much of `total` is done, what became of the samples so far, how fast it goes, and a
    note with the newest figures."""

    def __init__(self, label: str, total: int, changed: Callable[[StageLine], None], unit: str = ""):
        self.label, self.total, self.unit = printable(label), total, unit
        self.done_before = self.done = 0
        self.note = ""
        self.waiting = ""
        """What the stage waits for before its first item is done."""
        self.samples: dict[str, int] = {}
        """Samples in, kept, dropped and failed, of all that is done; empty for a stage that counts none."""
        self._changed = changed
        self._began = self._updated = time.monotonic()
        self._samples_before = 0
        self._clock: float | None = None  # when the first item of this command was begun
        self._done_at_clock = 0
        self.parallel = 1
        self._busy = 0.0  # seconds that the newest piece took its worker
        self.pieces: deque[tuple[float, int, float]] = deque(maxlen=1000)
        """The newest pieces that ended: seconds that a worker was busy, samples, and the end as time.monotonic."""

    def resume(self, done: int, samples: Mapping[str, int] | None = None, waits_for: str = "") -> None:
        """Show how much was done before this command, which counts in the totals and not in the rate, and what the rest
        waits for."""
        self.done_before = self._done_at_clock = self.done = done
        self._samples_before = (samples or {}).get("in", 0)
        self.waiting = printable(waits_for)
        self._show(RESUMED if done else "", samples)

    def wait(self, what: str) -> None:
        """Show what the stage waits for, until something is done."""
        self.waiting = printable(what)
        self._changed(self)

    def start_clock(self, seconds_ago: float = 0.0, parallel: int = 1) -> None:
        """Count the rate from what is done now, since `seconds_ago`. The first call of a stage holds.

        With `parallel` items at work side by side the first one says nothing of how long the others take: no time left
        is estimated before so many are done.
        """
        self._busy = seconds_ago
        if self._clock is None:
            self._clock, self.parallel = time.monotonic() - seconds_ago, parallel
            self._done_at_clock = self.done

    def update(self, done: int, note: str = "", samples: Mapping[str, int] | None = None) -> None:
        """Show how much is done now, and what became of the samples of all of it; what is not given stays."""
        if done != self.done:
            self._updated = time.monotonic()
            self.note = "" if self.note == RESUMED else self.note
        self.done, self.waiting = done, ""
        if samples is not None:
            self.pieces.append((self._busy, samples.get("in", 0) - self.samples.get("in", 0), time.monotonic()))
        self._show(note, samples)

    def _show(self, note: str, samples: Mapping[str, int] | None) -> None:
        self.note = printable(note) or self.note
        if samples is not None:
            self.samples = {key: count for key, count in samples.items() if count}
        self._changed(self)

    @property
    def seconds(self) -> float:
        """Since the stage began, of this command."""
        return time.monotonic() - self._began

    @property
    def per_second(self) -> float | None:
        """Items a second that this command did; None before the first."""
        return self._rate(self.done - self._done_at_clock)

    @property
    def samples_per_second(self) -> float | None:
        """Samples a second that this command did; None for a stage that counts none."""
        return self._rate(self.samples.get("in", 0) - self._samples_before)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the rest is done at this rate; None while too little is done to say, and at the end."""
        rate = self.per_second
        if rate is None or self.done >= self.total or self.done - self._done_at_clock < self.parallel:
            return None
        if self._clock is None or self._updated - self._clock < ENOUGH:
            return None
        return max(0.0, (self.total - self.done) / rate - (time.monotonic() - self._updated))

    def _rate(self, num: int) -> float | None:
        if self._clock is None or num <= 0:
            return None
        return num / max(self._updated - self._clock, 1e-3)

    def count(self) -> str:
        """`12/40 shards`."""
        return f"{self.done}/{self.total} {self.unit}".rstrip()

    def time(self) -> str:
        """`65 s, 3 min left`."""
        left = self.seconds_left
        return duration(self.seconds) + ("" if left is None else f", {duration(left)} left")

    def figures(self) -> str:
        """`1,020 of 4,000 images kept, 3 failed  12 images/s  8 done before`."""
        rate = self.samples_per_second
        speed = "" if rate is None else f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.1f} images/s"
        before = f"{self.done_before:,} done before" if 0 < self.done_before < self.done else ""
        waiting = f"waiting for {self.waiting}" if self.waiting else ""
        return "  ".join(part for part in (self._counts(), speed, before, self.note, waiting) if part)

    def _counts(self) -> str:
        if not self.samples:
            return ""
        num = {key: self.samples.get(key, 0) for key in ("in", "kept", "dropped", "failed")}
        text = f"{num['kept']:,} of {num['in']:,} images kept" if num["dropped"] else f"{num['kept']:,} images"
        return text + (f", {num['failed']:,} failed" if num["failed"] else "")


class Progress:
    """Shows stages one after the other."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self.num_worked = 0
        """How many stages so far had something to do."""
        self.lines: dict[str, StageLine] = {}
        """The newest line of each label."""
        self._last_line = time.monotonic()

    @contextmanager
    def stage(self, label: str, total: int, unit: str = "") -> Iterator[StageLine]:
        """Show the line of a stage, which stays on the screen when the stage ends, however it ends."""
        with self._show_stage(label, total, unit) as line:
            self.lines[label] = line
            try:
                yield line
            finally:
                self.num_worked += line.done_before < total

    def _show_stage(self, label: str, total: int, unit: str) -> AbstractContextManager[StageLine]:
        return (_bar if self.console.is_terminal and not self.quiet else _plain)(self, label, total, unit)

    @property
    def due(self) -> float:
        """When something must be said at the latest where there is no terminal, as time.monotonic."""
        return self._last_line + FIRST_AFTER

    def print_line(self, text: str) -> None:
        """Print a line where there is no terminal, from any thread."""
        self._last_line = time.monotonic()
        print(text, file=sys.stderr, flush=True)  # noqa: T201 (the one place that prints to a pipe)

    @contextmanager
    def wait(self, what: str) -> Iterator[None]:
        """Say what happens now, between stages, while it lasts: a line that goes away on a terminal, elsewhere one that
        stays, printed when it is due."""
        if self.quiet:
            yield
        elif self.console.is_terminal:
            with self.console.status(Text(printable(what))):
                yield
        else:
            seconds = max(0.0, self.due - time.monotonic())
            timer = threading.Timer(seconds, self.print_line, [f"{printable(what)} ..."])
            timer.daemon = True
            timer.start()
            try:
                yield
            finally:
                timer.cancel()
                timer.join()

    def say(self, text: str) -> None:
        """Print a line between stages."""
        self._last_line = time.monotonic()
        self.console.print(printable(text, MAX_MESSAGE), markup=False, soft_wrap=True)


class _LineColumn(ProgressColumn):
    """All that a terminal shows of a stage, drawn anew with every frame; what is too long is cut at its end, where the
    figures are."""

    def __init__(self, line: StageLine, bar: int):
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self._line, self._bar = line, bar

    def render(self, task: Task) -> Text:
        """The line now."""
        line, done = self._line, 0
        if line.total:
            done = min(self._bar, self._bar * line.done // line.total)
        return Text.assemble(
            f"{line.label:<24} ",
            ("━" * done, "bar.complete"),
            ("─" * (self._bar - done), "bar.back"),
            f"{' ' if self._bar else ''}{line.count()}  {line.time()}  ",
            (line.figures(), "dim"),
        )


@contextmanager
def _bar(progress: Progress, label: str, total: int, unit: str) -> Iterator[StageLine]:
    line = StageLine(label, total, lambda line: None, unit)
    with Bars(_LineColumn(line, BAR if progress.console.width >= WIDE else 0), console=progress.console) as bars:
        bars.add_task("", total=None)
        yield line


@contextmanager
def _plain(progress: Progress, label: str, total: int, unit: str) -> Iterator[StageLine]:
    if progress.quiet:
        yield StageLine(label, total, lambda line: None, unit)
        return
    printer = _PlainPrinter(progress)
    line = StageLine(label, total, printer.show_if_due, unit)
    ticker = threading.Thread(target=printer.tick, args=[line], daemon=True)
    ticker.start()
    try:
        yield line
    finally:
        printer.ended.set()
        ticker.join()
        printer.show(line)


class _PlainPrinter:
    """Prints a stage's line when one is due, every PLAIN_EVERY seconds and at its end, if it has changed."""

    def __init__(self, progress: Progress) -> None:
        self.ended = threading.Event()
        self._progress = progress
        self._lock = threading.Lock()
        self._due = progress.due
        self._printed: tuple[str, str] | None = None

    def tick(self, line: StageLine) -> None:
        """Look now and then, in a thread: a stage may say nothing for a long time."""
        while not self.ended.wait(TICK):
            self.show_if_due(line)

    def show_if_due(self, line: StageLine) -> None:
        """Print the line if it is time to."""
        if time.monotonic() > self._due:
            self.show(line)

    def show(self, line: StageLine) -> None:
        """Print the line, unless it says what was printed before."""
        with self._lock:
            now = (line.count(), line.figures())
            if now == self._printed:
                return
            self._printed, self._due = now, time.monotonic() + PLAIN_EVERY
            self._progress.print_line(f"{line.label:<24} {line.count()}  {line.time()}  {line.figures()}".rstrip())
