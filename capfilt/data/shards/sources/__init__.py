"""What is read as shards beside tars, as a lazy view: a folder of pictures, tables, a JSON of captions.

Each source is a module with `expand(location, options)`, which gives the URLs of its views (`View`), `stat(view)` and
`read(view, counts)`; a view has a uid for each sample, a name in the ledger and a version, as a tar has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.members import MemberCounts
from capfilt.data.shards.sources import captions, folder, tables
from capfilt.data.shards.sources.tables import is_table
from capfilt.data.shards.sources.view import View, absolute, check_options, parse, split, version_of
from capfilt.errors import NoShardError, RunError
from capfilt.storage.documents import read_json
from capfilt.storage.paths import map_concurrent, storage_path
from capfilt.storage.remote_path import RemotePath
from capfilt.storage.safe_paths import check_file_name


class Source(Protocol):
    """What a module of a source has."""

    def expand(self, location: str, options: Mapping[str, str]) -> list[str]:
        """The views of a folder or file. NoShardError where there are none."""

    def stat(self, view: View) -> dict[str, Any]:
        """The bytes of a view, and what tells its version from others, without reading it."""

    def read(self, view: View, counts: MemberCounts) -> Iterator[Sample | FailedSample]:
        """Its samples in order, an outcome for every one that was listed."""


SOURCES: Mapping[str, Source] = {folder.KIND: folder, tables.KIND: tables, captions.KIND: captions}
"""By the kind of a view."""

_SPLITS = ("train", "validation", "valid", "val", "dev", "test")
_SPLIT = re.compile(rf"(?:^|[^a-z0-9])({'|'.join(_SPLITS)})(?:[^a-z0-9]|$)")


def source_of(view: View) -> Source:
    """The module that reads a view."""
    return SOURCES[view.kind]


def is_source(path: str) -> bool:
    """Whether a file, or the folder that Lance makes, is read as shards, by its name."""
    return tables.is_table(path) or path.endswith(".json")


def expand(location: str, options: Mapping[str, str], is_folder: bool) -> list[str]:
    """The views of a folder or file; [] for a folder without any.

    Raises:
        NoShardError: it must be said what is meant: a column, a split, a list; or it holds URLs alone.
        ShardError: it cannot be read.
    """
    if tables.is_table(location) and not (is_folder and not location.rstrip("/").endswith(".lance")):
        return tables.expand(location, options)
    if not is_folder:
        return captions.expand(location, options)
    listed = folder.listing(location)
    if saved := [name for name in ("state.json", "dataset_dict.json") if name in listed.others]:
        return _saved(location, options, saved[0])
    if listed.tables and (not listed.pictures or tables.holds_pictures(f"{location}/{listed.tables[0]}")):
        return _of_tables(location, listed.tables, options)
    return folder.expand(location, options) if listed.pictures else []


def _saved(location: str, options: Mapping[str, str], record: str) -> list[str]:
    """The views of what `datasets` saved to a disk: a dataset, or a folder of one for each split."""
    try:
        said = read_json(storage_path(location) / record)
        if record == "state.json":
            names = [check_file_name(one["filename"]) for one in said["_data_files"]]
            return _tables([f"{location}/{name}" for name in names], options)
        splits = [check_file_name(name) for name in said["splits"]]
    except (KeyError, TypeError, ValueError, RunError) as error:
        raise NoShardError(f"{location}/{record} is not what Dataset.save_to_disk writes: {error}.") from error
    rest = {name: value for name, value in options.items() if name != "split"}
    return _saved(f"{location}/{_choose(location, splits, options)}", rest, "state.json")


def _of_tables(location: str, paths: Sequence[str], options: Mapping[str, str]) -> list[str]:
    """The views of a folder of Parquet files, of one split where their names tell several."""
    by_split: dict[str, list[str]] = {}
    for path in paths:
        match = _SPLIT.search(path.lower())
        by_split.setdefault(match[1] if match else "", []).append(f"{location}/{path}")
    rest = {name: value for name, value in options.items() if name != "split"}
    return _tables(by_split[_choose(location, sorted(by_split), options)], rest)


def _choose(location: str, splits: Sequence[str], options: Mapping[str, str]) -> str:
    chosen = options.get("split", splits[0] if len(splits) == 1 else None)
    if chosen not in splits:
        there = ", ".join(name or "files of none" for name in splits)
        what = "has several splits" if chosen is None else f"has no split {chosen}"
        raise NoShardError(f"{location} {what}: {there}. Choose one, as in {location}#split={splits[-1]}.")
    return str(chosen)


def _tables(locations: Sequence[str], options: Mapping[str, str]) -> list[str]:
    remote = isinstance(storage_path(locations[0]), RemotePath) if locations else False
    found = map_concurrent(lambda location: tables.expand(location, options), locations, remote)
    return [url for urls in found for url in urls]
