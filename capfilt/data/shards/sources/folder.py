"""A plain folder of pictures, read as shards: 1,000 pictures of the sorted list are one, and nothing is copied.

A picture has its path below the folder, without the extension, as its key; with it where two pictures differ in
nothing else. Its texts are a `.txt` and a `.json` of its name beside it, and what a list of the folder says
(`lists.py`). Links to folders are followed. The names of a folder are held in memory, and listed again when one of its
folders was written to since.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.members import PICTURES, MemberCounts
from capfilt.data.shards.sources import entries, lists
from capfilt.data.shards.sources.entries import Entry
from capfilt.data.shards.sources.rows import Row
from capfilt.data.shards.sources.view import View, check_options, views
from capfilt.errors import ShardError
from capfilt.storage.paths import storage_path

KIND = "pictures"
OPTIONS = ("list", "image", "text")
BESIDE = (".txt", ".json")
TABLES = (".parquet", ".pq")
_SETTLED = 2.0
"""Seconds after which a folder's time of writing tells one change from the next."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The files below a folder by what they are; nothing is opened."""

    pictures: list[str]
    """Sorted paths, from the folder."""
    others: frozenset[str]
    """Texts, jsons and lists."""
    tables: list[str] = field(default_factory=list)
    """Sorted, as pictures."""
    folders: Mapping[str, int] = field(default_factory=dict)
    """By its path, the time of writing of each folder, in ns; {} where that is not known."""
    begun: float = 0

    @cached_property
    def paths(self) -> frozenset[str]:
        """The pictures."""
        return frozenset(self.pictures)

    @cached_property
    def by_name(self) -> Mapping[str, str]:
        """Pictures by a name that no other one has, wherever below the folder."""
        counts = Counter(path.rpartition("/")[2] for path in self.pictures)
        return {name: path for path in self.pictures if counts[name := path.rpartition("/")[2]] == 1}

    @cached_property
    def sharing(self) -> frozenset[str]:
        """The names without extension that several pictures have."""
        counts = Counter(path.rpartition(".")[0] for path in self.pictures)
        return frozenset(stem for stem, count in counts.items() if count > 1)

    def is_current(self) -> bool:
        """Whether no name can have come or gone since."""
        if not self.folders or max(self.folders.values()) / 1e9 > self.begun - _SETTLED:
            return False
        try:
            return all(os.stat(path).st_mtime_ns == written for path, written in self.folders.items())
        except OSError:
            return False


_LISTED: dict[str, Listing] = {}


def listing(folder: str) -> Listing:
    """The files below a folder; remembered for the four folders that were asked for last."""
    known = _LISTED.pop(folder, None)
    if known is None or not known.is_current():
        folders: dict[str, int] = {}
        begun = time.time()
        paths = list(_files(folder, folders))
        pictures = sorted(filter(_is_picture, paths))
        tables = sorted(path for path in paths if path.endswith(TABLES) and not _is_hidden(path))
        known = Listing(pictures, frozenset(filter(_is_beside, paths)), tables, folders, begun)
    _LISTED[folder] = known
    for oldest in list(_LISTED)[:-4]:
        del _LISTED[oldest]
    return known


def expand(folder: str, options: Mapping[str, str]) -> list[str]:
    """The views of a folder of pictures. NoShardError where there are none; ShardError for a list that is broken."""
    check_options(folder, options, OPTIONS)
    return views(folder.rstrip("/"), KIND, [1] * len(lists.names(folder, listing(folder), options)), options)


def stat(view: View) -> dict[str, Any]:
    """As `shards.stat`."""
    listed = listing(view.location)
    found = [entry(listed, path) for path in _chosen(view, listed) if path in listed.paths]
    return entries.stat(view.location, found, lists.versions(view.location, listed, view.options))


def read(view: View, counts: MemberCounts) -> Iterator[Sample | FailedSample]:
    """The samples of a view in the order of their paths; a picture that a list names and that is not there fails."""
    listed = listing(view.location)
    chosen = _chosen(view, listed)
    told = lists.told(view.location, listed, view.options, set(chosen))
    found = []
    for path in chosen:
        row = told.get(path)
        problem = row if isinstance(row, str) else "" if path in listed.paths else "no such picture in the folder"
        found.append(Entry(path, problem=problem) if isinstance(row, str) or problem else entry(listed, path, row))
    yield from entries.read(view.location, found, counts)


def entry(listed: Listing, path: str, row: Row | None = None) -> Entry:
    """A picture with its files."""
    stem = path.rpartition(".")[0]
    beside = [f"{stem}{suffix}" for suffix in BESIDE]
    files = (path, *(name for name in beside if name in listed.others))
    return Entry(path if stem in listed.sharing else stem, files, row)


def _chosen(view: View, listed: Listing) -> list[str]:
    """The pictures of a view. ShardError where there are fewer than when it was made, as on a disk that has gone."""
    names = lists.names(view.location, listed, view.options)
    if len(names) <= view.last:
        raise ShardError(f"{view.location} has {len(names)} pictures, and had {view.last + 1} or more: give it again.")
    return names[view.first : view.last + 1]


def _is_picture(path: str) -> bool:
    return path.isprintable() and not _is_hidden(path) and path.rpartition(".")[2].lower() in PICTURES


def _is_beside(path: str) -> bool:
    return path.endswith((*BESIDE, *lists.LISTS)) and not _is_hidden(path)


def _is_hidden(path: str) -> bool:
    return path.rpartition("/")[2].startswith(".")


def _files(folder: str, folders: dict[str, int]) -> Iterator[str]:
    """The paths of all files below a folder, from there; of a local one each folder's time of writing."""
    root = storage_path(folder)
    if isinstance(root, Path):
        yield from _local(root, folders)
        return
    files, base = fsspec.core.url_to_fs(folder)
    yield from (path.removeprefix(base).lstrip("/") for path in files.find(base))


def _local(root: Path, folders: dict[str, int]) -> Iterator[str]:
    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above
            inner.clear()
            continue
        seen.add(real)
        folders[folder] = os.stat(folder).st_mtime_ns
        below = os.path.relpath(folder, root)
        yield from (name if below == "." else f"{below}/{name}" for name in names)
