"""Rate limits that all workers share, such as requests to a web host: one token bucket a name.

On Ray the buckets are an actor that every worker calls; without Ray they are an object of this process. A call of an
actor costs a millisecond of two cores, so the requests that the threads of a worker have at about the same time are
sent in one call.
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

BATCH_SECONDS = 0.1
BATCH_SIZE = 16
"""A worker collects requests for so many seconds, or until it has so many, before it calls the actor."""
MAX_NAMES = 200_000
"""Names that are stored before those without a pending slot or pause are dropped."""

Delay = tuple[float, float]
"""Seconds to wait before the request, and seconds of a pause, in which nothing is granted: acquire again after it."""


class Buckets:
    """One token bucket a name: `burst` requests at once, `rate` a second after that (0 = no limit)."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self._interval = 1 / rate if rate else 0.0
        self._ahead = self._interval * (burst - 1)
        self._now = now
        self._due: dict[str, float] = {}
        self._paused: dict[str, float] = {}
        self._lock = threading.Lock()

    def acquire(self, names: Sequence[str]) -> list[Delay]:
        """Take one token for each name; a name may come twice."""
        with self._lock:
            now = self._now()
            if len(self._due) + len(self._paused) > MAX_NAMES:
                self._due = {name: due for name, due in self._due.items() if due > now}
                self._paused = {name: until for name, until in self._paused.items() if until > now}
            return [self._acquire(name, now) for name in names]

    def pause(self, name: str, seconds: float) -> None:
        """Grant nothing at `name` for so long; of two pauses the longer counts."""
        with self._lock:
            self._paused[name] = max(self._paused.get(name, 0.0), self._now() + seconds)

    def _acquire(self, name: str, now: float) -> Delay:
        pause = self._paused.get(name, now) - now
        if pause > 0:
            return 0.0, pause
        if not self._interval:
            return 0.0, 0.0
        due = max(self._due.get(name, now), now)
        self._due[name] = due + self._interval
        return max(0.0, due - now - self._ahead), 0.0


class RateLimiter:
    """The buckets for the threads of one worker: in this process, or behind an actor."""

    def __init__(self, buckets: Buckets | None = None, actor: Any = None) -> None:
        self._buckets = buckets
        self._actor = actor
        self._lock = threading.Lock()
        self._waiting: list[_Request] = []
        self._batch_full = threading.Event()

    def acquire(self, name: str) -> Delay:
        """Take one token for `name`; returns how long to wait."""
        if self._buckets is not None:
            return self._buckets.acquire([name])[0]
        request = _Request(name)
        with self._lock:
            self._waiting.append(request)
            count, batch_full = len(self._waiting), self._batch_full
        if count == BATCH_SIZE:
            batch_full.set()
        if count == 1:
            self._send_batch(batch_full)
        request.done.wait()
        if request.error is not None:
            raise request.error
        return request.delay

    def pause(self, name: str, seconds: float) -> None:
        """Grant nothing at `name` to any worker for so long."""
        if self._buckets is not None:
            self._buckets.pause(name, seconds)
        else:
            import ray

            ray.get(self._actor.pause.remote(name, seconds))

    def _send_batch(self, batch_full: threading.Event) -> None:
        """Call the actor once for all threads that wait; the first one of them does."""
        import ray

        batch_full.wait(BATCH_SECONDS)
        with self._lock:
            requests, self._waiting, self._batch_full = self._waiting, [], threading.Event()
        try:
            delays = ray.get(self._actor.acquire.remote([request.name for request in requests]))
        except BaseException as error:
            for request in requests:
                request.error = error
                request.done.set()
            raise
        for request, delay in zip(requests, delays, strict=True):
            request.delay = delay
            request.done.set()


class _Request:
    def __init__(self, name: str) -> None:
        self.name = name
        self.delay: Delay = (0.0, 0.0)
        self.error: BaseException | None = None
        self.done = threading.Event()


class RateLimiterHandle(Config):
    """How a worker finds the shared buckets; can be pickled."""

    rate: float = Field(default=0, ge=0)
    burst: int = Field(default=1, ge=1)
    actor: str = ""
    """The actor's name; "" for buckets in the worker's process."""

    def connect(self) -> RateLimiter:
        if not self.actor:
            return RateLimiter(buckets=Buckets(self.rate, self.burst))
        import ray

        return RateLimiter(actor=ray.get_actor(self.actor, namespace=self.actor))


@contextmanager
def shared_rate_limiter(session: Session, rate: float, burst: int) -> Iterator[RateLimiterHandle]:
    """Open buckets for all workers of a session, for the time of the block."""
    if session.local:
        yield RateLimiterHandle(rate=rate, burst=burst)
        return
    import ray

    name = f"capfilt-rate-limit-{uuid.uuid4().hex[:12]}"
    # A restarted actor has only lost what was granted within about a second: restart it and repeat the calls.
    actor_class = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Buckets)
    actor = actor_class.options(name=name, namespace=name).remote(rate, burst)
    try:
        yield RateLimiterHandle(rate=rate, burst=burst, actor=name)
    finally:
        ray.kill(actor, no_restart=True)
