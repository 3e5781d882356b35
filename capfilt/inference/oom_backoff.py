"""A batch that does not fit into memory is done in smaller pieces, and the size that fitted is remembered."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from capfilt.errors import RunError

T = TypeVar("T")

# What the CPU's allocator says; it raises a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory")


class OomBackoff:
    """Does batches in pieces of at most `limit` items; None until memory has run out."""

    def __init__(self, limit: int | None = None):
        self.limit = limit

    def run(self, work: Callable[[int, int], list[T]], count: int) -> list[T]:
        """What `work` answers for the items from `start` to `stop`, for all of `count` items.

        Raises:
            RunError: one item alone does not fit.
        """
        done: list[T] = []
        while len(done) < count:
            size = min(self.limit or count, count - len(done))
            try:
                done += work(len(done), len(done) + size)
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if size == 1:
                    raise RunError(
                        f"out of memory with one picture at a time ({_first_line(error)});"
                        " take fewer captions, a smaller model, or a machine with more memory."
                    ) from None
            # Here the exception is gone, and with it the frames that held on to memory.
            self.limit = size // 2
            logging.getLogger(__name__).warning("out of memory with %d pictures, going on with %d", size, self.limit)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return done


def out_of_memory(error: RuntimeError) -> bool:
    """Whether this is an allocator that had no more to give."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)


def _first_line(error: RuntimeError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
