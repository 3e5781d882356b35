"""The pictures of a folder by name, or by the number at the end of a name, as COCO has them.

`COCO_val2014_000000262148.jpg` is picture 262148 wherever below the folder it lies. The names are held in memory, some
300 bytes each; no picture is opened.
"""

from __future__ import annotations

import re

from capfilt.data.shards.members import PICTURES
from capfilt.data.shards.sources.folder import listing
from capfilt.data.tasks.official.rows import Picture
from capfilt.errors import DataError, ListError

_NUMBER = re.compile(r"(?:^|\D)(\d{1,18})\.\w+$")


class PictureFolder:
    """The pictures below a folder, this machine's or a store's; links to folders are followed."""

    def __init__(self, folder: str):
        """List the folder. ListError where there is no picture in it."""
        self._named: dict[str, list[str]] = {}
        self._numbered: dict[int, list[str]] = {}
        for path in listing(folder).pictures:
            name = path.rpartition("/")[2]
            self._named.setdefault(name, []).append(path)
            if match := _NUMBER.search(name):
                self._numbered.setdefault(int(match[1]), []).append(path)
        if not self._named:
            raise ListError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))}); give their folder.")

    def find(self, picture: Picture) -> str:
        """The path of a picture below the folder. DataError for none, or several of the same name or number."""
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
