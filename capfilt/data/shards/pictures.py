"""A plain folder of pictures, read as shards: 1,000 pictures of the sorted list are one, and nothing is copied.

Such a shard is named by the URL of its folder and the places of its pictures, `/data/coco#pictures=0-999`. A picture
has its path below the folder as its key, a uid of its bytes, and no text. Links to folders are followed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.members import IMAGES, MAX_IMAGE, PICTURES
from capfilt.errors import ImageError
from capfilt.storage.paths import map_concurrent, storage_path
from capfilt.storage.remote_path import RemotePath

PICTURES_EACH = 1000
_PLACES = re.compile(r"#pictures=(\d{1,12})-(\d{1,12})$")


def is_pictures(url: str) -> bool:
    """Whether a shard is a part of a folder of pictures, by its URL."""
    return _PLACES.search(url) is not None


def split(url: str) -> tuple[str, int, int]:
    """The folder of such a shard, and the places of its first and last picture in the sorted list."""
    match = _PLACES.search(url)
    assert match is not None, f"{url} is no part of a folder of pictures"
    return url[: match.start()], int(match[1]), int(match[2])


def shards_of_folder(folder: str) -> list[str]:
    """The URLs of the shards of a folder of pictures; [] where there is no picture below it."""
    count = sum(1 for _ in list_pictures(folder))
    starts = range(0, count, PICTURES_EACH)
    return [f"{folder.rstrip('/')}#pictures={start}-{min(start + PICTURES_EACH, count) - 1}" for start in starts]


def read(url: str) -> Iterator[Sample | FailedSample]:
    """The pictures of a shard in the order of their paths; one that cannot be read, or is none of IMAGES, fails."""
    folder, _, _ = split(url)
    for path in _paths(url):
        extension = path.rpartition(".")[2].lower()
        if extension not in IMAGES:
            yield FailedSample(path, f"a {extension}; read are {', '.join(IMAGES)}")
            continue
        try:
            yield Sample(path, read_picture(folder, path), extension, "")
        except ImageError as error:
            yield FailedSample(path, str(error).partition(":")[0])


def stat(url: str) -> dict[str, Any]:
    """As `shards.stat`: the bytes of the pictures together, and as version a digest of their paths, sizes and times of
    writing."""
    folder, _, _ = split(url)
    root = storage_path(folder)
    infos = map_concurrent(lambda path: (path, (root / path).stat()), _paths(url), isinstance(root, RemotePath))
    times = [(path, info.st_size, info.st_mtime) for path, info in infos]
    return {"size": sum(size for _, size, _ in times), "version": hashlib.sha256(repr(times).encode()).hexdigest()}


def _paths(url: str) -> list[str]:
    folder, first, last = split(url)
    return sorted(list_pictures(folder))[first : last + 1]


def read_picture(folder: str, path: str) -> bytes:
    """The bytes of a picture below a folder.

    Raises:
        ImageError: it is not there any more, or larger than a shard may have.
    """
    try:
        with (storage_path(folder) / path).open("rb") as file:
            data: bytes = file.read(MAX_IMAGE + 1)
    except (FileNotFoundError, PermissionError) as error:
        raise ImageError(f"the picture cannot be opened: {path}, {type(error).__name__}") from error
    if len(data) > MAX_IMAGE:
        raise ImageError(f"a picture larger than {MAX_IMAGE // 2**20} MiB")
    return data


def list_pictures(folder: str) -> Iterator[str]:
    """The paths of all pictures below a folder, from there, in no order; no picture is opened."""
    root = storage_path(folder)
    for path in _local(root) if isinstance(root, Path) else _stored(folder):
        is_picture = path.rpartition(".")[2].lower() in PICTURES and not path.rpartition("/")[2].startswith(".")
        if is_picture and path.isprintable():
            yield path


def _local(root: Path) -> Iterator[str]:
    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above
            inner.clear()
            continue
        seen.add(real)
        below = os.path.relpath(folder, root)
        yield from (name if below == "." else f"{below}/{name}" for name in names)


def _stored(folder: str) -> Iterator[str]:
    files, root = fsspec.core.url_to_fs(folder)
    yield from (path.removeprefix(root).lstrip("/") for path in files.find(root))
