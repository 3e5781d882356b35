"""A polite visitor of web hosts: waits for its turn, asks robots.txt, pauses when told to, follows redirects.

Every step of a redirect is a visit of its own: the fence, the turn and robots.txt hold for the host that it leads to.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPMessage
from typing import Protocol
from urllib.parse import urljoin

from protego import Protego
from pydantic import Field

from capfilt import __version__
from capfilt.config import Config
from capfilt.downloading.failures import TRANSIENT, Failure
from capfilt.downloading.http.client import Answer, Deadline, SafeHttpClient, Target, target
from capfilt.downloading.http.robots import MAX_ROBOTS, parse, permits, refused_directive

MAX_ORIGINS = 20_000
KEPT = 24 * 3600.0
"""Seconds for which a robots.txt is remembered: the RFC's most."""
KEPT_FAILURE = 60.0
MAX_PAUSE = 3600.0
"""Seconds of a pause, at most: after that a host is asked again, whatever it said."""
PATIENT = 3
"""How often one URL waits for a busy host, and how many pauses in a row a host is given in short before it is given
them in full."""
_REDIRECTS = (301, 302, 303, 307, 308)
_BUSY = (429, 503)


class RateLimiter(Protocol):
    """Who may ask a host when: capfilt/cluster/rate_limit.py."""

    def ask(self, name: str) -> tuple[float, float]: ...

    def pause(self, name: str, seconds: float) -> None: ...


class Politeness(Config):
    """How hosts are asked. None of it decides what a picture looks like, so a resumed run may ask otherwise."""

    timeout: float = Field(default=10, gt=0)
    """Seconds for a single wait: to connect, for the next bytes."""
    deadline: float = Field(default=30, gt=0)
    """Seconds for one URL in all: redirects, other tries and pauses that the host asks for included."""
    retries: int = Field(default=0, ge=0)
    """Further tries after what may pass: no connection, a timeout, a 500."""
    host_rate: float = Field(default=10, ge=0)
    """Requests a second to one host, from all workers together; 0 = any number."""
    host_burst: int = Field(default=10, ge=1)
    """Requests to one host at once, before the rate holds."""
    contact: str = Field(default="", pattern=r"^[ -~]*$", max_length=200)
    """A page or an address for people who wonder who is asking; it is told to every host."""


def agent(contact: str, token: str) -> str:
    """The User-Agent that hosts see."""
    told = [f"+{contact}"] if contact else []
    told += [token] if token.lower() != "capfilt" else []
    return f"capfilt/{__version__}" + (f" ({'; '.join(told)})" if told else "")


