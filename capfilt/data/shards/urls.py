"""Which shards a spec names (braces, globs, folders, lists of URLs), and the name that each has in a run's records."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from itertools import islice
from pathlib import Path

import fsspec
from braceexpand import braceexpand

from capfilt.data.shards import sources
from capfilt.data.shards.members import IMAGES
from capfilt.data.shards.sources.lists import LISTS
from capfilt.errors import NoShardError, ShardError
from capfilt.redact import is_redacted
from capfilt.storage.paths import map_concurrent

ALLOWED = (
    "allowed are tars, Parquet, folders of them or of pictures, datasets saved to disk, Lance, captions as JSON,"
    " braces, globs, a::b lists and fsspec URLs"
)
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_SHARDS = 1_000_000
MAX_NAME = 100
"""Characters of a shard's name that its folders are part of; four bytes each at most, and file systems take 255."""

_WEB = ("http://", "https://")
_UNSAFE = re.compile(r"[^\w.-]")


def expand(spec: str | Sequence[str]) -> list[str]:
    """List the shards that `spec` names, in order: tars, folders of tars, `{0..9}` braces, globs, `a::b`, fsspec URLs.

    What is no tar is listed as the views of a source (`shards.sources`): folders of pictures, tables, captions.

    Local paths come back absolute, so that a worker with another working directory finds them. `::` always separates
    shards here (open_clip's habit), so fsspec's chained URLs cannot be used.

    Raises:
        NoShardError: a part of `spec` names nothing, or more than `MAX_SHARDS`.
    """
    named = patterns(spec)
    remote = on_a_store(pattern for pattern, _ in named)
    return [url for urls in map_concurrent(_list_pattern, named, remote) for url in urls]


def patterns(spec: str | Sequence[str]) -> list[tuple[str, bool]]:
    """The paths, globs and URLs that `spec` is made of, each with whether it is literal, that is no pattern.

    Of the storage only the existence of local paths is looked up.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    parts = [part for one in specs for part in one.split("::") if part]
    if not parts:
        raise NoShardError(f"no shards given; {ALLOWED}")
    if redacted := next((part for part in parts if is_redacted(part)), None):
        raise NoShardError(f"{redacted} lacks a secret, which run folders do not keep; give the address in full")
    return [pattern for part in parts for pattern in _expand_braces(part)]


def places(pattern: str) -> list[str]:
    """Where reading what a pattern names leads: there, and to the pictures that it says lie elsewhere."""
    view = sources.parse(pattern)
    location, options = (view.location, view.options) if view else sources.split(pattern)
    return [location, *(options[name] for name in ("images",) if name in options)]


def on_a_store(urls: Iterable[str]) -> bool:
    """Whether any of these lies on a store, whose every answer is a wait, so that many are asked at once."""
    return any("://" in url and not url.startswith((*_WEB, "file://", "local://")) for url in urls)


def name(url: str) -> str:
    """Name a shard by its file, `s3://bucket/00000.tar` -> `00000`: its records go by this name."""
    if view := sources.parse(url):
        return view.name
    base = (url.split("?")[0] if url.startswith(_WEB) else url).rpartition("/")[2]
    for suffix in TARS:
        if base.endswith(suffix) and base != suffix:
            return base.removesuffix(suffix)
    return Path(base).stem


def by_name(urls: Iterable[str]) -> dict[str, str]:
    """Map the names that a run's records give shards to their urls, in the order given.

    A name is that of the file. Where several files share one, as in two folders with a `00000.tar` each, as many of the
    folders above stand before it as are needed, `p0-00000` and `p1-00000`; where these are the same too, a hash of the
    url stands behind it. Names depend on the set of shards, not on its order.

    Raises:
        ShardError: a shard is given twice.
    """
    urls = list(urls)
    by_file_name: dict[str, list[str]] = {}
    for url in urls:
        by_file_name.setdefault(name(url), []).append(url)
    for sharing in by_file_name.values():
        if repeated := [url for url in sharing if sharing.count(url) > 1]:
            raise NoShardError(f"the shard {repeated[0]} is given twice; give each shard once.")
    names = {sharing[0]: file_name for file_name, sharing in by_file_name.items() if len(sharing) == 1}
    taken = {file_name.casefold() for file_name in names.values()}
    for file_name, sharing in sorted(by_file_name.items()):
        if len(sharing) > 1:
            names |= zip(sharing, _distinct_names(file_name, sharing, taken), strict=True)
            taken |= {names[url].casefold() for url in sharing}
    return {names[url]: url for url in urls}


def renamed(named: Mapping[str, str]) -> dict[str, str]:
    """The names of `by_name` that differ from their file's, by url."""
    return {url: given for given, url in named.items() if given != name(url)}


