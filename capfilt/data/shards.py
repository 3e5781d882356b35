"""Shards: tars of samples in img2dataset's layout, found (`expand`), streamed (`read`) and written (`write`).

Nothing is ever extracted to disk, and a broken shard is not an exception: `read` yields what can be read and
one `Fault` for each key that cannot. Only what the user can mend (a missing file, a dead connection) is
raised, as `ShardError`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import fsspec
from braceexpand import braceexpand

from capfilt.data import gather
from capfilt.data.members import IMAGES, MAX_IMAGE, MAX_TEXT, Members, key_problem, written
from capfilt.data.sample import Fault, Sample
from capfilt.errors import ShardError, StorageError
from capfilt.redact import is_redacted
from capfilt.reports.ledger import Input, atomic, write_json
from capfilt.reports.places import Place, place, together

_ALLOWED = "allowed are tars, folders of tars, braces, globs, a::b lists and fsspec URLs"
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
    return [url for hits in together(_find, asked, on_a_store(pattern for pattern, _ in asked)) for url in hits]


def patterns(spec: str | Sequence[str]) -> list[tuple[str, bool]]:
    """The paths, globs and URLs that `spec` is made of, nothing looked up; True: it is to be taken letter by letter."""
    parts = [spec] if isinstance(spec, str) else list(spec)
    pieces = [piece for part in parts for piece in part.split("::") if piece]
    if not pieces:
        raise ShardError(f"no shards given; {_ALLOWED}")
    if lacking := next((piece for piece in pieces if is_redacted(piece)), None):
        raise ShardError(f"{lacking} lacks a secret, which run folders do not keep; give the address in full")
    return [pattern for piece in pieces for pattern in _expand_braces(piece)]


def on_a_store(urls: Iterable[str]) -> bool:
    """Whether any of these lies where each question is a wait, so that many are asked at once."""
    return any("://" in url and not url.startswith((*_WEB, "file://", "local://")) for url in urls)


def stats(urls: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`stat` of each shard."""
    return dict(zip(urls, together(stat, urls, on_a_store(urls)), strict=True))


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


class Digest:
    """The sha256 and the size of a shard, taken while `read` goes through it.

    `version` is what `stat` said before: should the shard change while it is read, it is another version afterwards.
    """

    def __init__(self, version: str = "") -> None:
        self._version = version
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._whole = False

    def taken(self) -> Input | None:
        """What was read; None unless it was all of the shard."""
        return Input(self._bytes, self._hash.hexdigest(), self._version) if self._whole else None

    def of(self, stream: IO[bytes]) -> _Hashed:
        """The same stream, hashed as it is read."""
        return _Hashed(stream, self)

    def add(self, data: bytes) -> bytes:
        """Take up some bytes; returns them."""
        self._hash.update(data)
        self._bytes += len(data)
        return data

    def end(self, stream: IO[bytes]) -> None:
        """Take up the rest: a tar ends before its file does."""
        while self.add(stream.read(2**20)):
            pass
        self._whole = True


class _Hashed:
    """As much of a file as a tar is read by."""

    def __init__(self, stream: IO[bytes], digest: Digest):
        self._stream, self._digest = stream, digest

    def read(self, size: int = -1) -> bytes:
        return self._digest.add(self._stream.read(size))


def read(
    url: str, digest: Digest | None = None, members: Members | None = None, extras: bool = False
) -> Iterator[Sample | Fault]:
    """Stream the samples of one shard in the tar's order; one sample, and the keys seen, are in memory.

    Keys follow webdataset's rule where that gives images with texts, and `gather.py` says what else. Every key yields
    one outcome, and a key met again a Fault of its own. A tar cut in the middle yields what came before, then one
    Fault. A `digest` is given every byte on its way, and what comes after the tar's end. `members` are counted, each
    once. With `extras` samples have all of what lies under their key.

    Raises:
        ShardError: the shard does not exist, or its storage failed while it was read.
    """
    counted = Members() if members is None else members
    with closing(_opened(url)) as stream:
        try:
            source = digest.of(stream) if digest else stream
            for item in gather.samples(source, lambda: closing(_opened(url)), name(url), counted, extras):
                # Masks and further jsons were read before it was known what they are.
                yield replace(item, extras={}) if isinstance(item, Sample) and item.extras and not extras else item
            if digest:
                digest.end(stream)
        except OSError as error:
            raise _storage_failed(url, error) from error


def input_now(url: str) -> Input:
    """The sha256 and the size of a shard as it lies there now. ShardError where it cannot be read."""
    digest = Digest()
    with closing(_opened(url)) as stream:
        try:
            digest.end(stream)
        except OSError as error:
            raise _storage_failed(url, error) from error
    found = digest.taken()
    assert found is not None, "it was read to its end"
    return found


def known(url: str, found: dict[str, Any] | None = None) -> dict[str, Any]:
    """What tells a shard from all others: its `stat`, and where storage tells no version (a web server may not) the
    address too. So shards may be moved, where that does not mix two of one name and size up."""
    found = found or stat(url)
    return found if found["version"] else {**found, "url": url}


