"""Shards as files: opened, hashed while they are read, told apart, written.

A shard's identity is what its storage says of it (size, time of writing or etag), so that no shard is read to know that
it is the same.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import IO, Any

import fsspec

from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards import gather, sources
from capfilt.data.shards.keys import key_problem, tar_key
from capfilt.data.shards.lines import lines
from capfilt.data.shards.members import IMAGES, MAX_IMAGE, MAX_TEXT, MemberCounts
from capfilt.data.shards.tar import tar_header
from capfilt.data.shards.unpack import Readable
from capfilt.data.shards.urls import ALLOWED, is_tar, name, on_a_store
from capfilt.errors import ShardError, StorageError
from capfilt.runs import deadline
from capfilt.runs.ledger import Input
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.paths import StoragePath, map_concurrent, storage_path


class Digest:
    """Hashes and counts the bytes of a shard while `read` reads it.

    `version`: what `stat` said before; should the shard change while it is read, it is another version afterwards.
    """

    def __init__(self, version: str = "") -> None:
        self._version = version
        self._hash = hashlib.sha256()
        self._num_bytes = 0
        self._is_finished = False

    def result(self) -> Input | None:
        """Size, sha256 and version of what was read; None unless it was all of the shard."""
        return Input(self._num_bytes, self._hash.hexdigest(), self._version) if self._is_finished else None

    def update(self, data: bytes) -> bytes:
        """Hash some bytes; returns them."""
        self._hash.update(data)
        self._num_bytes += len(data)
        return data

    def finish(self, stream: IO[bytes], num_bytes: int | None = None) -> None:
        """Hash the rest: a tar ends before its file does. `num_bytes`: of a view, as its storage counts them."""
        while self.update(stream.read(2**20)):
            pass
        self._num_bytes = self._num_bytes if num_bytes is None else num_bytes
        self._is_finished = True


class _Hashed:
    """A stream whose every read is hashed."""

    def __init__(self, stream: IO[bytes], digest: Digest):
        self._stream, self._digest = stream, digest

    def read(self, size: int = -1) -> bytes:
        return self._digest.update(self._stream.read(size))


def read(
    url: str, digest: Digest | None = None, members: MemberCounts | None = None, extras: bool = False
) -> Iterator[Sample | FailedSample]:
    """Stream the samples of one shard in the tar's order; memory holds one sample, and the keys so far.

    Keys follow webdataset's rule where that gives images with texts; `gather.py` has the other cases. Every key yields
    one outcome, and a key that comes again a FailedSample of its own. A tar cut in the middle yields what came before,
    then one FailedSample.

    Args:
        digest: hashes all bytes of the file, also those after the tar's end.
        members: counts the members by what became of them.
        extras: whether samples have all that lies under their key.

    Raises:
        ShardError: the shard does not exist, or its storage failed while it was read.
    """
    counts = MemberCounts() if members is None else members
    if view := sources.parse(url):
        yield from _read_view(url, view, digest or Digest(), counts)
        return
    with _opened(url, digest) as stream:
        for item in gather.samples(stream, lambda: closing(_open(url)), name(url), counts, extras):
            # Masks and further jsons were read before it was known what they are.
            yield replace(item, extras={}) if isinstance(item, Sample) and item.extras and not extras else item


def _read_view(url: str, view: sources.View, digest: Digest, counts: MemberCounts) -> Iterator[Sample | FailedSample]:
    """A part of what is no tar; hashed of it are the keys, pictures, texts and jsons of its samples."""
    source = sources.source_of(view)
    with _storage_errors(url):
        size = source.stat(view)["size"]
        for item in source.read(view, counts):
            deadline.check()
            digest.update(item.key.encode())
            if isinstance(item, Sample):
                digest.update(item.image)
                if item.text or item.meta:
                    digest.update(json.dumps([item.text, item.meta], default=str).encode())
            yield item
        digest.finish(io.BytesIO(), size)


def read_lines(url: str, digest: Digest | None = None) -> Iterator[Sample | FailedSample]:
    """Stream the texts of a file of lines, as samples without a picture; arguments and errors as of `read`."""
    with _opened(url, digest) as stream:
        yield from lines(stream)


def read_input(url: str) -> Input:
    """Read a shard to its end; its size and sha256. ShardError where it cannot be read."""
    digest = Digest()
    if view := sources.parse(url):
        for _ in _read_view(url, view, digest, MemberCounts()):
            pass
    else:
        with _opened(url, digest):
            pass  # it is read to its end
    result = digest.result()
    assert result is not None, "it was read to its end"
    return result


# ---- what storage says of shards ----


def stats(urls: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`stat` of each shard, by its url."""
    return dict(zip(urls, map_concurrent(stat, urls, on_a_store(urls)), strict=True))


