"""Spreads a job over workers, item by item: a plain loop in this process, or a pool of Ray actors.

A worker that dies is replaced and its item tried again, so a job must be one that may be run twice.
What crosses the border is the job, an item's name and a small result; models are loaded where they are used.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from pydantic import Field

from capfilt.cluster.session import Session, Trouble, set_threads
from capfilt.config import Config
from capfilt.errors import ClusterError
from capfilt.runs import deadline
from capfilt.storage import write_guard

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

QUEUED = 2
"""Items a worker holds: one it works on, and one so that it need not wait for the driver."""

CRASHES = 2
"""How often an item may raise what is no CapfiltError before that counts as its answer."""


ELSEWHERE = 10.0
"""Seconds that an item waits for another worker than the one on which it raised."""

AGAIN = 0.5
"""Seconds between two looks at what waits so."""

HANGS = 2
"""How often an item may take longer than its limit."""

BLAMELESS = 100
"""How often an item may lose its worker for reasons of the machine's before it is blamed after all."""


class Resources(Config):
    """What one worker of a job needs."""

    cpus: float = Field(default=1, gt=0)
    gpus: float = Field(default=0, ge=0)
    workers: int = Field(default=0, ge=0)
    """How many workers; 0 = as many as fit."""
    limit: float = Field(default=0, ge=0)
    """Seconds that an item may take; 0 = as long as it likes. On Ray its worker is ended; in this process it is ended
    by itself, where it reads on (`runs/deadline.py`)."""


class Job(Protocol[R_co]):
    """Work that can be pickled. `open` is called once in each worker, its answer once for each item."""

    @property
    def name(self) -> str: ...

    def open(self) -> Callable[[str], R_co]: ...


@dataclass(frozen=True)
class Done(Generic[R]):
    """The end of one item: `result`, or one line in `error` and None."""

    item: str
    result: R | None = None
    error: str | None = None
    deaths: int = 0
    """How many workers died of it; with an `error` only."""
    seconds: float = field(default=0.0, compare=False)
    """How long its worker worked on it; with a `result` only."""


def spread(
    session: Session,
    job: Job[R],
    items: Iterable[str],
    resources: Resources | None = None,
    tries: int = 3,
) -> Iterator[Done[R]]:
    """Run `job` on every item and yield each end once, in the order in which they come about.

    A CapfiltError of an item is its answer at once, since another try would say the same. After any other
    exception the item is tried once more, on another worker where there is one; after a worker's death,
    up to `tries` times in all, not counting those of a node that was lost or taken away. An item that takes longer
    than its limit is tried once more, by a new worker. Closing the generator early kills the workers.
    Raises ClusterError where the job cannot be opened or placed.
    """
    if session.local:
        yield from _here(job, items, resources.limit if resources else 0)
        return
    todo = list(items)
    if not todo:
        return
    needs = resources or Resources()
    pool: _Pool[R] = _Pool(job, needs, min(_size(session, job, needs), len(todo)), tries)
    try:
        yield from pool.run(todo)
    finally:
        pool.close()


def _here(job: Job[R], items: Iterable[str], limit: float) -> Iterator[Done[R]]:
    worker = Worker(job.name)
    _raise_unopened(job, worker.open(job))
    for item in items:
        with deadline.time_limit(limit):
            result, trouble, seconds = worker.work(item)
            for _ in range(CRASHES - 1):
                if trouble is not None and trouble.refusal is None:
                    result, trouble, seconds = worker.work(item)
        yield Done(item, result, trouble.line if trouble else None, seconds=seconds)


def _size(session: Session, job: Job[R], needs: Resources) -> int:
    fits = session.fits(needs.cpus, needs.gpus)
    # A number that was asked for may be one that a cluster of another's grows into; our own does not grow.
    if fits == 0 and (session.owned or not needs.workers):
        raise ClusterError(
            f"No worker of {job.name} fits: it needs {needs.cpus:g} CPUs and {needs.gpus:g} GPUs on a node. "
            "No node has them; ask for less, or add a node."
        )
    return min(needs.workers, fits) if needs.workers and session.owned else needs.workers or fits


def _raise_unopened(job: Job[R], trouble: Trouble | None) -> None:
    if trouble is None:
        return
    error = ClusterError(f"{job.name} could not be opened: {trouble.line}")
    error.add_note(trouble.trace)
    raise error


