"""Runs a job on many items: in a plain loop in this process, or on a pool of Ray actors.

A worker that dies is replaced and its item tried again, so a job must be one that may run twice. What crosses a process
border is the job, an item's name and a small result; models are loaded in the worker.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, Generic, TypeVar

from pydantic import Field

from capfilt.cluster.failures import Failure
from capfilt.cluster.session import Session, bound_threads
from capfilt.cluster.worker import ItemResult, Job, Worker
from capfilt.cluster.worker_slot import IdleWorkers, Task, WorkerSlot, kill
from capfilt.config import Config
from capfilt.errors import ClusterError
from capfilt.runs import deadline
from capfilt.runs.usage import Meter
from capfilt.storage import write_guard

R = TypeVar("R")

ITEMS_PER_WORKER = 2
"""One that it works on, and a queued one so that it need not wait for the driver."""

MAX_CRASHES = 2
"""How often an item may raise another exception than a CapfiltError; the last one is its error."""

OTHER_WORKER_SECONDS = 10.0
"""Seconds that an item waits for another worker than the one on which it raised."""

POLL_SECONDS = 0.5
"""Seconds between two checks of items that wait so."""

GROWTH_SECONDS = 10.0
"""Seconds between two looks for nodes that have joined a running cluster."""

MAX_TIMEOUTS = 2
"""How often an item may take longer than its limit; after that it failed."""

MAX_MACHINE_FAULTS = 100
"""How often an item may lose its worker by a fault of the machine; further deaths count as its own."""


class Resources(Config):
    """What one worker of a job needs."""

    cpus: float = Field(default=1, gt=0)
    """CPUs of each worker; it computes with as many threads."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of each worker; a part of one, such as 0.5, is shared."""
    workers: int = Field(default=0, ge=0)
    """How many workers; 0 = as many as fit."""
    limit: float = Field(default=0, ge=0)
    """Seconds that an item may take; 0 = no limit. On Ray its worker is ended; in this process the item ends itself
    when it next reads (`runs/deadline.py`)."""


def run_items(
    session: Session,
    job: Job[R],
    items: Iterable[str],
    resources: Resources | None = None,
    tries: int = 3,
    meter: Meter | None = None,
) -> Iterator[ItemResult[R]]:
    """Run `job` on every item and yield one ItemResult for each, in the order in which they end.

    A CapfiltError of an item is its result at once, since another try would raise it again. After any other exception
    the item is tried once more, on another worker where there is one; after a worker's death, up to `tries` times in
    all, not counting the deaths of lost or preempted nodes. An item that takes longer than its limit is tried once
    more, by a new worker. Closing the generator early kills the workers. `meter` counts what they use.

    On a Ray that this command started, workers without GPUs are kept for the next job: they have imported what takes
    longer to import than many a job takes. Nobody else asks that Ray for CPUs, so its workers reserve none, and a
    training has its place beside those that are idle.

    Where as many workers as fit were asked for, nodes that join a running cluster get workers too; and workers for
    which nothing is left are ended before the last items are, so that an autoscaler may take their nodes away.

    Raises:
        ClusterError: the job cannot be opened, or no worker fits.
    """
    meter = meter or Meter()
    if session.local:
        yield from _run_locally(job, items, resources.limit if resources else 0, meter)
        return
    waiting = list(items)
    if not waiting:
        return
    needs = resources or Resources()
    pool: _Pool[R] = _Pool(job, needs, pool_size(session, job, needs, len(waiting)), tries, meter)
    if not session.started_ray:
        pool.capacity = None if needs.workers else lambda: session.capacity(needs.cpus, needs.gpus)
    else:
        pool.reserves["num_cpus"] = 0
        pool.idle = None if needs.gpus else session.idle_workers
    try:
        yield from pool.run(waiting)
        pool.keep_workers()
    finally:
        pool.close()