class Visitor:
    """Gets URLs for many threads; remembers what robots.txt said."""

    def __init__(
        self,
        fence: SafeHttpClient,
        turns: RateLimiter,
        manners: Politeness,
        robots: bool,
        refused: frozenset[str],
        token: str,
    ) -> None:
        self._fence = fence
        self._turns = turns
        self._manners = manners
        self._robots = robots
        self._refused = refused
        self._agents = ("capfilt", token.lower())
        self._origins: OrderedDict[str, _Origin] = OrderedDict()
        self._long_pauses: dict[str, tuple[int, float]] = {}
        """Of hosts that asked for long ones: how many in a row, and when the last ends."""
        self._lock = threading.Lock()

    def get(self, url: str) -> Answer:
        """Fetch a URL, or raise the Failure that it ends with, in `manners.deadline` seconds and its turns."""
        clock = Deadline(self._manners.deadline, self._manners.timeout)
        for tries in range(self._manners.retries, -1, -1):
            try:
                return self._followed(url, clock)
            except Failure as failure:
                if failure.kind not in TRANSIENT or not tries or clock.left() <= 0:
                    raise
        raise AssertionError("the last try returns or raises")

    def _followed(self, url: str, clock: Deadline) -> Answer:
        for _ in range(self._fence.limits.max_redirects + 1):
            goal = target(url)
            if self._robots:
                self._ask_robots(goal, clock)
            answer = self._visit(goal, clock)
            if answer.status < 400:
                self._check_tag(answer)
            if 200 <= answer.status < 300:
                return answer
            url = _redirect(answer)
        raise Failure("redirects", f"more than {self._fence.limits.max_redirects}")

    def _visit(self, goal: Target, clock: Deadline, keep: int | None = None) -> Answer:
        """One request in its turn; a host that asks for a pause is given it."""
        for tries in range(PATIENT):
            self._await_turn(goal.host, clock)
            answer = self._fence.request(goal, clock, keep)
            if answer.status not in _BUSY:
                with self._lock:
                    self._long_pauses.pop(goal.host, None)
                return answer
            seconds = _retry_after(answer.headers, 2.0**tries)
            if seconds >= clock.left():
                given = self._shorten(goal.host, seconds)
                self._turns.pause(goal.host, given)
                told = f"answered {answer.status} and asks for a pause of {seconds:.0f} s; it is given {given:g} s"
                raise Failure("long-pause", f"{goal.host} {told}")
            self._turns.pause(goal.host, seconds)
        raise Failure(f"http-{answer.status}", f"{goal.host} is busy, after {PATIENT} pauses too")

    def _shorten(self, host: str, seconds: float) -> float:
        """The pause that a host is given which asks for more than a sample can wait.

        One answer is not the word of the whole host, which may serve a million others: the pause is one that other
        samples outlast. A host that says so time after time, with no other answer in between, is given it in full.
        """
        now = time.monotonic()
        with self._lock:
            count, until = self._long_pauses.get(host, (0, now))
            if now >= until:  # and not the answer to what was asked before the last pause began
                count += 1
            given = min(seconds, MAX_PAUSE if count > PATIENT else self._manners.deadline / 2)
            if len(self._long_pauses) >= MAX_ORIGINS:
                self._long_pauses.clear()
            self._long_pauses[host] = count, max(until, now + given)
        return given

    def _await_turn(self, host: str, clock: Deadline) -> None:
        while True:
            wait, pause = self._turns.ask(host)
            if not pause:
                time.sleep(wait)
                clock.forgive(wait)
                return
            if pause >= clock.left():
                raise Failure("paused", f"{host} asked for a pause of {pause:.0f} s more")
            time.sleep(pause)

    # ---- what the site says ----

    def _check_tag(self, answer: Answer) -> None:
        values = answer.headers.get_all("X-Robots-Tag", [])
        if directive := refused_directive(values, self._agents, self._refused):
            raise Failure("opt-out", f"X-Robots-Tag says {directive}")

    def _ask_robots(self, goal: Target, clock: Deadline) -> None:
        origin = self._origin(goal.origin)
        if not origin.lock.acquire(timeout=max(0.0, clock.left())):
            raise Failure("timeout", f"{goal.origin}/robots.txt is being waited for")
        try:
            if origin.stale():
                origin.learn(*self._read_robots(goal, clock))
        finally:
            origin.lock.release()
        if origin.failure is not None:
            raise Failure(origin.failure.kind, f"robots.txt: {origin.failure.detail}")
        if origin.rules is not None and not permits(origin.rules, goal.path):
            raise Failure("robots", f"{goal.origin}/robots.txt")

    def _origin(self, name: str) -> _Origin:
        with self._lock:
            origin = self._origins.setdefault(name, _Origin())
            self._origins.move_to_end(name)
            if len(self._origins) > MAX_ORIGINS:
                self._origins.popitem(last=False)
            return origin

    def _read_robots(self, goal: Target, clock: Deadline) -> tuple[Protego | None, Failure | None]:
        """The rules of a host. Without a robots.txt (4xx) all is allowed; where the host fails, nothing is."""
        url = f"{goal.origin}/robots.txt"
        try:
            for _ in range(self._fence.limits.max_redirects + 1):
                answer = self._visit(target(url), clock, keep=MAX_ROBOTS)
                if answer.status < 300:
                    return parse(answer.body.decode("utf-8", "replace"), self._agents), None
                if 400 <= answer.status < 500:
                    return None, None
                if answer.status >= 500:
                    return None, Failure("robots", f"it answered {answer.status}, so nothing is allowed")
                url = _redirect(answer)
        except Failure as failure:
            return None, failure
        return None, None  # the RFC: more redirects than one follows count as no robots.txt


class _Origin:
    """What one robots.txt said, once it was read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rules: Protego | None = None
        """None: everything is allowed."""
        self.failure: Failure | None = None
        self._until = 0.0

    def stale(self) -> bool:
        """Whether it is to be read (again)."""
        return time.monotonic() >= self._until

    def learn(self, found: Protego | None, failure: Failure | None) -> None:
        """Remember what was found, a failure not for long."""
        self.rules, self.failure = found, failure
        self._until = time.monotonic() + (KEPT if failure is None else KEPT_FAILURE)


def _redirect(answer: Answer) -> str:
    """Where an answer that is no success leads; Failure where it leads nowhere."""
    if answer.status not in _REDIRECTS:
        raise Failure(f"http-{answer.status}")
    place = answer.headers.get("Location")
    if not place:
        raise Failure("redirects", f"{answer.status} without a Location")
    try:
        return urljoin(answer.url, place.encode("latin-1", "replace").decode("utf-8", "replace").strip())
    except ValueError as error:
        raise Failure("bad-url", str(error)[:100]) from error


def _retry_after(headers: HTTPMessage, default: float) -> float:
    """Seconds that a busy host asks for, in either of the header's spellings; `default` where it says nothing."""
    told = headers.get("Retry-After", "").strip()
    if told.isascii() and told.isdigit():
        seconds = float(told[:9])
    else:
        try:
            seconds = (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            seconds = default
    return max(seconds, 0.0)
