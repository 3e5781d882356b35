"""How long each piece of a stage took, and what that says of the whole: start-up apart from the time of an image.

A worker's first piece is slower (memory is allocated, kernels are chosen): what it takes beyond the others is start-up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from capfilt.errors import RunError
from capfilt.pipelines.estimate.intervals import Figure, ratio
from capfilt.runs.progress import Progress
from capfilt.storage import documents
from capfilt.storage.atomic import write_json
from capfilt.storage.paths import StoragePath


@dataclass(frozen=True)
class Times:
    """When the pieces of a stage ended, in seconds since its command began."""

    pieces: list[tuple[float, int, float]]
    """Seconds that a worker was busy, samples, and the end."""
    parallel: int
    """Workers side by side."""
    took: float
    """The whole command."""

    @classmethod
    def measure(cls, work: Callable[[Progress], object], label: str, path: StoragePath, show: Progress) -> Times:
        """Run a stage and keep its times at `path`; those of an earlier command where nothing was left to do."""
        begun = time.monotonic()
        work(show)
        line, took = show.lines[label], time.monotonic() - begun
        pieces = [(busy, samples, end - begun) for busy, samples, end in line.pieces if samples]
        if line.parallel == 1:  # what the driver does between two pieces is part of their time, too
            starts = [end - busy for busy, _, end in pieces[:1]] + [end for *_, end in pieces[:-1]]
            pieces = [(end - start, samples, end) for start, (_, samples, end) in zip(starts, pieces, strict=True)]
        if pieces:
            times = cls(pieces, line.parallel, took)
            write_json(path, asdict(times))
            return times
        if not path.is_file():
            raise RunError(f"{path.parent}: {label} was done by a command that was ended; give another --out.")
        saved = documents.read_object(path)
        return cls([(one[0], one[1], one[2]) for one in saved["pieces"]], saved["parallel"], saved["took"])

    @property
    def per_image(self) -> Figure:
        """Seconds of one worker, without each worker's first piece where enough others are left."""
        return ratio([(busy, samples) for busy, samples, _ in self._sorted[self._firsts :]])

    @property
    def startup(self) -> float:
        """Seconds before, between and after the work, however much that is."""
        begun = min(end - busy for busy, _, end in self.pieces)
        excess = [busy - self.per_image.value * samples for busy, samples, _ in self._sorted[: self._firsts]]
        return begun + self.took - self._sorted[-1][2] + max([0.0, *excess])

    def whole(self, images: Figure, num_shards: int, workers: int) -> Figure:
        """Seconds for all shards: they are done in turns, and the last turn is as long as the others."""
        turns = math.ceil(num_shards / min(workers, num_shards))
        return self.per_image * images * (turns / num_shards) + self.startup

    @property
    def _sorted(self) -> list[tuple[float, int, float]]:
        return sorted(self.pieces, key=lambda piece: piece[2])

    @property
    def _firsts(self) -> int:
        return self.parallel if len(self.pieces) - self.parallel >= 2 else 0
