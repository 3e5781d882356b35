"""Measurements that end in time: how much a repeat takes is found while warming up, and repeats end with the time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from capfilt.runs.progress import StageLine


class TimeBox:
    """`seconds` for a warm-up and `repeats` repeats, of which a progress line tells."""

    def __init__(self, seconds: float, repeats: int, line: StageLine):
        self.seconds, self.repeats, self.line = seconds, repeats, line
        self.end = time.monotonic() + seconds

    def size(self, run: Callable[[int], float], first: int, most: int, given: int = 0) -> int:
        """How many items a repeat should have, which `run` does in the seconds that it returns. It is called with ever
        more, until they take a repeat's share of the time: for warming up, too. With a `given` number it is called with
        the first alone."""
        number, share = first, self.seconds / (self.repeats + 2)
        self.line.wait("the first images")
        run(min(first, given or first))  # modules are imported, kernels chosen: says nothing of the next
        if given:
            return given
        while True:
            self.line.wait(f"{number} images for warming up")
            took = run(number)
            if number >= most or 2 * took > share:
                return max(1, min(most, round(number * share / took)))
            number = min(most, round(number * min(8.0, share / took)))

    def repeat(self, measure: Callable[[], str]) -> None:
        """Call `measure`, which returns a note for the progress line, `repeats` times or until the time is over."""
        for number in range(1, self.repeats + 1):
            self.line.update(number, measure())
            if time.monotonic() > self.end:
                break


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The median of figures, under a name, and the smallest and the largest of them."""
    return {
        name: statistics.median(values),
        f"{name}_spread": [float(f"{end:.4g}") for end in (min(values), max(values))],
    }