def _run_locally(job: Job[R], items: Iterable[str], limit: float, meter: Meter) -> Iterator[ItemResult[R]]:
    worker = Worker(job.name)
    meter.hold(job.name)
    failure, _ = worker.open(job)
    _raise_unopened(job, failure)
    bound_threads()  # opening a job may have imported torch
    todo = list(items)
    try:
        for item, following in zip_longest(todo, todo[1:]):
            with deadline.time_limit(limit):
                ahead = None if limit else following  # what is read ahead would come under this item's limit
                result, failure, seconds = worker.work(item, ahead)
                meter.work(seconds)
                for _ in range(MAX_CRASHES - 1):
                    if failure is not None and failure.user_error is None:
                        result, failure, seconds = worker.work(item)
                        meter.work(seconds)
            yield ItemResult(item, result, failure.message if failure else None, seconds=seconds)
    finally:
        worker.rest()
    meter.release(job.name)


def pool_size(session: Session, job: Job[Any], needs: Resources, num_items: int) -> int:
    """How many workers `run_items` takes for so many items. ClusterError if none fits."""
    if session.local:
        return 1
    capacity = session.capacity(needs.cpus, needs.gpus)
    # A running cluster may grow to a requested number of workers; a Ray that this command started does not grow.
    if capacity == 0 and (session.started_ray or not needs.workers):
        raise ClusterError(
            f"No worker of {job.name} fits: it needs {needs.cpus:g} CPUs and {needs.gpus:g} GPUs on a node. "
            "No node has them; ask for less, or add a node."
        )
    size = min(needs.workers, capacity) if needs.workers and session.started_ray else needs.workers or capacity
    return min(size, num_items)


def _raise_unopened(job: Job[R], failure: Failure | None) -> None:
    if failure is None:
        return
    error = ClusterError(f"{job.name} could not be opened: {failure.message}")
    error.add_note(failure.traceback)
    raise error


