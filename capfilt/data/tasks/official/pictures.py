"""The pictures of a folder by name, or by the number at the end of a name, as COCO has them.

`COCO_val2014_000000262148.jpg` is picture 262148 wherever below the folder it lies. The names are held in memory, some
300 bytes each; no picture is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec

from capfilt.data.shards.members import MAX_IMAGE, PICTURES
from capfilt.data.tasks.official.rows import Picture
from capfilt.errors import DataError, ImageError, ListError
from capfilt.storage.paths import storage_path

_NUMBER = re.compile(r"(?:^|\D)(\d{1,18})\.\w+$")


class PictureFolder:
    """The pictures below a folder, this machine's or a store's; links to folders are followed."""

    def __init__(self, folder: str):
        """List the folder. ListError where there is no picture in it."""
        self._named: dict[str, list[str]] = {}
        self._numbered: dict[int, list[str]] = {}
        for path in sorted(_pictures(folder)):
            name = path.rpartition("/")[2]
            self._named.setdefault(name, []).append(path)
            if match := _NUMBER.search(name):
                self._numbered.setdefault(int(match[1]), []).append(path)
        if not self._named:
            raise ListError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))}); give their folder.")

    def find(self, picture: Picture) -> str:
        """The path of a picture below the folder.

        Raises:
            DataError: there is none, or several of the same name or number.
        """
        if isinstance(picture, int):
            what, paths = "number", self._numbered.get(picture, [])
        else:
            what, paths = "name", self._named.get(picture.rpartition("/")[2], [])
            if len(paths) > 1:  # the folders before the name tell them apart
                paths = [path for path in paths if f"/{path}".endswith(f"/{picture}")] or paths
        if len(paths) == 1:
            return paths[0]
        if paths:
            raise DataError(f"several pictures have its {what}: {picture} may be {paths[0]} or {paths[1]}")
        raise DataError(f"no picture has its {what}: {picture}")


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


def _pictures(folder: str) -> Iterator[str]:
    """The paths of all pictures below a folder, from there."""
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
