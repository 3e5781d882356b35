"""Samples whose members do not lie side by side: assigned by the names of the whole shard, which are read first.

- An image is the sample of its webdataset key (what stands before the first dot): `0001.jpg`.
- Where more dots follow (`22.05 track 1.jpg`), it is carried by the image of that key, if there is one and it has no
  text of its own (`0001.mask.png` with `0001.jpg`); else its key is its name up to the last dot.
- Everything else belongs to the longest key of an image that its name begins with, or else to the only image of its
  webdataset key.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.groups import Group
from capfilt.data.shards.members import ESSENTIAL, OF_A_FAULT, PICTURES, Member, MemberCounts, MemberReader
from capfilt.data.shards.tar import Cut
from capfilt.data.shards.unpack import Readable
from capfilt.errors import StorageError

NEAR = 16 * 2**20
"""Bytes from its image within which a sample waits for its members; those further on are fetched in another pass."""
MAX_HELD = 256 * 2**20
"""Bytes of members far from their images that are held at one time; no more than a shard's texts have."""
MAX_EXTRAS = 256 * 2**20
"""Bytes of a sample's members beside image, text and json."""

NO_IMAGE = "belongs to no image"
APART = "lies apart from its sample"
TOO_FAR = "lies too far from its image"
TOO_MANY = "more than a sample may carry"

Reopen = Callable[[], AbstractContextManager[Readable]]
"""Opens the tar that is being read once more, from its start."""


@dataclass
class _Planned(Group):
    """A sample of which it is known where its members lie."""

    last: int = -1
    """The number of the member at which it has all that it waits for."""
    is_done: bool = False


class ScatteredSamples:
    """The sample of each member of a shard, found by reading all names of the shard.

    Args:
        reopen: opens the shard for this pass, and for one more where members lie far behind their images.
        extras: whether members that are neither image, text nor json are read too.
    """

    def __init__(self, reopen: Reopen, extras: bool):
        self._sample_of: dict[int, _Planned | str] = {}
        """By number: the sample that a member is part of, or why it is in none."""
        self._unassigned: list[Member] = []
        self._final_keys: set[str] = set()
        """Keys of the samples whose members lie side by side."""
        self._cut_key: str | None = None
        self._fetched: dict[int, bytes | None] = {}
        """By number: members that lie far behind their images."""
        self._num_held = 0
        with reopen() as stream:
            self._read_names(stream)
        assignment = _Assignment(self._unassigned, self._final_keys)
        self._sample_of |= assignment.skipped
        for group in assignment.groups.values():
            self._sample_of.update({part.number: group for part in group.parts.values()})
            self._schedule(group, extras)
        self._unassigned = []
        if self._fetched:
            with reopen() as stream, suppress(Cut):
                for member in MemberReader(stream, MemberCounts(), lambda m: m.number in self._fetched, seekable=True):
                    if member.number in self._fetched:
                        self._fetched[member.number] = member.data

    def outcomes(
        self, rest: Iterable[Member], reader: MemberReader, shard: str, seen: set[str], counts: MemberCounts
    ) -> Iterator[Sample | FailedSample]:
        """The samples of the `rest` of the shard's members, which `reader` reads; arguments as of `gather.samples`."""
        try:
            for member in rest:
                group = self._sample_of.get(member.number)
                if group is None:
                    raise StorageError(f"shard {shard} changed while it was read: run again.")
                if isinstance(group, str):
                    counts[group] += 1
                elif not group.is_done:
                    group.parts[_extension(member, group.key)] = member
                    if member.number == group.last:
                        yield self._outcome(group, seen, counts)
        except Cut as cut:
            failed = reader.failed_at_cut(cut, shard)
            yield failed if self._cut_key is None else FailedSample(self._cut_key, cut.reason)

    def _outcome(self, group: _Planned, seen: set[str], counts: MemberCounts) -> Sample | FailedSample:
        for name, part in group.parts.items():
            if part.number in self._fetched:
                if (data := self._fetched.pop(part.number)) is None:
                    raise StorageError(f"{group.key}.{name} was there and is no more: run again.")
                group.parts[name] = part.with_data(data)
        outcome = group.outcome(seen, counts)
        group.is_done, group.parts = True, {}
        return outcome

    # ---- the names ----

    def _read_names(self, stream: Readable) -> None:
        """Sort all members into samples that lie side by side, and the unassigned."""
        reader = MemberReader(stream, MemberCounts(), lambda member: member.extension == "json", seekable=True)
        group: Group | None = None
        try:
            for member in reader:
                if group is not None and not group.takes(member):
                    self._add(group)
                    group = None
                group = group or Group(member.key)
                group.add(member)
        except Cut:
            group = self._before_cut(group, reader.reading)
        if group is not None:
            self._add(group)

    def _before_cut(self, group: Group | None, reading: Member | None) -> Group | None:
        """What is whole of the members before a cut; the others fail with it."""
        if group is None or (group.has_text_and_json if reading is None else reading.key != group.key):
            return group
        parts = group.parts.values()
        dotted = group.parts.keys().isdisjoint(PICTURES) and any(part.is_dotted and part.is_picture for part in parts)
        end = (reading or next(reversed(parts))).stem
        self._cut_key = end if dotted else group.key
        self._sample_of.update({part.number: OF_A_FAULT for part in parts if not dotted or part.stem == end})
        left = [part for part in parts if part.number not in self._sample_of]
        return Group(group.key, {part.extension.lower(): part for part in left}) if left else None

    def _add(self, group: Group) -> None:
        """Take up adjacent members of one key."""
        parts = list(group.parts.values())
        if not group.is_final:
            self._unassigned += [part.with_data(None) for part in parts]
            return
        self._final_keys.add(group.key)
        planned = _Planned(group.key)
        self._sample_of.update({part.number: planned for part in parts})
        too_many = _too_many(group)
        self._sample_of.update(dict.fromkeys(too_many, TOO_MANY))
        planned.last = max(part.number for part in parts if part.number not in too_many)

    def _schedule(self, group: _Planned, extras: bool) -> None:
        """Decide at which member a sample is whole, and which of its members are fetched before that."""
        for number in _too_many(group):
            self._sample_of[number] = TOO_MANY
        group.parts = {name: part for name, part in group.parts.items() if self._sample_of[part.number] is group}
        image = next((part for name, part in group.parts.items() if name in PICTURES), None)
        if image is None:
            group.last = min(part.number for part in group.parts.values())  # it fails: nothing is waited for
            return
        group.last = image.number
        for name, part in list(group.parts.items()):
            if abs(part.start - image.start) <= NEAR:
                group.last = max(group.last, part.number)
            elif self._hold(part):
                if part.number > image.number and (extras or name in ESSENTIAL):
                    self._fetched[part.number] = None
            elif name in ESSENTIAL:
                group.problem = f"its {name} lies too far from its image (more than {MAX_HELD // 2**20} MiB of such)"
            else:
                self._sample_of[part.number] = TOO_FAR
                del group.parts[name]

    def _hold(self, part: Member) -> bool:
        """Whether there is room to hold a member that lies far from its image; the room is then taken."""
        if self._num_held + part.size > MAX_HELD:
            return False
        self._num_held += part.size
        return True


