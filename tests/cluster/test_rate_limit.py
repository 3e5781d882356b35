from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from capfilt.cluster.rate_limit import MAX_NAMES, Buckets, RateLimiterHandle, shared_rate_limiter
from capfilt.cluster.session import Session
from capfilt.cluster.worker_pool import Resources, run_items


class Watch:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def watch() -> Watch:
    return Watch()


class TestBuckets:
    def test_a_burst_is_free_and_then_the_rate_holds(self, watch: Watch) -> None:
        buckets = Buckets(2, 3, watch)
        waits = [wait for wait, _ in buckets.acquire(["a"] * 6)]
        assert waits == pytest.approx([0, 0, 0, 0.5, 1.0, 1.5])
        assert buckets.acquire(["b"]) == [(0.0, 0.0)], "each name has its own"
        watch.time += 10
        assert [wait for wait, _ in buckets.acquire(["a"] * 4)] == pytest.approx([0, 0, 0, 0.5])

    def test_no_rate_is_no_wait(self, watch: Watch) -> None:
        assert Buckets(0, 1, watch).acquire(["a"] * 100) == [(0.0, 0.0)] * 100

    def test_a_pause_holds_and_takes_no_turn(self, watch: Watch) -> None:
        buckets = Buckets(1, 1, watch)
        buckets.pause("a", 5)
        buckets.pause("a", 2)
        assert buckets.acquire(["a", "b"]) == [(0.0, 5.0), (0.0, 0.0)]
        watch.time += 5
        assert buckets.acquire(["a"]) == [(0.0, 0.0)]

    def test_a_pause_holds_without_a_rate(self, watch: Watch) -> None:
        buckets = Buckets(0, 1, watch)
        buckets.pause("a", 5)
        assert buckets.acquire(["a"]) == [(0.0, 5.0)]

    def test_names_without_a_claim_are_forgotten(self, watch: Watch) -> None:
        buckets = Buckets(1, 1, watch)
        for start in range(0, MAX_NAMES + 1, 1000):
            buckets.acquire([str(i) for i in range(start, start + 1000)])
        watch.time += 2
        buckets.acquire(["last"])
        assert len(buckets._due) == 1


@dataclass(frozen=True)
class Visits:
    """An item takes a number of turns at one host from several threads, and answers when each had come."""

    ticket: RateLimiterHandle
    name: str = "visits"

    def open(self) -> Callable[[str], list[float]]:
        turns = self.ticket.connect()

        def work(_: str) -> list[float]:
            times: list[float] = []

            def visit() -> None:
                wait, _ = turns.acquire("host")
                times.append(time.time() + wait)

            threads = [threading.Thread(target=visit) for _ in range(5)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return times

        return work


pytestmark = pytest.mark.usefixtures("pickled_by_value")


def test_all_workers_together_keep_to_the_rate(session: Session) -> None:
    with shared_rate_limiter(session, rate=20, burst=1) as ticket:
        done = list(run_items(session, Visits(ticket), ["a", "b"], Resources(cpus=1, workers=2)))
    times = sorted(when for end in done for when in end.result or [])
    assert len(times) == 10
    # Ten turns, the first at once, 50 ms between: whoever had a bucket of its own would need half of that.
    assert times[-1] - times[0] > 9 * 0.05 - 0.04


def test_a_pause_is_everyone_s(session: Session) -> None:
    with shared_rate_limiter(session, rate=0, burst=1) as ticket:
        turns = ticket.connect()
        turns.pause("host", 60)
        wait, pause = turns.acquire("host")
        assert wait == 0
        assert 50 < pause <= 60
        assert (ticket.connect().acquire("host")[1] > 50) is not session.local  # a local ticket has its own buckets


def test_the_buckets_end_with_their_session(ray_session: Session) -> None:
    import ray

    with shared_rate_limiter(ray_session, rate=1, burst=1) as ticket:
        turns = ticket.connect()
    with pytest.raises((ray.exceptions.RayActorError, ValueError)):
        turns.acquire("host")
