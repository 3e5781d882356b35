"""The members of a shard that may be part of a sample, read under limits; all others are counted by what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from capfilt.data.sample import FailedSample
from capfilt.data.shards.keys import MAX_KEY, is_metadata, split_name
from capfilt.data.shards.tar import Cut, Entry, Tar
from capfilt.data.shards.unpack import Readable

IMAGES = ("jpg", "jpeg", "png", "webp")
UNREAD = ("avif", "bmp", "gif", "heic", "heif", "jfif", "jp2", "jxl", "svg", "tif", "tiff")
"""Pictures that are named, not read: a shard's are carried as they came, and loaders expect IMAGES."""
PICTURES = frozenset((*IMAGES, *UNREAD))
MAX_IMAGE = 256 * 2**20
"""Bytes of an image, or of any other member."""
MAX_TEXT = 16 * 2**20
"""Bytes of a text or json."""

USED, CARRIED = "used", "carried"
OF_A_FAULT = "of a sample that failed"

ESSENTIAL = (*IMAGES, "txt", "json", "")
"""The extensions that a sample is made of: where one cannot be read, the sample fails; any other is left out."""


class MemberCounts(Counter[str]):
    """What became of the members of a shard: how many came "in", were "used" by samples, "carried" beside them, or were
    skipped, by the reason."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file that may be part of a sample; its data where that was wanted, or a `problem` in its place."""

    number: int
    """Its place among the members of the tar."""
    key: str
    extension: str
    start: int
    """Where its data begins, in bytes of the decompressed tar."""
    size: int
    data: bytes | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """As in the tar, but lower case behind the last dot."""
        return f"{self.key}.{self.extension}"

    @property
    def stem(self) -> str:
        """Its name up to the last dot."""
        return self.name.rpartition(".")[0] if self.is_dotted else self.key

    @property
    def kind(self) -> str:
        """Its name behind the last dot."""
        return self.extension.rpartition(".")[2]

    @property
    def is_dotted(self) -> bool:
        """Whether webdataset takes more than what stands behind the last dot for its extension."""
        return "." in self.extension

    @property
    def is_picture(self) -> bool:
        """Whether it is an image, of a format that is read or not."""
        return self.kind in PICTURES

    @property
    def is_essential(self) -> bool:
        """Whether it is an image that is read, a text or a json, of whichever key."""
        return self.kind in ESSENTIAL

    def with_data(self, data: bytes | None) -> Member:
        """The same member, read or unread."""
        return Member(self.number, self.key, self.extension, self.start, self.size, data, self.problem)


class MemberReader:
    """Streams the members of a tar that may be part of a sample, and counts all others."""

    def __init__(
        self, stream: Readable, counts: MemberCounts, wanted: Callable[[Member], bool], seekable: bool = False
    ):
        """`wanted`: of which members the data is read. `seekable`: whether `stream` may be sought in."""
        self._tar, self._counts, self._wanted = Tar(stream, seekable), counts, wanted
        self._num_headers = 0
        self.reading: Member | None = None
        """The member whose data was being read when the tar was cut; None between members."""

    def __iter__(self) -> Iterator[Member]:
        """Raises Cut where the tar cannot be read further, and OSError where the stream failed."""
        for entry in self._tar:
            self._counts["in"] += 1
            member = member_of(entry, self._num_headers)
            self._num_headers += 1
            if isinstance(member, str):
                self._counts[member] += 1
                continue
            self.reading = member
            if not member.problem and self._wanted(member):
                member = member.with_data(self._tar.read())
            else:
                self._tar.skip()
            self.reading = None
            yield member

    def failed_at_cut(self, cut: Cut, shard: str) -> FailedSample:
        """The last outcome of a shard that was cut, under the key that was being read, else under the shard's name."""
        if self.reading is None:
            return FailedSample(shard, cut.reason)
        self._counts[OF_A_FAULT] += 1
        return FailedSample(self.reading.stem, cut.reason)


def member_of(entry: Entry, number: int) -> Member | str:
    """A member of a tar as part of a sample, its data unread; or why it cannot be one."""
    # `tar -C folder .` writes a leading ./, and the parquet beside the tar knows the key without it.
    path = entry.name.removeprefix("./")
    base = path.rpartition("/")[2]
    if entry.kind == "folder":
        return "a folder"
    if is_metadata(path):
        return "metadata of the shard"
    if base.startswith("._") or path.startswith("__MACOSX/"):
        return "AppleDouble"
    key, extension = split_name(path)
    if len(extension) > MAX_KEY:
        return "too long a name"
    if entry.problem or entry.kind != "file":
        problem = entry.problem or "not a regular file (link or device)"
        return Member(number, key or path, extension, entry.start, entry.size, problem=problem)
    if not key:
        return "a name without key or extension"
    member = Member(number, key, extension, entry.start, entry.size)
    limit = MAX_TEXT if member.kind in ("txt", "json") else MAX_IMAGE
    if entry.size <= limit:
        return member
    what = member.kind if member.kind in (*PICTURES, "txt", "json") else "a member"
    return replace(member, problem=f"{what} larger than {limit // 2**20} MiB")
