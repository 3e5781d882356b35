"""What a site asks of robots: robots.txt (RFC 9309), read once a day, and the X-Robots-Tag header.

protego matches paths; which groups of a robots.txt are ours is decided here, because protego lets `User-agent: cap`
speak to `capfilt`, has one name where we answer to two, and spends gigabytes on 512 KiB of names above rules.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable

from protego import Protego

from capfilt.downloading.failures import Failure
from capfilt.downloading.http.addresses import Target, parse_url
from capfilt.downloading.http.client import Deadline, Response

MAX_ROBOTS = 512 * 2**10
"""Bytes of a robots.txt that are read; the RFC asks for 500 KiB at least."""
MAX_RULES = 10_000
MAX_ORIGINS = 20_000
"""Sites whose robots.txt is remembered."""
KEPT = 24 * 3600.0
"""Seconds for which a robots.txt is remembered: the RFC's most."""
KEPT_FAILURE = 60.0
"""Seconds for which it is remembered that a robots.txt could not be read."""

_TOKEN = re.compile(r"[a-zA-Z_*-]+")
_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
# "none" is short for "noindex, nofollow".
_SHORT = {"none": ("noindex", "nofollow")}


class RobotsCache:
    """Reads the robots.txt of each site when it is first needed, and remembers it; safe to use from many threads."""

    def __init__(self, agents: Collection[str], max_redirects: int) -> None:
        self._agents = agents
        self._max_redirects = max_redirects
        self._origins: OrderedDict[str, _Origin] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, target: Target, deadline: Deadline, get: Callable[[Target], Response]) -> None:
        """Raise Failure("robots") where the site does not allow a target, or the Failure of reading its robots.txt.

        `get`: requests the robots.txt, truncated to MAX_ROBOTS.
        """
        origin = self._origin(target.origin)
        if not origin.lock.acquire(timeout=max(0.0, deadline.remaining())):
            raise Failure("timeout", f"{target.origin}/robots.txt is being waited for")
        try:
            if origin.is_stale():
                origin.remember(*self._read(target, get))
        finally:
            origin.lock.release()
        if origin.failure is not None:
            raise Failure(origin.failure.kind, f"robots.txt: {origin.failure.detail}")
        if origin.rules is not None and not permits(origin.rules, target.path):
            raise Failure("robots", f"{target.origin}/robots.txt")

    def _origin(self, name: str) -> _Origin:
        with self._lock:
            origin = self._origins.setdefault(name, _Origin())
            self._origins.move_to_end(name)
            if len(self._origins) > MAX_ORIGINS:
                self._origins.popitem(last=False)
            return origin

    def _read(self, target: Target, get: Callable[[Target], Response]) -> tuple[Protego | None, Failure | None]:
        """The rules of a site. Without a robots.txt (4xx) all is allowed; where the host fails, nothing is."""
        url = f"{target.origin}/robots.txt"
        try:
            for _ in range(self._max_redirects + 1):
                response = get(parse_url(url))
                if response.status < 300:
                    return parse(response.body.decode("utf-8", "replace"), self._agents), None
                if 400 <= response.status < 500:
                    return None, None
                if response.status >= 500:
                    return None, Failure("robots", f"it answered {response.status}, so nothing is allowed")
                url = response.redirect_url()
        except Failure as failure:
            return None, failure
        return None, None  # the RFC: more redirects than one follows count as no robots.txt


class _Origin:
    """What one robots.txt says, once it was read."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rules: Protego | None = None
        """None: everything is allowed."""
        self.failure: Failure | None = None
        self._until = 0.0

    def is_stale(self) -> bool:
        """Whether it is to be read (again)."""
        return time.monotonic() >= self._until

    def remember(self, rules: Protego | None, failure: Failure | None) -> None:
        """Remember the rules for KEPT seconds, or a failure for KEPT_FAILURE."""
        self.rules, self.failure = rules, failure
        self._until = time.monotonic() + (KEPT if failure is None else KEPT_FAILURE)


def parse(text: str, agents: Collection[str]) -> Protego:
    """The rules of a robots.txt that hold for one of `agents` (lower case), else those for `*`.

    The result answers for the user agent `*`. Rules after the first MAX_RULES are not read.
    """
    groups: dict[str, list[str]] = {}
    names: set[str] = set()
    in_rules = False
    for key, value in _fields(text):
        if key == "user-agent":
            if in_rules:
                names, in_rules = set(), False
            # Groups of others are not kept: 10,000 names above 20,000 rules fit into MAX_ROBOTS.
            if value.lower() in (*agents, "*"):
                names.add(value.lower())
                groups.setdefault(value.lower(), [])
        elif key in ("allow", "disallow"):
            in_rules = True
            for name in names:
                groups[name].append(f"{key}: {value}")
    named = [name for name in agents if name in groups] or ["*"]
    rules = [rule for name in dict.fromkeys(named) for rule in groups.get(name, [])]
    return Protego.parse("\n".join(["User-agent: *", *rules[:MAX_RULES]]))


def permits(rules: Protego, path: str) -> bool:
    """Whether rules from `parse` allow a path with its query: the longest that matches decides, Allow at a tie."""
    # A whole URL, because urlsplit would take the start of a path like //[x for a host, and raise.
    return rules.can_fetch(f"http://host{path}", "*")


def refused_directive(values: Iterable[str], agents: Collection[str], refused: Collection[str]) -> str:
    """The first directive of X-Robots-Tag headers that is among `refused` and meant for us, or "".

    A header may begin with the name of the robot that it is meant for, "otherbot: noindex, nofollow"; some
    directives have a value after a colon, "unavailable_after: 25 Jun 2010 15:00:00 PST".
    """
    for value in values:
        is_ours = True
        for part in value.split(","):
            name, colon, rest = (word.strip().lower() for word in part.partition(":"))
            if colon and name in _WITH_VALUE:
                continue
            if colon and _TOKEN.fullmatch(name):
                is_ours = name == "*" or name in agents
                name = rest
            directives = _SHORT.get(name, (name,))
            if is_ours and (hits := [directive for directive in directives if directive in refused]):
                return hits[0]
    return ""


def _fields(text: str) -> Iterable[tuple[str, str]]:
    """The `key: value` lines of a robots.txt, keys in lower case."""
    for line in text.removeprefix("\ufeff").splitlines():
        key, colon, value = line.partition("#")[0].partition(":")
        if colon:
            yield key.strip().lower(), value.strip()
