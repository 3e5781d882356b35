"""What a site asks of robots: robots.txt (RFC 9309) and the X-Robots-Tag header.

protego matches paths; which groups of a robots.txt are ours is decided here, because protego lets `User-agent: cap`
speak to `capfilt`, has one name where we answer to two, and spends gigabytes on 512 KiB of names above rules.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from protego import Protego

MAX_ROBOTS = 512 * 2**10
"""Bytes of a robots.txt that are read; the RFC asks for 500 KiB at least."""
MAX_RULES = 10_000

_TOKEN = re.compile(r"[a-zA-Z_*-]+")
_VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
# "none" is short for "noindex, nofollow".
_SHORT = {"none": ("noindex", "nofollow")}


def parse(text: str, agents: Collection[str]) -> Protego:
    """The rules of a robots.txt that hold for one of `agents` (lower case), else those for `*`.

    The result answers for the user agent `*`. Rules after the first MAX_RULES are not read.
    """
    groups: dict[str, list[str]] = {}
    names: set[str] = set()
    in_rules = False
    for key, value in _lines(text):
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
        ours = True
        for piece in value.split(","):
            name, colon, rest = (part.strip().lower() for part in piece.partition(":"))
            if colon and name in _VALUED:
                continue
            if colon and _TOKEN.fullmatch(name):
                ours = name == "*" or name in agents
                name = rest
            meant = _SHORT.get(name, (name,))
            if ours and (hits := [directive for directive in meant if directive in refused]):
                return hits[0]
    return ""


def _lines(text: str) -> Iterable[tuple[str, str]]:
    for line in text.removeprefix("\ufeff").splitlines():
        key, colon, value = line.partition("#")[0].partition(":")
        if colon:
            yield key.strip().lower(), value.strip()
