"""A worker as the driver sees it: at work in a pool, and idle between two pools of a session."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Task:
    """An item that is not done, and what became of it so far."""

    item: str
    deaths: int = 0
    machine_faults: int = 0  # deaths of workers that were not its fault
    timeouts: int = 0
    crashes: int = 0
    avoid: str = ""  # the worker on which it raised
    avoid_until: float = 0.0  # when that worker may have it after all, if there is no other


@dataclass
class WorkerSlot:
    """A worker as the driver sees it."""

    name: str
    actor: Any
    opened: bool = False
    kept: bool = False
    """Whether it served another job before."""
    crashed: bool = False
    """Whether an item raised something there that nobody expected."""
    calls: dict[Any, Task | None] = field(default_factory=dict)
    started: float = 0.0  # when its oldest call began, in monotonic seconds
    expected: Task | None = None
    """What its newest item was said to be followed by; it still waits, for any worker."""

    @property
    def task(self) -> Task | None:
        """The item that it works on; None while it opens the job, and while it is idle."""
        return next(iter(self.calls.values()), None)


class IdleWorkers:
    """The actors of pools that are done, kept for the next pool of the session."""

    def __init__(self) -> None:
        self._actors: list[tuple[Any, int]] = []
        self._num_named = 0

    def new_name(self) -> str:
        """The name of the next actor that is started: Ray keeps an actor's first, and its jobs come and go."""
        self._num_named += 1
        return f"worker-{self._num_named - 1}"

    def put(self, actor: Any, threads: int) -> None:
        """Keep an actor, which computes with so many threads. Its last call may still be under way."""
        actor.rest.remote()
        self._actors.append((actor, threads))

    def take(self, threads: int) -> Any:
        """An actor with as many threads, None if there is none; those with another number end, they take memory."""
        while self._actors:
            actor, its_threads = self._actors.pop()
            if its_threads == threads:
                return actor
            kill(actor)
        return None


def kill(actor: Any) -> None:
    """End an actor, in the middle of its work too."""
    import ray

    ray.kill(actor, no_restart=True)
