"""Turns at something that many workers share and none may crowd, a web host say: one token bucket a name.

On Ray the buckets are an actor, which every worker asks; without Ray they are an object of this process. A
question to an actor costs a millisecond of two cores, so the questions that a worker's threads have at about
the same time travel together.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import Field

from capfilt.cluster.session import Session
from capfilt.config import Config

GATHERED = 0.1
TOGETHER = 16
"""A worker collects questions for so many seconds, or until it has so many, before it asks the actor."""
MAX_NAMES = 200_000
"""Names remembered before those without a claim are forgotten."""

Turn = tuple[float, float]
"""Seconds to wait for one's turn, and seconds of a pause; with a pause there is no turn yet: ask again after it."""


class Buckets:
    """One token bucket a name: `burst` turns at once, `rate` a second after that (0: any number)."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / rate if rate else 0.0
        self._ahead = self._interval * (burst - 1)
        self._now = now
        self._due: dict[str, float] = {}
        self._paused: dict[str, float] = {}
        self._lock = threading.Lock()

    def ask(self, names: Sequence[str]) -> list[Turn]:
        """Take a turn at each name; a name may come twice."""
        with self._lock:
            now = self._now()
            if len(self._due) + len(self._paused) > MAX_NAMES:
                self._due = {name: due for name, due in self._due.items() if due > now}
                self._paused = {name: until for name, until in self._paused.items() if until > now}
            return [self._turn(name, now) for name in names]

    def pause(self, name: str, seconds: float) -> None:
        """Give no turn at `name` for so long; of two pauses the longer holds."""
        with self._lock:
            self._paused[name] = max(self._paused.get(name, 0.0), self._now() + seconds)

    def _turn(self, name: str, now: float) -> Turn:
        pause = self._paused.get(name, now) - now
        if pause > 0:
            return 0.0, pause
        if not self._interval:
            return 0.0, 0.0
        due = max(self._due.get(name, now), now)
        self._due[name] = due + self._interval
        return max(0.0, due - now - self._ahead), 0.0


class RateLimiter:
    """Buckets as a worker's threads see them: here, or behind an actor."""

    def __init__(self, here: Buckets | None = None, actor: Any = None) -> None:
        self._here = here
        self._actor = actor
        self._lock = threading.Lock()
        self._waiting: list[_Question] = []
        self._enough = threading.Event()

    def ask(self, name: str) -> Turn:
        """Take a turn at `name`."""
        if self._here is not None:
            return self._here.ask([name])[0]
        question = _Question(name)
        with self._lock:
            self._waiting.append(question)
            count, enough = len(self._waiting), self._enough
        if count == TOGETHER:
            enough.set()
        if count == 1:
            self._lead(enough)
        question.done.wait()
        if question.error is not None:
            raise question.error
        return question.turn

    def pause(self, name: str, seconds: float) -> None:
        """Give nobody a turn at `name` for so long."""
        if self._here is not None:
            self._here.pause(name, seconds)
        else:
            import ray

            ray.get(self._actor.pause.remote(name, seconds))

    def _lead(self, enough: threading.Event) -> None:
        """Ask for everyone who has come to wait, once; whoever comes to an empty room does."""
        import ray

        enough.wait(GATHERED)
        with self._lock:
            questions, self._waiting, self._enough = self._waiting, [], threading.Event()
        try:
            turns = ray.get(self._actor.ask.remote([question.name for question in questions]))
        except BaseException as error:
            for question in questions:
                question.error = error
                question.done.set()
            raise
        for question, turn in zip(questions, turns, strict=True):
            question.turn = turn
            question.done.set()


class _Question:
    def __init__(self, name: str) -> None:
        self.name = name
        self.turn: Turn = (0.0, 0.0)
        self.error: BaseException | None = None
        self.done = threading.Event()


class Ticket(Config):
    """How a worker finds the buckets; can be pickled."""

    rate: float = Field(default=0, ge=0)
    burst: int = Field(default=1, ge=1)
    actor: str = ""
    """The actor's name, "" for buckets of the worker's own process."""

    def connect(self) -> RateLimiter:
        """Find the buckets from within a worker."""
        if not self.actor:
            return RateLimiter(here=Buckets(self.rate, self.burst))
        import ray

        return RateLimiter(actor=ray.get_actor(self.actor, namespace=self.actor))


@contextmanager
def shared_turns(session: Session, rate: float, burst: int) -> Iterator[Ticket]:
    """Open buckets for all workers of a session, and close them."""
    if session.local:
        yield Ticket(rate=rate, burst=burst)
        return
    import ray

    name = f"capfilt-turns-{uuid.uuid4().hex[:12]}"
    # Of a lost actor only the claims of the last second are lost with it: begin anew, and ask again.
    kind = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Buckets)
    actor = kind.options(name=name, namespace=name).remote(rate, burst)
    try:
        yield Ticket(rate=rate, burst=burst, actor=name)
    finally:
        ray.kill(actor, no_restart=True)