class _Pool(Generic[R]):
    """A fixed number of actors and their calls. Dead actors are replaced while there is work."""

    def __init__(self, job: Job[R], needs: Resources, size: int, tries: int, meter: Meter) -> None:
        self._job = job
        self._size = size
        self._tries = tries
        self._meter = meter
        self._limit = needs.limit
        self._num_left = 0
        self._threads = max(1, int(needs.cpus))
        self.reserves = {"num_cpus": needs.cpus, "num_gpus": needs.gpus}
        # Ray wants names unique in a namespace: with one a pool, the workers of each can be numbered from 0.
        self._namespace = f"capfilt-{uuid.uuid4().hex[:12]}"
        self._num_started = 0
        self._failed_starts = 0
        self._slots: list[WorkerSlot] = []
        self._waiting: deque[Task] = deque()
        self._calls: dict[Any, WorkerSlot] = {}
        self.capacity: Callable[[], int] | None = None
        """How many workers fit now; None where their number stays as it is."""
        self._look_due = time.monotonic() + GROWTH_SECONDS
        self.idle: IdleWorkers | None = None
        """Where workers come from and go to; None where each is started for this pool and ended with it."""

    def run(self, items: list[str]) -> Iterator[ItemResult[R]]:
        """Yield exactly one result for each item."""
        import ray

        self._waiting.extend(Task(item) for item in items)
        self._num_left = len(items)
        for _ in range(self._size):
            self._start_worker()
        # Not "while there are calls": the call of a worker that can no longer be placed never ends.
        while self._num_left:
            if not self._calls:  # the remaining items wait for another worker than the only one
                time.sleep(POLL_SECONDS)
            calls = list(self._calls)
            ready = ray.wait(calls, num_returns=1, timeout=self._timeout())[0] if calls else []
            results = [self._handle(self._calls[call]) for call in ready] or self._end_overdue()
            for result in results:
                if result is not None:
                    self._num_left -= 1
                    yield result
            self._assign()
            self._grow()
            self._let_go()

    def _grow(self) -> None:
        """Start workers on nodes that have joined, if there is work for them."""
        if self.capacity is None or not self._waiting or time.monotonic() < self._look_due:
            return
        self._look_due = time.monotonic() + GROWTH_SECONDS
        more = min(self.capacity() - len(self._slots), len(self._waiting))
        for _ in range(max(0, more)):
            self._size += 1
            self._start_worker()

    def _let_go(self) -> None:
        """End the workers for which nothing is left, but for one: an item may be tried again on another worker. Those
        that are just beginning stay: Ray loses the cores of an actor that is killed in that moment."""
        if self._waiting or self.idle is not None:
            return
        for slot in [slot for slot in self._slots if slot.opened and not slot.calls][1:]:
            self._replace_worker(slot)

    def _handle(self, slot: WorkerSlot) -> ItemResult[R] | None:
        # The oldest call of the worker and not the one that is ready: when a worker dies, its queued call may fail
        # first, and that item would be blamed for the death.
        call, task = next(iter(slot.calls.items()))
        if task is None:
            self._handle_opened(slot, call)
            return None
        return self._handle_result(slot, task, call)

    def _timeout(self) -> float | None:
        """Seconds until something may have to be done although no call ends; None = never."""
        idle = bool(self._waiting) and any(slot.opened and not slot.calls for slot in self._slots)
        times = [POLL_SECONDS] if idle else []
        if self.capacity is not None and self._waiting:
            times.append(self._look_due - time.monotonic())
        if self._limit:
            running = [slot.started for slot in self._slots if slot.task]
            times.append(min(running, default=time.monotonic()) + self._limit - time.monotonic())
        return max(0.0, min(times)) if times else None

    def _end_overdue(self) -> list[ItemResult[R] | None]:
        """End the workers whose item takes too long; the item is tried again, by a new worker."""
        now, results = time.monotonic(), []
        for slot in list(self._slots):
            task = slot.task
            if task is None or not self._limit or now - slot.started < self._limit:
                continue
            task.timeouts += 1
            error = f"took longer than {self._limit:g} s, twice"
            results.append(self._replace(slot, task, task.timeouts >= MAX_TIMEOUTS, error))
        return results

    def close(self) -> None:
        """Kill every worker; what it was doing is lost."""
        for slot in self._slots:
            self._meter.release(slot.name)
            kill(slot.actor)
        self._slots.clear()
        self._calls.clear()

    def keep_workers(self) -> None:
        """Leave the workers to the next pool, but for those in which something went wrong."""
        if self.idle is None:
            return
        for slot in [slot for slot in self._slots if not slot.task and not slot.crashed]:
            self._slots.remove(slot)
            self._meter.release(slot.name)
            self.idle.put(slot.actor, self._threads)

    def _start_worker(self) -> None:
        name = f"{self._job.name}-{self._num_started}"
        self._num_started += 1
        kept = None if self.idle is None else self.idle.take(self._threads)
        actor_name = name if self.idle is None or kept else self.idle.new_name()
        slot = WorkerSlot(name, kept or self._new_actor(actor_name), kept=kept is not None)
        self._slots.append(slot)
        opening = slot.actor.open.options(name=f"{self._job.name} opens")
        self._call(slot, opening.remote(self._job, write_guard.active_guards()), None)

    def _new_actor(self, name: str) -> Any:
        import ray

        actor = ray.remote(max_restarts=0, **self.reserves)(Worker)
        return actor.options(name=name, namespace=self._namespace).remote(name, self._threads)

    def _assign(self) -> None:
        """Assign waiting items, one a worker in each round, so that the last ones do not queue up at one worker."""
        for num_assigned in range(ITEMS_PER_WORKER):
            for slot in self._slots:
                if slot.opened and len(slot.calls) <= num_assigned and (task := self._next_task(slot)) is not None:
                    self._call(slot, self._work(slot, task), task)

    def _work(self, slot: WorkerSlot, task: Task) -> Any:
        # An item that lost a worker is alone on the next one: it may have died of what was read ahead.
        slot.expected = None if task.deaths or task.machine_faults else self._candidate(slot)
        following = slot.expected.item if slot.expected else None
        name = f"{self._job.name} {task.item.rsplit('/', 1)[-1]}"  # shown by Ray's dashboard
        return slot.actor.work.options(name=name).remote(task.item, following)

    def _call(self, slot: WorkerSlot, call: Any, task: Task | None) -> None:
        if not slot.calls:
            slot.started = time.monotonic()
        slot.calls[call] = task
        self._calls[call] = slot

    def _forget_call(self, slot: WorkerSlot, call: Any) -> None:
        del slot.calls[call], self._calls[call]
        slot.started = time.monotonic()

    def _next_task(self, slot: WorkerSlot) -> Task | None:
        """The task that a worker gets now, which waits no more."""
        task = self._candidate(slot)
        slot.expected = None
        if task is not None:
            self._waiting.remove(task)
        return task

    def _candidate(self, slot: WorkerSlot) -> Task | None:
        """The waiting task that suits a worker best: what it expects, else what no other does, else any."""
        if slot.expected is not None and slot.expected in self._waiting:
            return slot.expected
        now, elsewhere, other = time.monotonic(), {id(one.expected) for one in self._slots}, None
        for task in self._waiting:
            if task.avoid != slot.name or self._size == 1 or now > task.avoid_until:
                if id(task) not in elsewhere:
                    return task
                other = other or task
        return other

    def _handle_opened(self, slot: WorkerSlot, call: Any) -> None:
        import ray

        try:
            failure, seconds = ray.get(call)
        except ray.exceptions.RayTaskError as error:  # the job could not be unpickled there
            failure, seconds = Failure.of_exception(error), 0.0
        except ray.exceptions.RayError as error:
            self._failed_starts += not slot.kept  # one that was kept may have died while it was idle
            if self._failed_starts >= self._tries:
                raise ClusterError(
                    f"{self._job.name} could not be opened: {self._failed_starts} workers in a row died of it, "
                    f"the last so: {Failure.of_death(error).message}"
                ) from error
            self._replace_worker(slot)
            return
        self._meter.hold(slot.name, seconds)
        _raise_unopened(self._job, failure)
        self._forget_call(slot, call)
        self._failed_starts = 0
        slot.opened = True

    def _handle_result(self, slot: WorkerSlot, task: Task, call: Any) -> ItemResult[R] | None:
        import ray

        try:
            result, failure, seconds = ray.get(call)
        except ray.exceptions.RayTaskError as error:  # the result could not be pickled
            result, failure, seconds = None, Failure.of_exception(error), 0.0
        except ray.exceptions.RayError as error:
            return self._handle_death(slot, task, Failure.of_death(error))
        self._forget_call(slot, call)
        self._meter.work(seconds)
        if failure is None:
            return ItemResult(task.item, result, seconds=seconds)
        task.crashes += 1
        slot.crashed |= failure.user_error is None
        if failure.user_error is not None or task.crashes >= MAX_CRASHES:
            return ItemResult(task.item, error=failure.message)
        task.avoid, task.avoid_until = slot.name, time.monotonic() + OTHER_WORKER_SECONDS
        self._waiting.append(task)
        return None

    def _handle_death(self, slot: WorkerSlot, task: Task, failure: Failure) -> ItemResult[R] | None:
        """Count the death for the item that ran, and not for the queued one."""
        if failure.machine_fault and task.machine_faults < MAX_MACHINE_FAULTS:
            task.machine_faults += 1
        else:
            task.deaths += 1
        error = f"killed its worker {task.deaths} times, the last so: {failure.message}"
        return self._replace(slot, task, task.deaths >= self._tries, error)

    def _replace(self, slot: WorkerSlot, task: Task, failed: bool, error: str) -> ItemResult[R] | None:
        """Replace a worker and put its items back, except its running one where that has `failed` for good."""
        self._meter.work(time.monotonic() - slot.started)
        back = [other for other in slot.calls.values() if other and not (failed and other is task)]
        self._waiting.extendleft(reversed(back))
        self._replace_worker(slot)
        return ItemResult(task.item, error=error, deaths=task.deaths) if failed else None

    def _replace_worker(self, slot: WorkerSlot) -> None:
        self._slots.remove(slot)
        for call in list(slot.calls):
            self._forget_call(slot, call)
        self._meter.release(slot.name)
        kill(slot.actor)  # to Ray it may only be out of reach
        if self._waiting:
            self._start_worker()