class _Assignment:
    """Members that lie in no sample side by side, put together by their names."""

    def __init__(self, members: list[Member], final_keys: set[str]):
        """`final_keys`: the keys of the samples that lie side by side."""
        self.groups: dict[tuple[str, int], _Planned] = {}
        """By key, and by which of that key: an extension that comes twice begins it anew."""
        self.skipped: dict[int, str] = {}
        """By number, why a member belongs to none of them."""
        self._final_keys = final_keys
        self._num_put: Counter[tuple[str, str]] = Counter()
        self._images: defaultdict[str, set[str]] = defaultdict(set)
        """Keys of images, by their webdataset keys."""
        self._with_text = {member.stem for member in members if member.is_dotted and member.kind == "txt"}
        self._place_images([member for member in members if member.is_picture])
        lone = [member for member in members if not member.is_picture and not self._place_by_name(member)]
        self._place_without_image([member for member in lone if not self._place_with_only_image(member)])

    def _put(self, member: Member, key: str) -> _Planned:
        extension = _extension(member, key)
        number = self._num_put[key, extension]
        self._num_put[key, extension] += 1
        problem = "duplicate key" if number or key in self._final_keys else ""
        group = self.groups.setdefault((key, number), _Planned(key, problem=problem))
        group.parts[extension] = member
        return group

    def _place_images(self, images: list[Member]) -> None:
        undotted = {member.key for member in images if not member.is_dotted}
        for member in images:
            may_be_carried = member.is_dotted and member.stem not in self._with_text
            if may_be_carried and member.key in self._final_keys and member.key not in undotted:
                self.skipped[member.number] = APART
                continue
            key = member.key if may_be_carried and member.key in undotted else member.stem
            self._images[member.key].add(key)
            self._put(member, key)

    def _place_by_name(self, member: Member) -> bool:
        """Place a member whose name begins with the key of an image, or that lies apart from the sample of its key."""
        name, keys = member.name, self._images.get(member.key, ())
        while keys and len(name) > len(member.key):
            name = name.rpartition(".")[0]
            if name in keys:
                self._put(member, name)
                return True
        if member.key in self._final_keys:
            self.skipped[member.number] = APART
            return True
        return False

    def _place_with_only_image(self, member: Member) -> bool:
        keys = self._images.get(member.key, ())
        if len(keys) != 1:
            return False
        [key] = keys
        if self._num_put[key, _extension(member, key)]:
            return False
        self._put(member, key)
        return True

    def _place_without_image(self, members: list[Member]) -> None:
        """Texts and jsons without an image are failed samples, and what else has their key is counted with them."""
        texts = {member.key for member in members if member.extension in ("txt", "json")}
        keys = {member.number: member.key if member.key in texts else member.stem for member in members}
        failed = {keys[member.number] for member in members if member.kind in ("txt", "json")}
        for member in members:
            if (key := keys[member.number]) not in failed:
                self.skipped[member.number] = NO_IMAGE
                continue
            group = self._put(member, key)
            if len(self._images.get(member.key, ())) > 1:
                group.problem = "belongs to more than one image"


def _extension(member: Member, key: str) -> str:
    """The extension by which a member is part of the sample of `key`."""
    name = member.name[len(key) + 1 :] if member.name.startswith(f"{key}.") else member.extension
    return name.lower()


def _too_many(group: Group) -> set[int]:
    """The numbers of those members that are more than a sample may carry."""
    size, numbers = 0, set()
    for name, part in group.parts.items():
        size += part.size if name not in ESSENTIAL else 0
        if name not in ESSENTIAL and size > MAX_EXTRAS:
            numbers.add(part.number)
    return numbers
