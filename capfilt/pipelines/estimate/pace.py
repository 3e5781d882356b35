"""How long each piece of a stage took, and what that says of the whole: start-up apart from the time of an image.

A worker's first piece is slower (memory is allocated, kernels are chosen): what it takes beyond the others is start-up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from capfilt.errors import RunError
from capfilt.pipelines.estimate.intervals import Figure, ratio
from capfilt.runs.progress import Progress, StageLine


@dataclass
class Times:
    """When one stage's pieces ended, in seconds since its command began."""

    pieces: list[tuple[float, int, float]] = field(default_factory=list)
    """Seconds that its worker was busy with it, its samples, and when it ended."""
    parallel: int = 1
    """Workers that were at work side by side."""
    took: float = 0.0
    """The whole command."""

    def to_json(self) -> dict[str, Any]:
        """For the estimate's folder."""
        return asdict(self)


class _Watched(StageLine):
    """A stage's line that also notes the times of its pieces; everything is handed on to the line that is shown."""

    def __init__(self, shown: StageLine, times: Times, began: float):
        super().__init__(shown.label, shown.total, lambda line: None, shown.unit)
        self._shown, self._times, self._start = shown, times, began
        self._busy, self._counted = 0.0, 0

    def resume(self, done: int, samples: Mapping[str, int] | None = None, waits_for: str = "") -> None:
        """As the line's."""
        self._counted = (samples or {}).get("in", 0)
        self.done_before = done
        self._shown.resume(done, samples, waits_for)

    def wait(self, what: str) -> None:
        """As the line's."""
        self._shown.wait(what)

    def start_clock(self, seconds_ago: float = 0.0, parallel: int = 1) -> None:
        """Called for each piece that ended, with how long it took."""
        self._busy, self._times.parallel = seconds_ago, parallel
        self._shown.start_clock(seconds_ago, parallel)

    def update(self, done: int, note: str = "", samples: Mapping[str, int] | None = None) -> None:
        """A piece ended."""
        count = (samples or {}).get("in", 0)
        if count > self._counted:
            self._times.pieces.append((self._busy, count - self._counted, time.monotonic() - self._start))
        self._counted = count
        self._shown.update(done, note, samples)


class StopWatch(Progress):
    """Shows what another progress shows, and notes the times of the stage with one label."""

    def __init__(self, shown: Progress, label: str):
        super().__init__(shown.quiet)
        self._inner, self._label = shown, label
        self.times, self._began = Times(), time.monotonic()

    @contextmanager
    def stage(self, label: str, total: int, unit: str = "") -> Iterator[StageLine]:
        """As the other's."""
        with self._inner.stage(label, total, unit) as line:
            yield _Watched(line, self.times, self._began) if label == self._label else line

    def wait(self, what: str) -> AbstractContextManager[None]:
        """As the other's."""
        return self._inner.wait(what)

    def say(self, text: str) -> None:
        """As the other's."""
        self._inner.say(text)

    def stop(self) -> Times:
        """The command has ended."""
        self.times.took = time.monotonic() - self._began
        return self.times


@dataclass(frozen=True)
class Pace:
    """What a stage takes."""

    per_image: Figure
    """Seconds of one worker."""
    startup: float
    """Seconds before and after the work, however much that is."""

    @classmethod
    def of(cls, times: Times) -> Pace:
        """From a sample's pieces. RunError where none was measured."""
        if not times.pieces:
            raise RunError("nothing of the sample was computed by this command: estimate into another --out.")
        pieces = sorted(times.pieces, key=lambda piece: piece[2])
        first = times.parallel if len(pieces) - times.parallel >= 2 else 0
        per_image = ratio([(seconds, count) for seconds, count, _ in pieces[first:]])
        excess = [seconds - per_image.value * count for seconds, count, _ in pieces[:first]]
        begun, ended = min(end - seconds for seconds, _, end in pieces), pieces[-1][2]
        return cls(per_image, begun + (times.took - ended) + max([0.0, *excess]))

    def whole(self, samples: Figure, num_shards: int, workers: int) -> Figure:
        """Seconds for all shards: the last worker takes the most of them."""
        turns = math.ceil(num_shards / min(workers, num_shards))
        work = self.per_image.times(samples, Figure(turns / num_shards, turns / num_shards, turns / num_shards))
        if work.low is None or work.high is None:
            return Figure(self.startup + work.value)
        return Figure(*(self.startup + each for each in (work.value, work.low, work.high)))
