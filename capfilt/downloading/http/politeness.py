"""A polite client of web hosts: keeps to a rate and to robots.txt, pauses when a host asks for it, follows redirects.

Every step of a redirect is a request of its own: address check, rate and robots.txt hold for the host that it leads to.
"""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPMessage
from typing import Protocol

from pydantic import Field

from capfilt import __version__
from capfilt.config import Config
from capfilt.downloading.failures import TRANSIENT, Failure
from capfilt.downloading.http.addresses import Target, parse_url
from capfilt.downloading.http.client import Deadline, Response, SafeHttpClient
from capfilt.downloading.http.robots import MAX_ROBOTS, RobotsCache, refused_directive

MAX_HOSTS = 20_000
"""Hosts whose long pauses are remembered."""
MAX_PAUSE = 3600.0
"""Seconds of a pause, at most: after that a host is asked again, whatever it said."""
NUM_PAUSES = 3
"""How often one URL waits for a busy host, and how many long pauses in a row are shortened."""
_BUSY = (429, 503)


class RateLimiter(Protocol):
    """When a host may be asked, for all workers together: capfilt/cluster/rate_limit.py."""

    def acquire(self, name: str) -> tuple[float, float]: ...

    def pause(self, name: str, seconds: float) -> None: ...


class Politeness(Config):
    """How hosts are asked. None of it decides what a picture looks like, so a resumed run may ask otherwise."""

    timeout: float = Field(default=10, gt=0)
    """Seconds for a single wait: to connect, for the next bytes."""
    deadline: float = Field(default=30, gt=0)
    """Seconds for one URL in all: redirects, further tries and pauses that the host asks for included."""
    retries: int = Field(default=0, ge=0)
    """Further tries after a failure that may not last: no connection, a timeout, a 500."""
    host_rate: float = Field(default=10, ge=0)
    """Requests a second to one host, from all workers together; 0 = any number."""
    host_burst: int = Field(default=10, ge=1)
    """Requests to one host at once, before the rate holds."""
    contact: str = Field(default="", pattern=r"^[ -~]*$", max_length=200)
    """A page or an address for people who wonder who is asking; every host sees it."""


def user_agent(contact: str, token: str) -> str:
    comments = [f"+{contact}"] if contact else []
    comments += [token] if token.lower() != "capfilt" else []
    return f"capfilt/{__version__}" + (f" ({'; '.join(comments)})" if comments else "")


class PoliteClient:
    """Gets URLs for many threads.

    Args:
        client: makes the requests.
        rate_limiter: says when a host may be asked.
        robots: whether to keep to robots.txt.
        refused: directives of X-Robots-Tag, lower case, that refuse a picture.
        token: a name to which robots.txt and X-Robots-Tag may speak, beside `capfilt`.
    """

    def __init__(
        self,
        client: SafeHttpClient,
        rate_limiter: RateLimiter,
        politeness: Politeness,
        robots: bool,
        refused: frozenset[str],
        token: str,
    ) -> None:
        self._client = client
        self._rate_limiter = rate_limiter
        self._politeness = politeness
        self._refused = refused
        self._agents = ("capfilt", token.lower())
        self._robots = RobotsCache(self._agents, client.limits.max_redirects) if robots else None
        self._long_pauses: dict[str, tuple[int, float]] = {}
        """Of hosts that asked for long pauses: how many in a row, and when the last ends."""
        self._lock = threading.Lock()

    def get(self, url: str) -> Response:
        """Fetch a URL, or raise the Failure that it ends with, in `deadline` seconds beside the waits for the rate."""
        deadline = Deadline(self._politeness.deadline, self._politeness.timeout)
        for tries_left in range(self._politeness.retries, -1, -1):
            try:
                return self._get_once(url, deadline)
            except Failure as failure:
                if failure.kind not in TRANSIENT or not tries_left or deadline.remaining() <= 0:
                    raise
        raise AssertionError("the last try returns or raises")

    def _get_once(self, url: str, deadline: Deadline) -> Response:
        max_redirects = self._client.limits.max_redirects
        for _ in range(max_redirects + 1):
            target = parse_url(url)
            if self._robots is not None:
                self._robots.check(target, deadline, lambda goal: self._request(goal, deadline, MAX_ROBOTS))
            response = self._request(target, deadline)
            if response.status < 400:
                self._check_tags(response)
            if 200 <= response.status < 300:
                return response
            url = response.redirect_url()
        raise Failure("redirects", f"more than {max_redirects}")

    def _check_tags(self, response: Response) -> None:
        values = response.headers.get_all("X-Robots-Tag", [])
        if directive := refused_directive(values, self._agents, self._refused):
            raise Failure("opt-out", f"X-Robots-Tag says {directive}")

    def _request(self, target: Target, deadline: Deadline, truncate_at: int | None = None) -> Response:
        """One request when the rate allows it; a host that answers 429 or 503 is given the pause that it asks for."""
        for attempt in range(NUM_PAUSES):
            self._wait_for_rate(target.host, deadline)
            response = self._client.request(target, deadline, truncate_at)
            if response.status not in _BUSY:
                with self._lock:
                    self._long_pauses.pop(target.host, None)
                return response
            seconds = _retry_after(response.headers, 2.0**attempt)
            if seconds >= deadline.remaining():
                given = self._shortened(target.host, seconds)
                self._rate_limiter.pause(target.host, given)
                detail = f"answered {response.status} and asks for a pause of {seconds:.0f} s; it is given {given:g} s"
                raise Failure("long-pause", f"{target.host} {detail}")
            self._rate_limiter.pause(target.host, seconds)
        raise Failure(f"http-{response.status}", f"{target.host} is busy, after {NUM_PAUSES} pauses too")

    def _shortened(self, host: str, seconds: float) -> float:
        """The pause, in seconds, for a host that asks for more than a sample can wait.

        One response does not speak for the whole host, which may serve a million others: the pause is one that other
        samples outlast. A host that asks for long pauses again and again, with no other response in between, is given
        them in full, up to MAX_PAUSE.
        """
        now = time.monotonic()
        with self._lock:
            count, until = self._long_pauses.get(host, (0, now))
            if now >= until:  # and not the response to a request from before the last pause began
                count += 1
            given = min(seconds, MAX_PAUSE if count > NUM_PAUSES else self._politeness.deadline / 2)
            if len(self._long_pauses) >= MAX_HOSTS:
                self._long_pauses.clear()
            self._long_pauses[host] = count, max(until, now + given)
        return given

    def _wait_for_rate(self, host: str, deadline: Deadline) -> None:
        """Wait until the host may be asked; of the deadline only pauses that the host asked for are spent."""
        while True:
            wait, pause = self._rate_limiter.acquire(host)
            if not pause:
                if wait:  # even a sleep of no time takes a turn of the interpreter's lock
                    time.sleep(wait)
                    deadline.extend(wait)
                return
            if pause >= deadline.remaining():
                raise Failure("paused", f"{host} asked for a pause of {pause:.0f} s more")
            time.sleep(pause)


def _retry_after(headers: HTTPMessage, default: float) -> float:
    """Seconds that Retry-After asks for, as a number or a date; `default` where it has neither."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        seconds = float(value[:9])
    else:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            seconds = default
    return max(seconds, 0.0)
