"""The keys of samples: how a tar's names give them, which are safe, and how one with dots is written.

A name belongs to a key as in webdataset: what stands before the first dot of its last segment. Only where that gives no
picture with a text, later dots are considered (`scattered.py`).
"""

from __future__ import annotations

import re
import unicodedata

MAX_KEY = 1024
"""Characters of a key."""

# webdataset's own: members below `__name__/` are metadata of the shard, not samples.
_METADATA = re.compile(r"__[^/]*__/")
# Characters that change the direction of writing; joiners, marks and spaces are allowed, which names of people have.
_DIRECTION = re.compile("[\\u202a-\\u202e\\u2066-\\u2069]")
_CONTROL_CATEGORIES = {"Cc", "Cs", "Zl", "Zp"}


def split_name(path: str) -> tuple[str, str]:
    """Split a member's name into key and extension at the first dot of its last segment; ("", "") where there is none.

    What stands behind the last dot is lower-cased.
    """
    folder, slash, base = path.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return "", ""
    more, dot, last = extension.rpartition(".")
    return f"{folder}{slash}{stem}", f"{more}{dot}{last.lower()}"


def is_metadata(path: str) -> bool:
    """Whether a name is one of webdataset's metadata."""
    return bool(_METADATA.match(path))


def key_problem(key: str, seen: set[str]) -> str:
    """Why `key` cannot name a sample, or "": what `shards.write` refuses, `shards.read` never yields.

    `seen`: the keys of the shard so far, as `tar_key` writes them.
    """
    segments = key.split("/")
    if len(key) > MAX_KEY:
        return f"unsafe key (longer than {MAX_KEY} characters)"
    if not key.isprintable() and _has_control_characters(key):
        return "unsafe key (control characters, or such as turn the direction of writing)"
    if not all(segments) or {".", ".."} & set(segments) or is_metadata(key):
        return "unsafe key (absolute, '..', empty or metadata name)"
    return "duplicate key" if tar_key(key) in seen else ""


def _has_control_characters(key: str) -> bool:
    return bool(_DIRECTION.search(key)) or any(unicodedata.category(c) in _CONTROL_CATEGORIES for c in key)


def tar_key(key: str) -> str:
    """A key as it is written into a tar, so that every reader splits names where we do: no dots in its last segment."""
    folder, slash, base = key.rpartition("/")
    if "." not in base:
        return key
    return f"{folder}{slash}{base.replace('%', '%25').replace('.', '%2E')}"
