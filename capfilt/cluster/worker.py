"""The worker side of a pool: opens a job and runs its items; an actor on Ray, a plain object in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from capfilt.cluster.failures import Failure
from capfilt.cluster.session import set_threads
from capfilt.storage import write_guard

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Job(Protocol[R_co]):
    """Work that can be pickled. `open` is called once in each worker, the function it returns once for each item."""

    @property
    def name(self) -> str: ...

    def open(self) -> Callable[[str], R_co]: ...


@dataclass(frozen=True)
class ItemResult(Generic[R]):
    """The end of one item: its `result`, or one line in `error` and None."""

    item: str
    result: R | None = None
    error: str | None = None
    deaths: int = 0
    """How many workers died of it; with an `error` only."""
    seconds: float = field(default=0.0, compare=False)
    """How long its worker worked on it; with a `result` only."""


class Worker:
    """Opens a job and runs its items.

    Exceptions are returned as a Failure, so that an error of Ray itself can only mean that the worker is gone.
    """

    def __init__(self, name: str, threads: int | None = None, guards: Sequence[write_guard.WriteGuard] = ()) -> None:
        """`guards`: those of the driver, where that is another process."""
        self._name, self._begun = name, time.perf_counter()
        write_guard.activate(guards)
        if threads is not None:
            set_threads(threads)

    def __repr__(self) -> str:
        return self._name  # Ray's dashboard and logs show it

    def open(self, job: Job[Any]) -> tuple[Failure | None, float]:
        """Load what the job needs; the failure, if it fails, and the seconds since this worker began."""
        failure = None
        try:
            self._function = job.open()
        except Exception as error:  # noqa: BLE001 (it is raised in the driver)
            failure = Failure.of_exception(error)
        return failure, time.perf_counter() - self._begun

    def work(self, item: str, following: str | None = None) -> tuple[Any, Failure | None, float]:
        """The job's result for one item, or the failure instead; and the seconds it took. A job's function that has an
        `expect` is told by it which item will come after this one."""
        started = time.perf_counter()
        try:
            getattr(self._function, "expect", lambda _: None)(following)
            return self._function(item), None, time.perf_counter() - started
        except Exception as error:  # noqa: BLE001 (it becomes the item's ItemResult)
            return None, Failure.of_exception(error), time.perf_counter() - started

    def close(self) -> None:
        """Have the job's function let go of what it keeps between items, if it has a `close`."""
        getattr(self._function, "close", lambda: None)()
