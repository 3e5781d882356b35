"""Which shards are meant: braces, globs, folders and lists of URLs, and the name that each shard goes by."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import islice
from pathlib import Path

import fsspec
from braceexpand import braceexpand

from capfilt.errors import ShardError
from capfilt.redact import is_redacted
from capfilt.storage.paths import map_concurrent

ALLOWED = "allowed are tars, folders of tars, braces, globs, a::b lists and fsspec URLs"


TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


MAX_SHARDS = 1_000_000


MAX_NAME = 100
"""Characters of a shard's name that its folders are part of; four bytes each at most, and file systems take 255."""


_WEB = ("http://", "https://")


_UNSAFE = re.compile(r"[^\w.-]")


def expand(spec: str | Sequence[str]) -> list[str]:
    """List the shards that `spec` names, in order: tars, folders of tars, `{0..9}` braces, globs, `a::b`,
    fsspec URLs.

    Local paths come back absolute, so that a worker with another working directory finds them. `::` always
    separates shards here (open_clip's habit), so fsspec's chained URLs cannot be used.

    Raises:
        ShardError: a part of `spec` names nothing, or more than `MAX_SHARDS`.
    """
    asked = patterns(spec)
    return [url for hits in map_concurrent(_find, asked, on_a_store(pattern for pattern, _ in asked)) for url in hits]


def patterns(spec: str | Sequence[str]) -> list[tuple[str, bool]]:
    """The paths, globs and URLs that `spec` is made of, nothing looked up; True: it is to be taken letter by letter."""
    parts = [spec] if isinstance(spec, str) else list(spec)
    pieces = [piece for part in parts for piece in part.split("::") if piece]
    if not pieces:
        raise ShardError(f"no shards given; {ALLOWED}")
    if lacking := next((piece for piece in pieces if is_redacted(piece)), None):
        raise ShardError(f"{lacking} lacks a secret, which run folders do not keep; give the address in full")
    return [pattern for piece in pieces for pattern in _expand_braces(piece)]


def on_a_store(urls: Iterable[str]) -> bool:
    """Whether any of these lies where each question is a wait, so that many are asked at once."""
    return any("://" in url and not url.startswith((*_WEB, "file://", "local://")) for url in urls)


def name(url: str) -> str:
    """Name a shard by its file, `s3://bucket/00000.tar` -> `00000`: its records go by this name."""
    base = (url.split("?")[0] if url.startswith(_WEB) else url).rpartition("/")[2]
    for suffix in TARS:
        if base.endswith(suffix) and base != suffix:
            return base.removesuffix(suffix)
    return Path(base).stem


def by_name(urls: Iterable[str]) -> dict[str, str]:
    """Map the names by which a run's records know shards to their urls, in the order given.

    A name is that of the file. Where several files share one, as in two folders with a `00000.tar` each, so many of the
    folders above stand before it as tell them apart, `p0-00000` and `p1-00000`; where these do not, a hash of the url
    stands behind it. What else is in the set decides, not its order.

    Raises:
        ShardError: a shard is given twice.
    """
    urls = list(urls)
    same: dict[str, list[str]] = {}
    for url in urls:
        same.setdefault(name(url), []).append(url)
    for own in same.values():
        if twice := [url for url in own if own.count(url) > 1]:
            raise ShardError(f"the shard {twice[0]} is given twice; give each shard once.")
    taken = {found.casefold() for found, own in same.items() if len(own) == 1}
    names = {own[0]: found for found, own in same.items() if len(own) == 1}
    for found, own in sorted(same.items()):
        if len(own) > 1:
            names |= zip(own, _told_apart(found, own, taken), strict=True)
            taken |= {names[url].casefold() for url in own}
    return {names[url]: url for url in urls}


def renamed(named: Mapping[str, str]) -> dict[str, str]:
    """By their urls, those of `by_name` that are not called as their file is."""
    return {url: given for given, url in named.items() if given != name(url)}


def _told_apart(shared: str, urls: Sequence[str], taken: Set[str]) -> list[str]:
    """Names for shards whose files are called alike."""
    paths = [(url.split("?")[0] if url.startswith(_WEB) else url).rpartition("://")[2] for url in urls]
    folders = [[_UNSAFE.sub("_", part) for part in path.split("/")[:-1] if part] for path in paths]
    for depth in range(1, max(map(len, folders)) + 1):
        names = ["-".join((*own[-depth:], shared)).lstrip(".-") for own in folders]
        distinct = {given.casefold() for given in names}
        if len(distinct) == len(urls) and not distinct & taken and max(map(len, names)) <= MAX_NAME:
            return names
    return [f"{shared}-{hashlib.sha256(url.encode()).hexdigest()[:12]}" for url in urls]


def is_tar(path: str) -> bool:
    """By its name; what a Mac writes beside each file (`._00000.tar`) is none."""
    return path.endswith(TARS) and not path.rpartition("/")[2].startswith("._")


def _expand_braces(piece: str) -> list[tuple[str, bool]]:
    """The patterns of a piece, each with whether it is to be taken letter by letter."""
    if os.path.exists(piece):
        return [(piece, True)]
    try:
        patterns = list(islice(braceexpand(piece, escape=False), MAX_SHARDS + 1))
    except ValueError as error:
        raise ShardError(f"braces in '{piece}': {error}; write {{00000..00010}} or {{a,b}}") from error
    if len(patterns) > MAX_SHARDS:
        raise ShardError(f"'{piece}' names more than {MAX_SHARDS} shards; split it")
    return [(pattern, False) for pattern in patterns]


def _find(asked: tuple[str, bool]) -> list[str]:
    """The shards behind one pattern without braces; web addresses are taken as they are, unlisted."""
    pattern, literal = asked
    if pattern.startswith(_WEB):
        return [pattern]
    try:
        files, path = fsspec.core.url_to_fs(pattern)
        if not literal and re.search(r"[*?\[]", path):
            hits = [hit for hit in sorted(files.glob(path)) if is_tar(hit)]
        elif files.info(path)["type"] == "directory":
            hits = [hit for hit in sorted(files.ls(path, detail=False)) if is_tar(hit)]
        else:
            hits = [path]
    except FileNotFoundError:
        hits = []
    except (OSError, ValueError, ImportError) as error:
        raise ShardError(f"cannot look for shards at '{pattern}': {error}") from error
    if not hits:
        raise ShardError(f"no shard found at '{pattern}'; {ALLOWED}")
    local = "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)
    return hits if local else [files.unstrip_protocol(hit) for hit in hits]
