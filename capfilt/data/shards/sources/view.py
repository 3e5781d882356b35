"""A view: a part of a data set that is no tar, as the URL of a shard, `/data/photos#pictures=0-999`.

Options stand before the range (`pairs.parquet#text=alt&rows=0-999`); `%` spells what would end one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec

from capfilt.data.sample import FailedSample
from capfilt.data.shards.keys import MAX_KEY
from capfilt.errors import NoShardError, did_you_mean

EACH = 1000
"""Samples of a view; of a table as many more as its last row group has."""
LARGEST = 10_000
"""Rows of a view of a table whose row groups are larger."""
MAX_VIEWS = 1_000_000
"""Views of one folder or file."""

_OPTIONS = r"(?:[a-z]+=[^&#]*&)*"
_VIEW = re.compile(rf"(.+)#({_OPTIONS})(pictures|rows|captions)=(\d{{1,12}})-(\d{{1,12}})", re.DOTALL)
_SPEC = re.compile(rf"(.+)#({_OPTIONS}[a-z]+=[^&#]*)", re.DOTALL)


@dataclass(frozen=True)
class View:
    """A range of the samples of a folder or file."""

    location: str
    """The folder or file: a local path or an fsspec URL."""
    kind: str
    """What is counted: pictures of a folder, rows of a table, captions of a JSON."""
    first: int
    last: int
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """As plans and ledgers have it."""
        given = "".join(f"{key}={quote(value, safe='/:. ')}&" for key, value in self.options.items())
        return f"{self.location}#{given}{self.kind}={self.first}-{self.last}"

    @property
    def name(self) -> str:
        """The name of the shard: that of the folder or file, and the place of its first sample."""
        base = self.location.rstrip("/").rpartition("/")[2]
        return f"{base if self.kind == 'pictures' else Path(base).stem}-{self.first:06d}"


def parse(url: str) -> View | None:
    """The view that a shard's URL names; None for a tar."""
    match = _VIEW.fullmatch(url)
    return match and View(match[1], match[3], int(match[4]), int(match[5]), _options(match[2]))


def split(spec: str) -> tuple[str, dict[str, str]]:
    """A path or URL, and the options behind its `#`; a file that is called so has none."""
    match = None if os.path.exists(spec) else _SPEC.fullmatch(spec)
    return (match[1], _options(match[2])) if match else (spec, {})


def absolute(location: str) -> str:
    """A local path from the root, which workers find from elsewhere; a URL as it is."""
    return location if "://" in location else os.path.abspath(location)


def check_options(location: str, options: Mapping[str, str], allowed: Iterable[str]) -> None:
    """Refuse an option that such data do not have. NoShardError."""
    known = sorted(allowed)
    for name in options.keys() - {*known}:
        what = f"options are {', '.join(known)}" if known else "there are no options of it"
        raise NoShardError(f"{location}#{name}=: no such option; {what}.{did_you_mean(name, known)}")


def ranges(groups: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The first and last place of each view, given the sizes of groups that are read at a time."""
    first = end = 0
    for size in groups:
        end += size
        while end - first > LARGEST:
            yield first, first + LARGEST - 1
            first += LARGEST
        if end - first >= EACH:
            yield first, end - 1
            first = end
    if end > first:
        yield first, end - 1


def views(location: str, kind: str, groups: Iterable[int], options: Mapping[str, str]) -> list[str]:
    """The URLs of all views of a folder or file. NoShardError for more than MAX_VIEWS, or none."""
    found = list(islice(ranges(groups), MAX_VIEWS + 1))
    if not found:
        raise NoShardError(f"{location} has no {kind}; give data that have some.")
    if len(found) > MAX_VIEWS:
        raise NoShardError(f"{location} has more {kind} than {MAX_VIEWS:,} shards hold; split it.")
    return [View(location, kind, first, last, options).url for first, last in found]


def version_of(info: Mapping[str, Any]) -> str:
    """What tells a file from how it was before, of what fsspec says of it; "" where its storage knows nothing."""
    return next((str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified") if info.get(key)), "")


def size_and_time(location: str) -> tuple[int | None, str]:
    """What tells the list at a path or URL from how it was before."""
    files, path = fsspec.core.url_to_fs(location)
    info = files.info(path)
    return info.get("size"), str(info.get("ETag") or info.get("mtime"))


def failed(key: str, reason: str) -> FailedSample:
    """The outcome of an input whose key others chose, which may be no text that can be written."""
    return FailedSample(key[:MAX_KEY].encode("utf-8", "replace").decode(), reason)


def _options(text: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in text.split("&") if part)
    return {name: unquote(value) for name, _, value in pairs}
