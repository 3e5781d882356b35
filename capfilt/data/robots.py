"""What a site asks of robots: robots.txt (RFC 9309) and the X-Robots-Tag header.

Python's own urllib.robotparser knows no `*` and `$` in paths and takes the first rule that fits, where the RFC
takes the longest; img2dataset takes the date of `unavailable_after: ...` for a directive of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

MAX_ROBOTS = 512 * 2**10
"""Bytes of a robots.txt that are read; the RFC asks for 500 KiB at least."""
MAX_RULES = 10_000

_TOKEN = re.compile(r"[a-zA-Z_*-]+")
_VALUED = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
# "none" is short for "noindex, nofollow".
_SHORT = {"none": ("noindex", "nofollow")}


@dataclass(frozen=True)
class Rule:
    """One Allow or Disallow line."""

    allow: bool
    pattern: str

    def fits(self, path: str) -> bool:
        """Whether the rule speaks of this path: a prefix, with `*` for anything and `$` for the end."""
        pattern, ends = (self.pattern[:-1], True) if self.pattern.endswith("$") else (self.pattern, False)
        head, *others = pattern.split("*")
        if not path.startswith(head):
            return False
        if not others:
            return path == head if ends else True
        return _in_order(path[len(head) :], others, ends)


def _in_order(rest: str, parts: Sequence[str], ends: bool) -> bool:
    """Whether the parts come one after the other; no regular expression, which a hostile pattern could blow up."""
    *middle, last = parts
    for part in middle:
        at = rest.find(part)
        if at < 0:
            return False
        rest = rest[at + len(part) :]
    return rest.endswith(last) if ends else last in rest


def rules(text: str, agents: Collection[str]) -> tuple[Rule, ...]:
    """The rules of a robots.txt that hold for one of `agents` (lower case), else those for `*`."""
    groups: dict[str, list[Rule]] = {}
    names: list[str] = []
    in_rules = False
    for key, value in _lines(text):
        if key == "user-agent":
            if in_rules:
                names, in_rules = [], False
            names.append(value.lower())
            groups.setdefault(value.lower(), [])
        elif key in ("allow", "disallow"):
            in_rules = True
            if value:
                for name in names:
                    groups[name].append(Rule(key == "allow", _plain(value)))
    own = [rule for name in agents for rule in groups.get(name, [])]
    named = any(name in groups for name in agents)
    return tuple((own if named else groups.get("*", []))[:MAX_RULES])


def permits(found: Iterable[Rule], path: str) -> bool:
    """Whether the rules allow a path: the longest that fits decides, Allow where two are as long."""
    told = _plain(path)
    fitting = [rule for rule in found if rule.fits(told)]
    return max(fitting, key=lambda rule: (len(rule.pattern), rule.allow)).allow if fitting else True


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


def _plain(path: str) -> str:
    """A path with its escapes undone, but for the slash: %2F is not a separator."""
    return re.sub(r"(?:%(?!2[fF])[0-9a-fA-F]{2})+", lambda found: unquote(found[0]), path)