def known_apart(found: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`known` of many shards, given their `stats`; with the address also where all else is the same of two of them."""
    told = {url: known(url, stat) for url, stat in found.items()}
    times = Counter(map(repr, told.values()))
    return {url: own if times[repr(own)] == 1 else {**own, "url": url} for url, own in told.items()}


def stat(url: str) -> dict[str, Any]:
    """What tells one version of a shard from another without reading it: its name, size, and mtime or etag.

    Raises:
        ShardError: there is no such shard, or its storage did not answer.
    """
    try:
        files, path = fsspec.core.url_to_fs(url)
        info = files.info(path)
    except FileNotFoundError:
        raise ShardError(f"there is no shard {url}: check the path.") from None
    except (OSError, ValueError) as error:
        raise _trouble(f"{url} cannot be looked at: {error}", error) from error
    version = next((str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified") if info.get(key)), "")
    return {"name": name(url), "size": info.get("size"), "version": version}


def content(url: str) -> dict[str, Any]:
    """As `stat`, for files that a run makes itself and may make again: without the time of writing."""
    return {key: value for key, value in stat(url).items() if key != "version"}


def write(path: Place | str, samples: Iterable[Sample]) -> int:
    """Write `samples` as a GNU tar, in the order given, under a temporary name until it is whole; return how
    many.

    A key with dots is written without (`written`), and the json says it as `original_key`. The same samples give the
    same bytes: no times, no owners, json in the order it came.

    Raises:
        ShardError: a key that readers would cut elsewhere or skip, a key given twice, an extension that is no
            image's, a text or json that cannot be written.
    """
    seen: set[str] = set()
    with atomic(place(path)) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            if problem := key_problem(sample.key, seen):
                raise ShardError(f"{path}: cannot write key {sample.key!r}: {problem}")
            key = written(sample.key)
            seen.add(key)
            for extension, data in _encode(sample, {} if key == sample.key else {"original_key": sample.key}):
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return len(seen)


def write_sizes(folder: Place | str, counts: Mapping[str, int] | None = None) -> Place:
    """Write `sizes.json` ({"00000.tar": samples}) beside the tars of `folder`, as open_clip reads it.

    Args:
        counts: the number of samples by file name where the caller knows it, else every tar is read once.
    """
    if counts is None:
        tars: list[Place] = sorted(tar for tar in place(folder).glob("*.tar") if _is_tar(tar.name))
        counts = {tar.name: sum(isinstance(found, Sample) for found in read(str(tar))) for tar in tars}
    path = place(folder) / "sizes.json"
    write_json(path, dict(counts))
    return path


_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, gzip.BadGzipFile)
"""What storage says no less when it is asked again."""


def _trouble(said: str, error: Exception) -> ShardError:
    passing = isinstance(error, OSError) and not isinstance(error, _LASTING)
    return (StorageError if passing else ShardError)(said)


def _storage_failed(url: str, error: OSError) -> ShardError:
    return _trouble(f"reading {url} failed: {error}. The storage failed: run again.", error)


def _encode(sample: Sample, more: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """The members of a sample by extension; its json says `more`."""
    if sample.extension not in IMAGES:
        raise ShardError(f"{sample.key}: extension '{sample.extension}'; allowed are {', '.join(IMAGES)}")
    try:
        text = sample.text.encode("utf-8")
        # A lone surrogate (json can spell one, UTF-8 cannot) becomes \udXXX: in a json string, exactly its
        # escape.
        whole = {**sample.meta, **more}
        canonical = json.dumps(whole, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        meta = canonical.encode("utf-8", "backslashreplace")
    except (ValueError, TypeError, RecursionError) as error:
        raise ShardError(f"{sample.key}: its text or json cannot be written: {error}") from error
    if len(sample.image) > MAX_IMAGE or len(text) > MAX_TEXT or len(meta) > MAX_TEXT:
        raise ShardError(f"{sample.key}: too large; allowed are {MAX_IMAGE} bytes of image, {MAX_TEXT} of text or json")
    yield sample.extension, sample.image
    yield "txt", text
    yield "json", meta
    yield from sample.extras.items()


def _opened(url: str) -> Any:
    try:
        return fsspec.open(url, "rb").open()
    except FileNotFoundError as error:
        raise ShardError(f"no shard at {url}; {_ALLOWED}") from error
    except (OSError, ValueError, ImportError) as error:
        raise _trouble(f"cannot open shard {url}: {error}", error) from error


def _is_tar(path: str) -> bool:
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
            hits = [hit for hit in sorted(files.glob(path)) if _is_tar(hit)]
        elif files.info(path)["type"] == "directory":
            hits = [hit for hit in sorted(files.ls(path, detail=False)) if _is_tar(hit)]
        else:
            hits = [path]
    except FileNotFoundError:
        hits = []
    except (OSError, ValueError, ImportError) as error:
        raise ShardError(f"cannot look for shards at '{pattern}': {error}") from error
    if not hits:
        raise ShardError(f"no shard found at '{pattern}'; {_ALLOWED}")
    local = "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)
    return hits if local else [files.unstrip_protocol(hit) for hit in hits]
