"""The worker side of a pool: opens a job and runs its items; an actor on Ray, a plain object in this process."""

from __future__ import annotations

import gc
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

    def __init__(self, name: str, threads: int | None = None) -> None:
        self._name = name
        self._begun: float | None = time.perf_counter()
        self._function: Callable[[str], Any] | None = None
        if threads is not None:
            set_threads(threads)

    def __repr__(self) -> str:
        return self._name  # Ray's dashboard and logs show it

    def open(
        self, job: Job[Any], guards: Sequence[write_guard.WriteGuard] | None = None
    ) -> tuple[Failure | None, float]:
        """Load what the job needs, after an earlier job in its place; the failure, if it fails, and the seconds since
        this worker began or was taken again.

        `guards`: those of the driver, where that is another process.
        """
        failure, begun = None, self._begun or time.perf_counter()
        if guards is not None:
            write_guard.activate_only(guards)
        try:
            self._function = job.open()
        except Exception as error:  # noqa: BLE001 (it is raised in the driver)
            failure = Failure.of_exception(error)
        return failure, time.perf_counter() - begun

    def rest(self) -> None:
        """Let go of the job and all that it loaded: its function's `close`, if it has one, ends what it keeps between
        items. The process may be given another."""
        getattr(self._function, "close", lambda: None)()
        self._function = self._begun = None
        gc.collect()

    def work(self, item: str, following: str | None = None) -> tuple[Any, Failure | None, float]:
        """The job's result for one item, or the failure instead; and the seconds it took. A job's function that has an
        `expect` is told by it which item will come after this one."""
        assert self._function is not None, "a pool gives items to workers that have opened its job"
        started = time.perf_counter()
        try:
            getattr(self._function, "expect", lambda _: None)(following)
            return self._function(item), None, time.perf_counter() - started
        except Exception as error:  # noqa: BLE001 (it becomes the item's ItemResult)
            return None, Failure.of_exception(error), time.perf_counter() - started