def identity(url: str, stat_of_it: dict[str, Any] | None = None) -> dict[str, Any]:
    """What tells a shard from all others: its `stat`, with the URL where the storage gives no version (web servers).

    So shards may be moved, where two of one name and size cannot be confused.
    """
    known = stat_of_it or stat(url)
    return known if known["version"] else {**known, "url": url}


def identities(stats: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`identity` of many shards, given their `stats`; with the URL also where two of them have the same."""
    known = {url: identity(url, stat_of_it) for url, stat_of_it in stats.items()}
    counts = Counter(map(repr, known.values()))
    return {url: one if counts[repr(one)] == 1 else {**one, "url": url} for url, one in known.items()}


def stat(url: str) -> dict[str, Any]:
    """What tells one version of a shard from another without reading it: its name, size in bytes, and mtime or etag.
    ShardError where there is no such shard, or its storage did not answer."""
    try:
        if view := sources.parse(url):
            return {"name": view.name, **sources.source_of(view).stat(view)}
        files, path = fsspec.core.url_to_fs(url)
        info = files.info(path)
    except FileNotFoundError:
        raise ShardError(f"there is no shard {url}: check the path.") from None
    except (OSError, ValueError) as error:
        raise _error(f"{url} cannot be examined: {error}", error) from error
    return {"name": name(url), "size": info.get("size"), "version": sources.version_of(info)}


def write(path: StoragePath | str, samples: Iterable[Sample]) -> int:
    """Write `samples` as a GNU tar, in the order given, under a temporary name until it is whole; returns their number.

    A key with dots is written without (`tar_key`), and the json has it as `original_key`. The same samples give the
    same bytes: no times, no owners, json in the order it came.

    Raises:
        ShardError: a key that readers would cut elsewhere or skip, a key given twice, an extension that is no
            image's, a text or json that cannot be written.
    """
    seen: set[str] = set()
    with atomic(storage_path(path)) as file:
        num_blocks = 2  # that end a tar
        for sample in samples:
            if problem := key_problem(sample.key, seen):
                raise ShardError(f"{path}: cannot write key {sample.key!r}: {problem}")
            key = tar_key(sample.key)
            seen.add(key)
            for extension, data in _encode(sample, {} if key == sample.key else {"original_key": sample.key}):
                header = tar_header(f"{key}.{extension}", len(data))
                padding = bytes(-len(data) % tarfile.BLOCKSIZE)
                file.write(b"".join((header, data, padding)))
                num_blocks += (len(header) + len(data) + len(padding)) // tarfile.BLOCKSIZE
        file.write(bytes(2 * tarfile.BLOCKSIZE + -num_blocks * tarfile.BLOCKSIZE % tarfile.RECORDSIZE))
    return len(seen)


def write_sizes(folder: StoragePath | str, counts: Mapping[str, int] | None = None) -> StoragePath:
    """Write `sizes.json` ({"00000.tar": samples}) beside the tars of `folder`, as open_clip reads it.

    `counts`: the number of samples by file name where the caller knows it, else every tar is read once.
    """
    if counts is None:
        tars: list[StoragePath] = sorted(tar for tar in storage_path(folder).glob("*.tar") if is_tar(tar.name))
        counts = {tar.name: sum(isinstance(item, Sample) for item in read(str(tar))) for tar in tars}
    path = storage_path(folder) / "sizes.json"
    write_json(path, dict(counts))
    return path


_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, gzip.BadGzipFile)
"""Errors of storage that another try would meet again."""


def _error(message: str, cause: Exception) -> ShardError:
    """A ShardError; a StorageError where another try may succeed."""
    is_transient = isinstance(cause, OSError) and not isinstance(cause, _PERMANENT)
    return (StorageError if is_transient else ShardError)(message)


@contextmanager
def _storage_errors(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _error(f"reading {url} failed: {error}. The storage failed: run again.", error) from error


@contextmanager
def _opened(url: str, digest: Digest | None) -> Iterator[Readable]:
    """Open a shard; with a digest it is hashed as the block reads it, and then to its end.

    ShardError where it is not there, or its storage fails in the block.
    """
    with closing(_open(url)) as stream, _storage_errors(url):
        yield stream if digest is None else _Hashed(stream, digest)
        if digest is not None:
            digest.finish(stream)


def _encode(sample: Sample, more_meta: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """The members of a sample, extension and data; its json has `more_meta` too."""
    if sample.extension not in IMAGES:
        raise ShardError(f"{sample.key}: extension '{sample.extension}'; allowed are {', '.join(IMAGES)}")
    try:
        text = sample.text.encode("utf-8")
        # A lone surrogate (json can spell one, UTF-8 cannot) becomes \udXXX: in a json string, exactly its escape.
        whole = {**sample.meta, **more_meta}
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


def _open(url: str) -> Any:
    try:
        return fsspec.open(url, "rb").open()
    except FileNotFoundError as error:
        raise ShardError(f"no shard at {url}; {ALLOWED}") from error
    except (OSError, ValueError, ImportError) as error:
        raise _error(f"cannot open shard {url}: {error}", error) from error
