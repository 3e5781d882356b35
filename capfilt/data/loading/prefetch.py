"""An iterator run ahead in a thread, so that batches are made while the step before them is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetched(items: Iterator[T], closed: threading.Event, depth: int = 2) -> Iterator[T]:
    """Run an iterator in a thread, `depth` items ahead; its exceptions arrive where its items would have.

    `closed` is set when no more items are wanted. Closing the generator waits for the item that is being made: an
    interpreter that ends while a thread of it is inside torch aborts, and a training that succeeded exits with 134.
    """
    ready: queue.Queue[T | _Failed | None] = queue.Queue(maxsize=depth)

    def put(item: T | _Failed | None) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 handed over, and raised where the item was expected
            put(_Failed(error))

    thread = threading.Thread(target=work, daemon=True, name="loader")
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, _Failed):
                raise item.error
            yield item
    finally:
        closed.set()
        thread.join()


class _Failed:
    """The exception that ended an iterator."""

    def __init__(self, error: BaseException):
        self.error = error
