"""Pictures that are files of a folder, each with the files of the same name beside it and what a list says of it.

They are put together as the members of a tar are (`groups.Group`), so that what fails there fails here for the same
reason. Only files that were listed are opened: a name from a list leads nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.groups import Group
from capfilt.data.shards.members import IMAGES, MAX_IMAGE, MAX_TEXT, Member, MemberCounts
from capfilt.data.shards.sources import rows
from capfilt.data.shards.sources.rows import Row
from capfilt.data.shards.sources.view import failed
from capfilt.errors import ImageError
from capfilt.storage.paths import map_concurrent, storage_path
from capfilt.storage.remote_path import RemotePath


@dataclass(frozen=True)
class Entry:
    """One sample that is to be read."""

    key: str
    files: tuple[str, ...] = ()
    """Paths below the folder: of the picture, its txt, its json."""
    row: Row | None = None
    problem: str = ""
    """Why there is none."""


def read(folder: str, entries: Sequence[Entry], counts: MemberCounts) -> Iterator[Sample | FailedSample]:
    """The samples of these entries, in order; an outcome for each."""
    seen = set[str]()
    for entry in entries:
        if entry.problem:
            yield failed(entry.key, entry.problem)
            continue
        group = Group(entry.key)
        for number, path in enumerate(entry.files):
            group.add(_member(folder, path, entry.key, number))
        counts["in"] += len(group.parts)
        item = group.outcome(seen, counts)
        yield rows.with_row(item, entry.row) if entry.row and isinstance(item, Sample) else item


def stat(folder: str, entries: Sequence[Entry], lists: Sequence[Any] = ()) -> dict[str, Any]:
    """As `shards.stat`: the bytes of all files together, and as version a digest of their paths, sizes and times of
    writing, and of what `lists` say of the files that name them."""
    root = storage_path(folder)
    paths = [path for entry in entries for path in entry.files]
    infos = map_concurrent(lambda path: (root / path).stat(), paths, isinstance(root, RemotePath))
    times = [(path, info.st_size, info.st_mtime) for path, info in zip(paths, infos, strict=True)]
    known = repr([*times, *([tuple(lists)] if lists else [])])
    return {"size": sum(size for _, size, _ in times), "version": hashlib.sha256(known.encode()).hexdigest()}


def read_picture(folder: str, path: str) -> bytes:
    """The bytes of a picture below a folder. ImageError where it is gone, or larger than a shard may have."""
    return _bytes(folder, path, MAX_IMAGE, "picture")


def _bytes(folder: str, path: str, limit: int, what: str) -> bytes:
    try:
        with (storage_path(folder) / path).open("rb") as file:
            data: bytes = file.read(limit + 1)
    except (FileNotFoundError, PermissionError) as error:
        raise ImageError(f"the {what} cannot be opened: {path}, {type(error).__name__}") from error
    if len(data) > limit:
        raise ImageError(f"a {what} larger than {limit // 2**20} MiB")
    return data


def _member(folder: str, path: str, key: str, number: int) -> Member:
    """A file as the member of a tar; of a picture that is not read (gif) no byte is."""
    extension = path.rpartition(".")[2].lower()
    is_text = extension in ("txt", "json")
    if not is_text and extension not in IMAGES:
        return Member(number, key, extension, 0, 0)
    try:
        data = _bytes(folder, path, MAX_TEXT if is_text else MAX_IMAGE, extension if is_text else "picture")
    except ImageError as error:
        return Member(number, key, extension, 0, 0, problem=str(error).partition(":")[0])
    return Member(number, key, extension, 0, len(data), data)
