"""A JSON of captions and a folder of pictures, read as shards: COCO's, Karpathy's, or a list as BLIP trains on.

The file is read once in a process, and its texts stay in memory, some 110 bytes each. `images` is the folder of the
pictures, by default that of the file; they are found as `capfilt convert` finds them, by name or by COCO's number.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from capfilt.data.sample import SOURCES, FailedSample, Sample
from capfilt.data.shards.members import MemberCounts
from capfilt.data.shards.sources import entries, folder
from capfilt.data.shards.sources.entries import Entry
from capfilt.data.shards.sources.rows import Row, texts_of
from capfilt.data.shards.sources.view import View, absolute, check_options, size_and_time, views
from capfilt.errors import DataError, NoShardError

if TYPE_CHECKING:
    from capfilt.data.shards.sources.folder import Listing
    from capfilt.data.tasks.official.pictures import PictureFolder

KIND = "captions"
OPTIONS = ("images", "split", "source")
MAX_TEXTS = 5_000_000
"""Texts of a file; COCO has 600,000."""


class _Captions:
    """The pictures of a file in its order, each with its texts."""

    def __init__(self) -> None:
        self.names: list[str | int | None] = []
        self.texts: list[list[str]] = []
        self.splits: dict[str, int] = {}
        """How many pictures each split has, in a file that has splits."""
        self.source = "human"
        self._places: dict[Hashable, int] = {}
        self._count = 0

    def add(self, id_: object, name: object = None, texts: tuple[str, ...] = ()) -> None:
        """Add what an element says of a picture; `id_` is what other elements know it by."""
        known = id_ if isinstance(id_, str | int) else (len(self.names),)
        place = self._places.setdefault(known, len(self.names))
        if place == len(self.names):
            self.names.append(None)
            self.texts.append([])
        if isinstance(name, str | int):
            self.names[place] = name
        self.texts[place] += texts
        self._count += len(texts)
        if self._count > MAX_TEXTS or len(self.names) > MAX_TEXTS:
            raise NoShardError(f"a file with more than {MAX_TEXTS:,} texts; split it.")

    def read(self, element: Any, path: str, splits: list[str]) -> None:
        """Take an element of the array at a path: COCO's `images` and `annotations`, Karpathy's `images`, BLIP's ""."""
        said = element if isinstance(element, dict) else {}
        if path == "images" and "sentences" in said:
            split = str(said.get("split"))
            self.splits[split] = self.splits.get(split, 0) + 1
            if not splits or split in splits:
                parts = [
                    part for part in (said.get("filepath"), said.get("filename")) if isinstance(part, str) and part
                ]
                found = said["sentences"] if isinstance(said["sentences"], list) else []
                raw = [one.get("raw") for one in found if isinstance(one, dict)]
                self.add("/".join(parts), "/".join(parts) or None, texts_of(raw))
        elif path == "images":
            self.add(said.get("id"), said.get("file_name"))
        elif path == "annotations":
            self.add(said.get("image_id"), None, texts_of(said.get("caption")))
        elif path == "":
            self.source = "web"
            self.add(said.get("image"), said.get("image"), texts_of(said.get("caption")))


def expand(location: str, options: Mapping[str, str]) -> list[str]:
    """The views of a file.

    Raises:
        NoShardError: it holds no captions, or several splits of which none is chosen.
        DataError: it is no JSON.
    """
    check_options(location, options, OPTIONS)
    if options.get("source", "web") not in SOURCES:
        raise NoShardError(f"{location}#source={options['source']}: texts come from {', '.join(SOURCES)}.")
    if images := options.get("images"):
        options = {**options, "images": absolute(images)}
    captions = _captions(location, options)
    if len(captions.splits) > 1 and "split" not in options:
        there = ", ".join(f"{split} ({count:,})" for split, count in sorted(captions.splits.items()))
        raise NoShardError(f"{location} has several splits: {there}. Choose, as in {location}#split=train,restval.")
    if not any(captions.texts):
        raise NoShardError(
            f"{location} holds no captions: COCO's have images and annotations, Karpathy's images with sentences, and"
            " BLIP's are a list of image and caption."
        )
    _finder(_images(location, options))
    return views(location, KIND, [1] * len(captions.names), options)


def stat(view: View) -> dict[str, Any]:
    """As `shards.stat`."""
    found = [entry for entry in _entries(view) if not entry.problem]
    return entries.stat(_images(view.location, view.options), found, [size_and_time(view.location)])


def read(view: View, counts: MemberCounts) -> Iterator[Sample | FailedSample]:
    """The samples of a view, an outcome for every picture that the file names."""
    yield from entries.read(_images(view.location, view.options), _entries(view), counts)


def _entries(view: View) -> list[Entry]:
    captions, images = _captions(view.location, view.options), _images(view.location, view.options)
    finder, listed = _finder(images), folder.listing(images)
    source, found = view.options.get("source", captions.source), list[Entry]()
    for place in range(view.first, min(view.last + 1, len(captions.names))):
        name = captions.names[place]
        if name is None:
            found.append(Entry(f"{KIND}-{place}", problem="the file names no picture for it"))
            continue
        try:
            path = finder.find(name)
        except DataError as error:
            found.append(Entry(str(name), problem=str(error).partition(":")[0]))
            continue
        row = Row(tuple(captions.texts[place]), source)
        found.append(Entry(folder.entry(listed, path).key, (path,), row))
    return found


def _captions(location: str, options: Mapping[str, str]) -> _Captions:
    return _read(location, options.get("split", ""), repr(size_and_time(location)))


@lru_cache(maxsize=2)
def _read(location: str, split: str, _version: str) -> _Captions:
    from capfilt.data.tasks.official.json_stream import elements

    captions, splits = _Captions(), [name for name in split.split(",") if name]
    for path, element in elements(location):
        captions.read(element, path, splits)
    return captions


def _images(location: str, options: Mapping[str, str]) -> str:
    return options.get("images") or location.rpartition("/")[0]


def _finder(images: str) -> PictureFolder:
    return _found(images, folder.listing(images))


@lru_cache(maxsize=2)
def _found(images: str, _listed: Listing) -> PictureFolder:
    from capfilt.data.tasks.official.pictures import PictureFolder

    return PictureFolder(images)
