"""An iterator run ahead in a thread, so that batches are made while the step before them is computed.

An interpreter that ends while a thread of it is inside torch aborts, and a command that succeeded, or was asked to end,
exits with 134. An interrupt may come before whoever began a thread can close it: the interpreter closes all that run.
"""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, Generic, TypeVar
from weakref import WeakSet

T = TypeVar("T")

_running: WeakSet[Prefetched[Any]] = WeakSet()


def prefetched(items: Iterator[T], closed: threading.Event, depth: int = 2) -> Generator[T]:
    """Run an iterator in a thread, `depth` items ahead, from the first `next` on; as `Prefetched`."""
    ahead = Prefetched(items, depth, closed)
    try:
        yield from ahead
    finally:
        ahead.close()


class Prefetched(Generic[T]):
    """An iterator that runs in a thread from now on, `depth` items ahead; its exceptions arrive where its items would
    have. Whoever does not want all of it closes it."""

    def __init__(self, items: Iterator[T], depth: int = 2, closed: threading.Event | None = None):
        """`closed` is set when no more items are wanted."""
        self._items, self._closed = items, closed or threading.Event()
        self._ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
        self._end: _End | None = None
        self._thread = threading.Thread(target=self._work, daemon=True, name="loader")
        _running.add(self)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._end or self._ready.get()
        if not isinstance(item, _End):
            return item
        self._end = item
        raise item.error or StopIteration

    def close(self) -> None:
        """Stop, and wait for the item that is being made."""
        self._closed.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            for item in self._items:
                self._put(item)
                if self._closed.is_set():
                    break
            self._put(_End())
        except BaseException as error:  # noqa: BLE001 handed over, and raised where the item was expected
            self._put(_End(error))
        finally:
            if isinstance(self._items, Generator):
                self._items.close()  # here, for it may have threads of its own

    def _put(self, item: T | _End) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue


class _End:
    """The end of an iterator, and the exception that was it."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


@atexit.register
def _close_all() -> None:
    for ahead in list(_running):
        if ahead._thread.is_alive():
            ahead.close()