class Worker:
    """Opens a job and answers for its items; as an actor on Ray, as itself in this process.

    Exceptions go back as a Trouble, so that Ray's own errors can only mean that a worker is gone.
    """

    def __init__(self, name: str, threads: int | None = None, fences: Sequence[write_guard.WriteGuard] = ()) -> None:
        """`fences`: of the driver, where that is another process."""
        self._name = name
        write_guard.activate(fences)
        if threads is not None:
            set_threads(threads)

    def __repr__(self) -> str:
        return self._name  # what Ray's dashboard and logs show

    def open(self, job: Job[Any]) -> Trouble | None:
        """Load what the job needs."""
        try:
            self._answer = job.open()
        except Exception as error:  # noqa: BLE001 (it is raised in the driver)
            return Trouble.of(error)
        return None

    def work(self, item: str) -> tuple[Any, Trouble | None, float]:
        """The job's result for one item, or what was raised instead; and the seconds it took."""
        begun = time.perf_counter()
        try:
            return self._answer(item), None, time.perf_counter() - begun
        except Exception as error:  # noqa: BLE001 (it becomes the item's Done)
            return None, Trouble.of(error), time.perf_counter() - begun


@dataclass
class _Task:
    item: str
    deaths: int = 0
    losses: int = 0  # of workers by no fault of its own
    hangs: int = 0
    crashes: int = 0
    avoid: str = ""  # the worker on which it raised
    until: float = 0.0  # when that one may have it after all, for want of another


@dataclass
class _Seat:
    """A worker as the driver sees it."""

    name: str
    actor: Any
    opened: bool = False
    calls: dict[Any, _Task | None] = field(default_factory=dict)
    since: float = 0.0  # when its oldest call began, in monotonic seconds

    @property
    def task(self) -> _Task | None:
        """What it works on; None while it opens the job, and while it has nothing to do."""
        return next(iter(self.calls.values()), None)