def _distinct_names(file_name: str, urls: Sequence[str], taken: Set[str]) -> list[str]:
    """Names for shards whose files share one, none of them in `taken`."""
    places = [view.location if (view := sources.parse(url)) else url for url in urls]
    paths = [(url.split("?")[0] if url.startswith(_WEB) else url).rpartition("://")[2] for url in places]
    folders = [[_UNSAFE.sub("_", part) for part in path.split("/")[:-1] if part] for path in paths]
    for depth in range(1, max(map(len, folders)) + 1):
        names = ["-".join((*above[-depth:], file_name)).lstrip(".-") for above in folders]
        distinct = {one.casefold() for one in names}
        if len(distinct) == len(urls) and not distinct & taken and max(map(len, names)) <= MAX_NAME:
            return names
    return [f"{file_name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}" for url in urls]


def is_tar(path: str) -> bool:
    """Whether a path is a tar, by its name; the `._00000.tar` that a Mac writes beside each file is none."""
    return path.endswith(TARS) and not path.rpartition("/")[2].startswith("._")


def _expand_braces(spec: str) -> list[tuple[str, bool]]:
    """The patterns of a spec, each with whether it is literal."""
    view = sources.parse(spec)
    if os.path.exists(spec) or os.path.exists(view.location if view else sources.split(spec)[0]):
        return [(spec, True)]
    try:
        patterns = list(islice(braceexpand(spec, escape=False), MAX_SHARDS + 1))
    except ValueError as error:
        raise NoShardError(f"braces in '{spec}': {error}; write {{00000..00010}} or {{a,b}}") from error
    if len(patterns) > MAX_SHARDS:
        raise NoShardError(f"'{spec}' names more than {MAX_SHARDS} shards; split it")
    return [(pattern, False) for pattern in patterns]


def _list_pattern(named: tuple[str, bool]) -> list[str]:
    """The shards that a pattern without braces matches; web addresses are taken as they are, unlisted."""
    pattern, is_literal = named
    if view := sources.parse(pattern):
        return [replace(view, location=sources.absolute(view.location)).url]
    pattern, options = sources.split(pattern)
    if pattern.startswith(_WEB) and not sources.is_source(pattern):
        return [pattern]
    is_folder = False
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        if not is_literal and re.search(r"[*?\[]", path):
            paths = sorted(filesystem.glob(path))
            paths = list(filter(is_tar, paths)) or list(filter(sources.is_table, paths))
        elif is_folder := filesystem.info(path)["type"] == "directory":
            paths = _tars_of_folder(pattern, sorted(filesystem.ls(path, detail=False))) or [path]
        else:
            paths = [path]
        is_local = "file" in ((filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol)
        urls = paths if is_local else [path if "://" in path else filesystem.unstrip_protocol(path) for path in paths]
        found = [url for one in urls for url in _shards_at(one, options, is_folder)]
    except FileNotFoundError:
        found = []
    except (OSError, ValueError, ImportError) as error:
        raise ShardError(f"cannot list the shards at '{pattern}': {error}") from error
    if not found:
        raise NoShardError(f"no shard found at '{pattern}'; {ALLOWED}")
    return found


def _tars_of_folder(folder: str, paths: Sequence[str]) -> list[str]:
    """The tars of a folder. NoShardError where pictures lie beside them, of which none would be read."""
    tars = list(filter(is_tar, paths))
    names = [path.rpartition("/")[2] for path in paths] if tars else []
    pictures = [name for name in names if name.rpartition(".")[2].lower() in IMAGES and not name.startswith(".")]
    if pictures:
        raise NoShardError(
            f"{folder} holds tars and pictures ({pictures[0]}): give the tars as {folder.rstrip('/')}/*.tar, or put the"
            " pictures into a folder of their own."
        )
    return tars


def _shards_at(url: str, options: Mapping[str, str], is_folder: bool) -> list[str]:
    """A tar itself, or the views of a source."""
    if is_tar(url) or not (is_folder or sources.is_source(url)):
        sources.check_options(url, options, ())
        if url.endswith(LISTS):
            raise NoShardError(
                f"{url} is a list: give the folder of the pictures that it names, or fetch its URLs first with `capfilt"
                f" download {url} --out SHARDS`."
            )
        return [url]
    return sources.expand(url.rstrip("/"), options, is_folder)
