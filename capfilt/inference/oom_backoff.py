"""A batch that does not fit into memory is done in smaller pieces, and the size that fitted is remembered.

A device may be shared, so the memory of a moment is no law: after a while more is tried again, and a single item that
does not fit is tried again while a neighbour may be letting go of what it holds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from capfilt.errors import RunError, is_out_of_memory

T = TypeVar("T")

PIECES_BEFORE_GROWTH = 64
"""Pieces that must fit before twice as many items are tried; twice as many the next time."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds to wait for others who share a GPU before each further try of a single item."""


class OomBackoff:
    """Does batches in pieces of at most `limit` items, at first as many as it is given; None: until memory has run out,
    any number."""

    def __init__(self, limit: int | None = None):
        self.limit, self._most = limit, limit
        self._fitted, self._patience = 0, PIECES_BEFORE_GROWTH
        self._asked = 0  # items, at most

    @property
    def said(self) -> str:
        """What people are told where batches are done in pieces; "" where they are not, or no more."""
        if self.limit is None or self.limit >= self._asked:
            return ""
        return f"{self.limit} at a time: no more fit into memory"

    def run(self, work: Callable[[int, int], list[T]], count: int) -> list[T]:
        """What `work` answers for the items from `start` to `stop`, for all of `count` items.

        Raises:
            RunError: one item alone does not fit.
        """
        done: list[T] = []
        self._asked = max(self._asked, count)
        tries = PAUSES if torch.cuda.is_available() else ()
        pauses = iter(tries)
        while len(done) < count:
            size = min(self.limit or count, count - len(done))
            try:
                done += work(len(done), len(done) + size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                pause = next(pauses, None) if size == 1 else 0.0
                if pause is None:
                    raise RunError(
                        f"out of memory with one picture at a time ({_first_line(error)});"
                        " take fewer captions, a smaller model, or a machine with more memory."
                    ) from None
            else:
                self._fits(size)
                pauses = iter(tries)
                continue
            # Here the exception is gone, and with it the frames that held on to memory.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            time.sleep(pause)
            self._shrink(size)
        return done

    def _fits(self, size: int) -> None:
        """Take note of a piece that fitted; after many at the limit the next may be twice as large."""
        if self.limit is None or size < self.limit or self.limit == self._most:
            return
        self._fitted += 1
        if self._fitted == self._patience:
            self._fitted, self.limit = 0, min(2 * self.limit, self._most or 2 * self.limit)
            self._patience *= 2

    def _shrink(self, size: int) -> None:
        self.limit, self._fitted = max(1, size // 2), 0
        if size > 1:
            logging.getLogger(__name__).warning("out of memory with %d pictures, going on with %d", size, self.limit)


class WholeBatches(OomBackoff):
    """Does batches in pieces of a fixed size, the last one smaller: what does not fit so is an error."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def run(self, work: Callable[[int, int], list[T]], count: int) -> list[T]:
        """As `OomBackoff.run`. RunError: a piece does not fit."""
        done: list[T] = []
        try:
            while len(done) < count:
                done += work(len(done), min(len(done) + self.size, count))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(
                f"out of memory with {self.size} pictures at a time, which deterministic keeps together"
                f" ({_first_line(error)}); set a smaller batch_size."
            ) from None
        return done


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
