"""How many pictures a GPU is given at a time where nobody said it: twice as many, as long as that is faster and fits.

A worker keeps what it found for all shards that follow. The clock decides, so two runs may have other batches.
"""

from __future__ import annotations

import logging
from statistics import median

import torch

BATCHES = 3
"""Batches of a size whose pace is taken, after a first one, which makes room and captures."""
WHOLE = 0.9
"""The share of its size that a batch must have for its pace to be taken: some pictures cannot be read."""
GAIN = 1.05
"""How many times as fast twice as many pictures must be."""
MOST = 512
"""Pictures; several such batches wait in the memory of the host."""


class BatchSize:
    """The size of the batches to come."""

    def __init__(self, size: int, grows: bool):
        self.size, self.grows, self._first = size, grows, size
        self._pace, self._paces = 0.0, list[float]()  # pictures a second: of half the size, and of this one

    def note(self, count: int, seconds: float, limit: int | None) -> None:
        """A batch of so many pictures took so long, of which `limit` at a time fit into memory; None: all do."""
        if not self.grows:
            return
        if limit is not None and limit < self.size:
            # Not below the first: memory of a shared device may come back, and so does the limit, piece by piece.
            self._settle(max(limit, self._first))
        elif count >= WHOLE * self.size:
            self._paces.append(count / seconds)
            if len(self._paces) > BATCHES:
                self._decide(median(self._paces[1:]))

    def _decide(self, pace: float) -> None:
        if pace < GAIN * self._pace:
            torch.cuda.empty_cache()  # of what twice as many took, which others may need
            self._settle(self.size // 2)
        elif 2 * self.size > MOST or not has_room():
            self._settle(self.size)
        else:
            self.size, self._pace, self._paces = 2 * self.size, pace, []

    def _settle(self, size: int) -> None:
        self.size, self.grows = size, False
        logging.getLogger(__name__).info("batches of %d pictures from now on", size)


def has_room() -> bool:
    """Whether what torch holds of the GPU now is free there once more: others who share it are to keep theirs."""
    free, _ = torch.cuda.mem_get_info()
    return bool(free >= torch.cuda.memory_reserved())
