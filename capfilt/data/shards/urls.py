"""Which shards a spec names (braces, globs, folders, lists of URLs), and the name that each has in a run's records."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial
from itertools import islice
from pathlib import Path

import fsspec
from braceexpand import braceexpand

from capfilt.data.shards import pictures
from capfilt.errors import NoShardError, ShardError
from capfilt.redact import is_redacted
from capfilt.storage.paths import map_concurrent

ALLOWED = "allowed are tars, folders of tars, braces, globs, a::b lists and fsspec URLs"
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_SHARDS = 1_000_000
MAX_NAME = 100
"""Characters of a shard's name that its folders are part of; four bytes each at most, and file systems take 255."""

_WEB = ("http://", "https://")
_UNSAFE = re.compile(r"[^\w.-]")


def expand(spec: str | Sequence[str], plain_pictures: bool = False) -> list[str]:
    """List the shards that `spec` names, in order: tars, folders of tars, `{0..9}` braces, globs, `a::b`, fsspec URLs.

    Local paths come back absolute, so that a worker with another working directory finds them. `::` always separates
    shards here (open_clip's habit), so fsspec's chained URLs cannot be used.

    Args:
        plain_pictures: whether a folder without tars may be one of pictures (`shards.pictures`).

    Raises:
        NoShardError: a part of `spec` names nothing, or more than `MAX_SHARDS`.
    """
    named = patterns(spec)
    remote = on_a_store(pattern for pattern, _ in named)
    of_pattern = partial(_list_pattern, plain_pictures=plain_pictures)
    return [url for urls in map_concurrent(of_pattern, named, remote) for url in urls]


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


def on_a_store(urls: Iterable[str]) -> bool:
    """Whether any of these lies on a store, whose every answer is a wait, so that many are asked at once."""
    return any("://" in url and not url.startswith((*_WEB, "file://", "local://")) for url in urls)


def name(url: str) -> str:
    """Name a shard by its file, `s3://bucket/00000.tar` -> `00000`: its records go by this name."""
    if pictures.is_pictures(url):
        folder, first, _ = pictures.split(url)
        return f"{folder.rpartition('/')[2]}-{first:06d}"
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
    paths = [(url.split("?")[0] if url.startswith(_WEB) else url).rpartition("://")[2] for url in urls]
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
    if os.path.exists(spec):
        return [(spec, True)]
    try:
        patterns = list(islice(braceexpand(spec, escape=False), MAX_SHARDS + 1))
    except ValueError as error:
        raise NoShardError(f"braces in '{spec}': {error}; write {{00000..00010}} or {{a,b}}") from error
    if len(patterns) > MAX_SHARDS:
        raise NoShardError(f"'{spec}' names more than {MAX_SHARDS} shards; split it")
    return [(pattern, False) for pattern in patterns]


def _list_pattern(named: tuple[str, bool], plain_pictures: bool) -> list[str]:
    """The shards that a pattern without braces matches; web addresses are taken as they are, unlisted."""
    pattern, is_literal = named
    if pattern.startswith(_WEB):
        return [pattern]
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        if not is_literal and re.search(r"[*?\[]", path):
            paths = [path for path in sorted(filesystem.glob(path)) if is_tar(path)]
        elif filesystem.info(path)["type"] == "directory":
            paths = [inner for inner in sorted(filesystem.ls(path, detail=False)) if is_tar(inner)]
            if not paths and plain_pictures:
                paths = pictures.shards_of_folder(filesystem.unstrip_protocol(path) if "://" in pattern else path)
        else:
            paths = [path]
    except FileNotFoundError:
        paths = []
    except (OSError, ValueError, ImportError) as error:
        raise ShardError(f"cannot list the shards at '{pattern}': {error}") from error
    if not paths:
        allowed = f"{ALLOWED}, and folders of pictures" if plain_pictures else ALLOWED
        raise NoShardError(f"no shard found at '{pattern}'; {allowed}")
    local = "file" in ((filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol)
    return paths if local else [path if "://" in path else filesystem.unstrip_protocol(path) for path in paths]