class _Pool(Generic[R]):
    """A fixed number of actors and the calls under way. The dead are replaced while there is work."""

    def __init__(self, job: Job[R], needs: Resources, size: int, tries: int) -> None:
        import ray

        self._job = job
        self._size = size
        self._tries = tries
        self._limit = needs.limit
        self._left = 0
        self._threads = max(1, int(needs.cpus))
        self._kind = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=0)(Worker)
        # Names are for people, yet unique in a namespace: one for each pool, so that the next may start at 0.
        self._namespace = f"capfilt-{uuid.uuid4().hex[:12]}"
        self._hired = 0
        self._stillborn = 0
        self._seats: list[_Seat] = []
        self._waiting: deque[_Task] = deque()
        self._calls: dict[Any, _Seat] = {}

    def run(self, items: list[str]) -> Iterator[Done[R]]:
        """Yield the end of each item; every item has exactly one."""
        import ray

        self._waiting.extend(_Task(item) for item in items)
        self._left = len(items)
        for _ in range(self._size):
            self._hire()
        # Not "while there are calls": a worker for which there is no place any more would be waited for for ever.
        while self._left:
            if not self._calls:  # what is left waits for another worker than the one that is there
                time.sleep(AGAIN)
            calls = list(self._calls)
            ready = ray.wait(calls, num_returns=1, timeout=self._patience())[0] if calls else []
            ends = [self._end(self._calls[call]) for call in ready] or self._overdue()
            for done in ends:
                if done is not None:
                    self._left -= 1
                    yield done
            self._feed()

    def _end(self, seat: _Seat) -> Done[R] | None:
        # The seat's oldest call rather than the one that is ready: when a worker dies, the call that
        # waited may fail first, and its item would be blamed for what the running one did.
        call, task = next(iter(seat.calls.items()))
        if task is None:
            self._opened(seat, call)
            return None
        return self._answered(seat, task, call)

    def _patience(self) -> float | None:
        """Seconds until something may have to be done though no call ends."""
        idle = bool(self._waiting) and any(seat.opened and not seat.calls for seat in self._seats)
        times = [AGAIN] if idle else []
        if self._limit:
            running = [seat.since for seat in self._seats if seat.task]
            times.append(min(running, default=time.monotonic()) + self._limit - time.monotonic())
        return max(0.0, min(times)) if times else None

    def _overdue(self) -> list[Done[R] | None]:
        """End the workers whose item takes too long; the item has another try, with a new worker."""
        now, ends = time.monotonic(), []
        for seat in list(self._seats):
            task = seat.task
            if task is None or not self._limit or now - seat.since < self._limit:
                continue
            task.hangs += 1
            ends.append(self._vacate(seat, task, task.hangs >= HANGS, f"took longer than {self._limit:g} s, twice"))
        return ends

    def close(self) -> None:
        """Kill every worker. What it was doing is lost, as it would be by any other death."""
        for seat in self._seats:
            _kill(seat)
        self._seats.clear()
        self._calls.clear()

    def _hire(self) -> None:
        name = f"{self._job.name}-{self._hired}"
        self._hired += 1
        actor = self._kind.options(name=name, namespace=self._namespace).remote(
            name, self._threads, write_guard.active_guards()
        )
        seat = _Seat(name, actor)
        self._seats.append(seat)
        self._call(seat, actor.open.options(name=f"{self._job.name} opens").remote(self._job), None)

    def _feed(self) -> None:
        """Hand out what waits, one round at a time so that the last items do not pile up at one worker."""
        for held in range(QUEUED):
            for seat in self._seats:
                if seat.opened and len(seat.calls) <= held and (task := self._take(seat)) is not None:
                    self._call(seat, self._work(seat, task.item), task)

    def _work(self, seat: _Seat, item: str) -> Any:
        # The name is what Ray's dashboard shows: the stage and, of a path, its end.
        return seat.actor.work.options(name=f"{self._job.name} {item.rsplit('/', 1)[-1]}").remote(item)

    def _call(self, seat: _Seat, call: Any, task: _Task | None) -> None:
        if not seat.calls:
            seat.since = time.monotonic()
        seat.calls[call] = task
        self._calls[call] = seat

    def _returned(self, seat: _Seat, call: Any) -> None:
        del seat.calls[call], self._calls[call]
        seat.since = time.monotonic()

    def _take(self, seat: _Seat) -> _Task | None:
        now = time.monotonic()
        for task in self._waiting:
            if task.avoid != seat.name or self._size == 1 or now > task.until:
                self._waiting.remove(task)
                return task
        return None

    def _opened(self, seat: _Seat, call: Any) -> None:
        import ray

        try:
            trouble = ray.get(call)
        except ray.exceptions.RayTaskError as error:  # the job could not be unpickled there
            trouble = Trouble.of(error)
        except ray.exceptions.RayError as error:
            self._stillborn += 1
            if self._stillborn >= self._tries:
                raise ClusterError(
                    f"{self._job.name} could not be opened: {self._stillborn} workers in a row died of it, "
                    f"the last so: {Trouble.death(error).line}"
                ) from error
            self._replace(seat)
            return
        _raise_unopened(self._job, trouble)
        self._returned(seat, call)
        self._stillborn = 0
        seat.opened = True

    def _answered(self, seat: _Seat, task: _Task, call: Any) -> Done[R] | None:
        import ray

        try:
            result, trouble, seconds = ray.get(call)
        except ray.exceptions.RayTaskError as error:  # the result could not be pickled
            result, trouble, seconds = None, Trouble.of(error), 0.0
        except ray.exceptions.RayError as error:
            return self._died(seat, task, Trouble.death(error))
        self._returned(seat, call)
        if trouble is None:
            return Done(task.item, result, seconds=seconds)
        task.crashes += 1
        if trouble.refusal is not None or task.crashes >= CRASHES:
            return Done(task.item, error=trouble.line)
        task.avoid, task.until = seat.name, time.monotonic() + ELSEWHERE
        self._waiting.append(task)
        return None

    def _died(self, seat: _Seat, task: _Task, trouble: Trouble) -> Done[R] | None:
        """Blame the item that ran; the one behind it had no part in this."""
        if trouble.blameless and task.losses < BLAMELESS:
            task.losses += 1
        else:
            task.deaths += 1
        why = f"killed its worker {task.deaths} times, the last so: {trouble.line}"
        return self._vacate(seat, task, task.deaths >= self._tries, why)

    def _vacate(self, seat: _Seat, task: _Task, hopeless: bool, why: str) -> Done[R] | None:
        """Replace a worker; what it held goes back, but for its item where that is hopeless."""
        back = [other for other in seat.calls.values() if other and not (hopeless and other is task)]
        self._waiting.extendleft(reversed(back))
        self._replace(seat)
        return Done(task.item, error=why, deaths=task.deaths) if hopeless else None

    def _replace(self, seat: _Seat) -> None:
        self._seats.remove(seat)
        for call in list(seat.calls):
            self._returned(seat, call)
        _kill(seat)  # Ray may have lost sight of it only
        if self._waiting:
            self._hire()


def _kill(seat: _Seat) -> None:
    import ray

    ray.kill(seat.actor, no_restart=True)
