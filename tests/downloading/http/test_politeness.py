"""The polite client before a hostile server: rates, pauses, robots.txt, redirects."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.client import HTTPMessage
from typing import Any
from urllib.parse import quote

import pytest

import capfilt
from capfilt.cluster.rate_limit import Buckets, RateLimiter
from capfilt.downloading.failures import Failure
from capfilt.downloading.http import politeness as module
from capfilt.downloading.http.client import Limits, SafeHttpClient
from capfilt.downloading.http.politeness import PoliteClient, Politeness, user_agent

REFUSED = frozenset({"noai", "noindex"})


class FakeRateLimiter:
    """A rate limiter that never makes one wait; it records which hosts were asked, and their pauses."""

    def __init__(self) -> None:
        self.hosts: list[str] = []
        self.pauses: list[tuple[str, float]] = []
        self.answers: list[tuple[float, float]] = []

    def acquire(self, name: str) -> tuple[float, float]:
        self.hosts.append(name)
        return self.answers.pop(0) if self.answers else (0.0, 0.0)

    def pause(self, name: str, seconds: float) -> None:
        self.pauses.append((name, seconds))


@pytest.fixture
def limiter() -> FakeRateLimiter:
    return FakeRateLimiter()


def polite_client(limiter: Any, robots: bool = True, **settings: Any) -> PoliteClient:
    limits = Limits(allow_private=("127.0.0.0/8",), max_bytes=10**6)
    settings = Politeness(**{"deadline": 60.0, "timeout": 30.0, **settings})
    return PoliteClient(
        SafeHttpClient(limits, user_agent("me@example.org", "capfilt")), limiter, settings, robots, REFUSED, "mybot"
    )


def kind(limiter: FakeRateLimiter, url: str, **settings: Any) -> str:
    with pytest.raises(Failure) as caught:
        polite_client(limiter, **settings).get(url)
    return caught.value.kind


def test_it_says_who_it_is(hostile: Any, limiter: FakeRateLimiter) -> None:
    assert polite_client(limiter).get(hostile.url("/ok")).status == 200
    assert {headers["user-agent"] for _, _, headers in hostile.seen} == {
        f"capfilt/{capfilt.__version__} (+me@example.org)"
    }
    assert user_agent("", "capfilt") == f"capfilt/{capfilt.__version__}"
    assert user_agent("x", "mybot") == f"capfilt/{capfilt.__version__} (+x; mybot)"


class TestRedirects:
    def test_five_are_followed(self, hostile: Any, limiter: FakeRateLimiter, hostile_kind: Any) -> None:
        assert polite_client(limiter).get(hostile.url("/hops/5")).body == hostile_kind.jpeg()
        assert kind(limiter, hostile.url("/hops/6")) == "redirects"
        assert kind(limiter, hostile.url("/loop")) == "redirects"

    def test_each_is_a_request_that_waits_for_the_rate(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        polite_client(limiter, robots=False).get(hostile.url("/hops/2"))
        assert limiter.hosts == ["127.0.0.1"] * 3

    @pytest.mark.parametrize(
        ("place", "expected"),
        [("file:///etc/passwd", "bad-url"), ("http://[::1", "bad-url"), ("", "redirects")],
    )
    def test_one_that_leads_nowhere(self, hostile: Any, limiter: FakeRateLimiter, place: str, expected: str) -> None:
        assert kind(limiter, hostile.url(f"/to?u={quote(place)}")) == expected

    def test_its_endless_body_is_not_waited_for(
        self, hostile: Any, limiter: FakeRateLimiter, hostile_kind: Any
    ) -> None:
        assert polite_client(limiter).get(hostile.url("/to?u=/ok")).body == hostile_kind.jpeg()

    def test_a_status_is_a_kind(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        assert kind(limiter, hostile.url("/status/404")) == "http-404"
        assert kind(limiter, hostile.url("/status/500")) == "http-500"
        assert kind(limiter, hostile.url("/status/304")) == "http-304"
        assert kind(limiter, hostile.url("/status/302")) == "redirects"
        assert kind(limiter, hostile.url("/status/404?x=X-Robots-Tag:%20noai")) == "http-404"


class TestRetries:
    def test_what_may_pass_is_tried_again_and_what_stays_is_not(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        assert kind(limiter, hostile.url("/status/500"), retries=2) == "http-500"
        assert kind(limiter, hostile.url("/status/404"), retries=2) == "http-404"
        assert hostile.paths() == ["/status/500"] * 3 + ["/status/404"]

    def test_all_tries_are_within_one_deadline(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        begun = time.monotonic()
        assert kind(limiter, hostile.url("/hang"), retries=100, deadline=0.6, timeout=0.2) == "timeout"
        assert time.monotonic() - begun < 20
        assert 1 < len(hostile.paths()) < 5


class TestPauses:
    def test_retry_after_is_kept_to(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        limiter.answers = [(0, 0), (0, 0), (0, 0.01)]  # robots.txt, the first try, and a pause before the second
        assert polite_client(limiter).get(hostile.url("/busy?n=1&after=1")).status == 200
        assert limiter.pauses == [("127.0.0.1", 1.0)]
        assert len(limiter.hosts) == 4

    def test_one_that_takes_too_long_is_the_end_of_one_url(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        """The host's others go on: they wait half of their time."""
        begun = time.monotonic()
        with pytest.raises(
            Failure, match=r"long-pause: 127.0.0.1 answered 429 and asks for a pause of 86400 s; it is given 30 s"
        ):
            polite_client(limiter).get(hostile.url("/busy?after=86400"))
        assert time.monotonic() - begun < 20
        assert limiter.pauses == [("127.0.0.1", 30.0)]

    def test_the_good_rows_of_a_host_outlast_it(self, hostile: Any) -> None:
        """One URL that asks for a day, then 20 pictures of the same host, from several threads, with real rates."""
        shared = polite_client(RateLimiter(buckets=Buckets(0, 1)), deadline=6, robots=False)  # type: ignore[arg-type]
        with pytest.raises(Failure, match="long-pause"):
            shared.get(hostile.url("/busy?after=86400"))
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(shared.get, [hostile.url(f"/ok?seed={i}") for i in range(20)]))
        assert {answer.status for answer in answers} == {200}

    def test_a_host_that_says_so_time_after_time_is_left_alone(
        self, hostile: Any, limiter: FakeRateLimiter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [1000.0]
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
        shared = polite_client(limiter, deadline=100, robots=False)

        def ask(path: str, seconds: float) -> None:
            with suppress(Failure):
                shared.get(hostile.url(path))
            now[0] += seconds

        for _ in range(3):
            ask("/busy?after=86400", 0)
            ask("/busy?after=86400", 51)  # sent beside the first: no further step
        ask("/busy?after=86400", 3601)
        assert [seconds for _, seconds in limiter.pauses] == [50, 50, 50, 50, 50, 50, 3600]
        ask("/ok", 0)  # any other answer, and it begins anew
        ask("/busy?after=86400", 0)
        assert limiter.pauses[-1][1] == 50

    def test_a_host_that_asked_for_a_long_pause_is_left_alone(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        limiter.answers = [(0, 500)]
        assert kind(limiter, hostile.url("/ok"), robots=False) == "paused"
        assert hostile.seen == []

    @pytest.mark.parametrize(
        ("value", "least", "most"), [("soon", 7, 7), ("-5", 7, 7), ("0", 0, 0), ("9" * 30, 1e8, 1e9), ("", 7, 7)]
    )
    def test_spellings(self, value: str, least: float, most: float) -> None:
        headers = HTTPMessage()
        headers["Retry-After"] = value
        assert least <= module._retry_after(headers, 7.0) <= most

    def test_a_date(self) -> None:
        headers = HTTPMessage()
        headers["Retry-After"] = format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
        assert 580 < module._retry_after(headers, 7.0) <= 600

    def test_503_too_and_not_for_ever(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        assert kind(limiter, hostile.url("/status/503?x=Retry-After:%200"), robots=False) == "http-503"
        assert len(hostile.paths()) == 3

    def test_a_wait_for_the_rate_does_not_count(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        limiter.answers = [(61, 0)]
        assert polite_client(limiter, robots=False).get(hostile.url("/ok")).status == 200


class TestRobots:
    def test_it_is_read_once_and_obeyed(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        hostile.robots = "User-agent: capfilt\nDisallow: /ok?seed=2"
        ours = polite_client(limiter)
        assert ours.get(hostile.url("/ok?seed=1")).status == 200
        with pytest.raises(Failure, match=r"^robots: "):
            ours.get(hostile.url("/ok?seed=2"))
        assert [path for _, path, _ in hostile.seen] == ["/robots.txt", "/ok?seed=1"]

    def test_many_threads_ask_once(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        ours = polite_client(limiter)
        threads = [threading.Thread(target=ours.get, args=(hostile.url("/ok"),)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(hostile.seen) == 9

    def test_it_holds_for_where_a_redirect_leads(
        self, hostile: Any, hostile_kind: Any, limiter: FakeRateLimiter
    ) -> None:
        other = hostile_kind.Hostile()
        other.robots = "User-agent: *\nDisallow: /"
        try:
            assert kind(limiter, hostile.url(f"/to?u={other.url('/ok')}")) == "robots"
            assert [path for _, path, _ in other.seen] == ["/robots.txt"]
        finally:
            other.close()

    def test_without_one_all_is_allowed_and_where_the_host_fails_nothing(
        self, hostile: Any, limiter: FakeRateLimiter
    ) -> None:
        hostile.robots = 403
        assert polite_client(limiter).get(hostile.url("/ok")).status == 200
        hostile.robots = 500
        assert kind(limiter, hostile.url("/ok")) == "robots"
        assert hostile.paths() == ["/ok"]
        assert kind(limiter, "http://127.0.0.1:9/ok") == "refused"

    def test_a_host_that_hangs_costs_one_deadline_not_one_a_url(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        hostile._robots = hostile._hang
        ours = polite_client(limiter, deadline=0.4)
        for _ in range(20):
            with pytest.raises(Failure, match=r"^timeout: robots\.txt"):
                ours.get(hostile.url("/ok"))
        assert [path for _, path, _ in hostile.seen] == ["/robots.txt"]

    def test_it_can_be_left_unasked(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        hostile.robots = "User-agent: *\nDisallow: /"
        assert polite_client(limiter, robots=False).get(hostile.url("/ok")).status == 200

    def test_only_so_much_of_it_is_read(self, hostile: Any, limiter: FakeRateLimiter) -> None:
        hostile.robots = "User-agent: *\nDisallow: /no\n" + "#" * 2**20 + "\nDisallow: /ok"
        assert polite_client(limiter).get(hostile.url("/ok")).status == 200


def test_the_header_refuses(hostile: Any, limiter: FakeRateLimiter) -> None:
    assert kind(limiter, hostile.url("/ok?tag=noai")) == "opt-out"
    assert (
        kind(limiter, hostile.url("/ok?tag=unavailable_after:%2025%20Jun%202030%2015:00:00%20PST,%20noindex"))
        == "opt-out"
    )
    assert kind(limiter, hostile.url("/ok?tag=all|mybot:%20noai")) == "opt-out"
    assert polite_client(limiter).get(hostile.url("/ok?tag=otherbot:%20noai")).status == 200
