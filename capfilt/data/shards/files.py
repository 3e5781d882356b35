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
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import IO, Any

import fsspec

from capfilt.data.sample import Fault, Sample
from capfilt.data.shards import gather
from capfilt.data.shards.members import IMAGES, MAX_IMAGE, MAX_TEXT, Members, key_problem, written
from capfilt.data.shards.urls import ALLOWED, is_tar, name, on_a_store
from capfilt.errors import ShardError, StorageError
from capfilt.runs.ledger import Input
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.paths import StoragePath, map_concurrent, storage_path


def stats(urls: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`stat` of each shard."""
    return dict(zip(urls, map_concurrent(stat, urls, on_a_store(urls)), strict=True))


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


def write(path: StoragePath | str, samples: Iterable[Sample]) -> int:
    """Write `samples` as a GNU tar, in the order given, under a temporary name until it is whole; return how
    many.

    A key with dots is written without (`written`), and the json says it as `original_key`. The same samples give the
    same bytes: no times, no owners, json in the order it came.

    Raises:
        ShardError: a key that readers would cut elsewhere or skip, a key given twice, an extension that is no
            image's, a text or json that cannot be written.
    """
    seen: set[str] = set()
    with atomic(storage_path(path)) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
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


def write_sizes(folder: StoragePath | str, counts: Mapping[str, int] | None = None) -> StoragePath:
    """Write `sizes.json` ({"00000.tar": samples}) beside the tars of `folder`, as open_clip reads it.

    Args:
        counts: the number of samples by file name where the caller knows it, else every tar is read once.
    """
    if counts is None:
        tars: list[StoragePath] = sorted(tar for tar in storage_path(folder).glob("*.tar") if is_tar(tar.name))
        counts = {tar.name: sum(isinstance(found, Sample) for found in read(str(tar))) for tar in tars}
    path = storage_path(folder) / "sizes.json"
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
        raise ShardError(f"no shard at {url}; {ALLOWED}") from error
    except (OSError, ValueError, ImportError) as error:
        raise _trouble(f"cannot open shard {url}: {error}", error) from error
