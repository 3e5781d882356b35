"""Samples from the members of a shard, wherever in it they lie.

Members of a key that lie side by side and have an image with a text are a sample: that is every shard that img2dataset
wrote, and it is read in one pass. At the first members that are not, the names of the whole shard are read once (its
data is passed over), and what is left over is put together by them:

- an image is the sample of its webdataset key (what stands before the first dot): `0001.jpg`;
- where more dots follow (`22.05 track 1.jpg`), it is carried by the image of that key, if there is one and it has no
  text of its own (`0001.mask.png` with `0001.jpg`); else its key is its name up to the last dot;
- everything else belongs to the longest key of an image that its name begins with, or else to the only image of its
  webdataset key.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain

from capfilt.data.sample import Fault, Sample
from capfilt.data.shards.members import ESSENTIAL, OF_A_FAULT, PICTURES, Group, Member, MemberReader, Members, essential
from capfilt.data.shards.tar import Cut
from capfilt.data.shards.unpack import Readable
from capfilt.errors import StorageError

SIDE_BY_SIDE = 64 * 2**20, 256
"""Bytes and members of a key that are held before the names of the shard are asked where it ends."""
NEAR = 16 * 2**20
"""Bytes from its image within which a sample waits for its members; what comes later is fetched in another pass."""
MAX_HELD = 256 * 2**20
"""Bytes of members far from their images that are held at one time; no more than a shard's texts have."""
MAX_EXTRAS = 256 * 2**20
"""Bytes of what else a sample may have."""

NO_IMAGE = "belongs to no image"
APART = "lies apart from its sample"
TOO_FAR = "lies too far from its image"
TOO_MANY = "more than a sample may carry"

Open = Callable[[], AbstractContextManager[Readable]]


def samples(
    stream: Readable, again: Open, shard: str, members: Members, extras: bool = False
) -> Iterator[Sample | Fault]:
    """Stream the samples of a tar in its order; its damage is a Fault under the name of the `shard`.

    `again` opens the same tar anew. With `extras` what is neither image, text nor json is read too.
    """
    reader = MemberReader(stream, members, (lambda _: True) if extras else essential)
    source, seen = iter(reader), set[str]()
    run: Group | None = None
    rest: Iterator[Member] | None = None
    try:
        for member in source:
            if run is not None and not run.takes(member):
                if not run.settled:
                    rest = chain(run.parts.values(), [member], source)
                    break
                yield run.outcome(seen, members)
                run = None
            run = run or Group(member.key)
            run.add(member)
            if _large(run):
                rest = chain(run.parts.values(), source)
                break
        if rest is None and run is not None:
            if run.settled:
                yield run.outcome(seen, members)
            else:
                rest = iter(run.parts.values())
    except Cut as cut:
        whole = run is not None and (run.complete if reader.reading is None else reader.reading.key != run.key)
        if run is None or (whole and run.settled):
            if run is not None:
                yield run.outcome(seen, members)
            yield _cut_off(reader, cut, shard, members)
            return
        rest = chain(run.parts.values(), _raising(cut))
    if rest is not None:
        yield from _Plan(again, extras).samples(rest, reader, shard, seen, members)


def _large(run: Group) -> bool:
    size, num = SIDE_BY_SIDE
    parts = run.parts.values()
    return len(parts) > 1 and (len(parts) > num or sum(part.size for part in parts) > size)


def _raising(cut: Cut) -> Iterator[Member]:
    raise cut
    yield


def _cut_off(reader: MemberReader, cut: Cut, key: str, members: Members) -> Fault:
    """The one Fault at the end of what can be read, under the key that was being read."""
    if reader.reading is not None:
        members[OF_A_FAULT] += 1
        key = reader.reading.stem
    return Fault(key, cut.reason)


@dataclass
class _Planned(Group):
    """A sample of which it is known where its members lie."""

    last: int = -1
    """The number of the member at which it has all that it waits for."""
    done: bool = False


class _Plan:
    """What each member of a shard belongs to, found out from all their names."""

    def __init__(self, again: Open, extras: bool):
        self._of: dict[int, _Planned | str] = {}
        """By number: the sample that a member is part of, or why it is passed over."""
        self._pool: list[Member] = []
        self._settled: set[str] = set()
        self._cut_key: str | None = None
        self._fetch: dict[int, bytes | None] = {}
        self._held = 0
        with again() as stream:
            self._read_names(stream)
        gathered = _Gathered(self._pool, self._settled)
        self._of |= gathered.passed
        for group in gathered.groups.values():
            self._of.update({part.number: group for part in group.parts.values()})
            self._schedule(group, extras)
        self._pool = []
        if self._fetch:
            with again() as stream:
                fetched = MemberReader(stream, Members(), lambda member: member.number in self._fetch, seekable=True)
                self._fetch |= {m.number: m.data for m in _until_cut(fetched) if m.number in self._fetch}

    def samples(
        self, rest: Iterable[Member], reader: MemberReader, shard: str, seen: set[str], members: Members
    ) -> Iterator[Sample | Fault]:
        """What is left of the shard, member by member."""
        try:
            for member in rest:
                group = self._of.get(member.number)
                if group is None:
                    raise StorageError(f"shard {shard} changed while it was read: run again.")
                if isinstance(group, str):
                    members[group] += 1
                elif not group.done:
                    group.parts[_extension(member, group.key)] = member
                    if member.number == group.last:
                        yield self._outcome(group, seen, members)
        except Cut as cut:
            fault = _cut_off(reader, cut, shard, members)
            yield fault if self._cut_key is None else Fault(self._cut_key, cut.reason)

    def _outcome(self, group: _Planned, seen: set[str], members: Members) -> Sample | Fault:
        for name, part in group.parts.items():
            if part.number in self._fetch:
                if (data := self._fetch.pop(part.number)) is None:
                    raise StorageError(f"{group.key}.{name} was there and is no more: run again.")
                group.parts[name] = part.with_data(data)
        found = group.outcome(seen, members)
        group.done, group.parts = True, {}
        return found

    def _read_names(self, stream: Readable) -> None:
        reader = MemberReader(stream, Members(), lambda member: member.extension == "json", seekable=True)
        run: Group | None = None
        try:
            for member in reader:
                if run is not None and not run.takes(member):
                    self._add(run)
                    run = None
                run = run or Group(member.key)
                run.add(member)
        except Cut:
            run = self._interrupted(run, reader.reading)
        if run is not None:
            self._add(run)

    def _interrupted(self, run: Group | None, reading: Member | None) -> Group | None:
        """What is whole of the members before a cut; the others go down with it."""
        if run is None or (run.complete if reading is None else reading.key != run.key):
            return run
        dotted = run.parts.keys().isdisjoint(PICTURES) and any(m.dotted and m.picture for m in run.parts.values())
        end = (reading or next(reversed(run.parts.values()))).stem
        self._cut_key = end if dotted else run.key
        lost = [m for m in run.parts.values() if not dotted or m.stem == end]
        self._of.update({member.number: OF_A_FAULT for member in lost})
        left = [m for m in run.parts.values() if m.number not in self._of]
        return Group(run.key, {m.extension.lower(): m for m in left}) if left else None

    def _add(self, run: Group) -> None:
        parts = list(run.parts.values())
        if not run.settled:
            self._pool += [part.with_data(None) for part in parts]
            return
        self._settled.add(run.key)
        group = _Planned(run.key)
        self._of.update({part.number: group for part in parts})
        too_many = _too_many(run)
        self._of.update(dict.fromkeys(too_many, TOO_MANY))
        group.last = max(part.number for part in parts if part.number not in too_many)

    def _schedule(self, group: _Planned, extras: bool) -> None:
        """Decide at which member a sample is whole, and which of its members are fetched before that."""
        for number in _too_many(group):
            self._of[number] = TOO_MANY
        group.parts = {name: part for name, part in group.parts.items() if self._of[part.number] is group}
        image = next((part for name, part in group.parts.items() if name in PICTURES), None)
        if image is None:
            group.last = min(part.number for part in group.parts.values())  # a fault: nothing is waited for
            return
        group.last = image.number
        for name, part in list(group.parts.items()):
            if abs(part.start - image.start) <= NEAR:
                group.last = max(group.last, part.number)
            elif self._room(part):
                if part.number > image.number and (extras or name in ESSENTIAL):
                    self._fetch[part.number] = None
            elif name in ESSENTIAL:
                group.problem = f"its {name} lies too far from its image (more than {MAX_HELD // 2**20} MiB of such)"
            else:
                self._of[part.number] = TOO_FAR
                del group.parts[name]

    def _room(self, part: Member) -> bool:
        if self._held + part.size > MAX_HELD:
            return False
        self._held += part.size
        return True


class _Gathered:
    """Members that lie in no sample side by side, put together by their names."""

    def __init__(self, pool: list[Member], settled: set[str]):
        """`settled`: the keys of the samples that lie side by side."""
        self.groups: dict[tuple[str, int], _Planned] = {}
        """By key, and by which of that key: an extension met twice begins it anew."""
        self.passed: dict[int, str] = {}
        """By number, why a member belongs to none of them."""
        self._settled = settled
        self._times: Counter[tuple[str, str]] = Counter()
        self._images: defaultdict[str, set[str]] = defaultdict(set)  # keys of images, by webdataset's keys of them
        self._with_text = {member.stem for member in pool if member.dotted and member.kind == "txt"}
        self._place_images([member for member in pool if member.picture])
        lone = [member for member in pool if not member.picture and not self._place_by_name(member)]
        self._place_left([member for member in lone if not self._place_with_only_image(member)])

    def _put(self, member: Member, key: str) -> _Planned:
        name = _extension(member, key)
        times = self._times[key, name]
        self._times[key, name] += 1
        again = "duplicate key" if times or key in self._settled else ""
        group = self.groups.setdefault((key, times), _Planned(key, problem=again))
        group.parts[name] = member
        return group

    def _place_images(self, images: list[Member]) -> None:
        plain = {member.key for member in images if not member.dotted}
        for member in images:
            carried = member.dotted and member.stem not in self._with_text
            if carried and member.key in self._settled and member.key not in plain:
                self.passed[member.number] = APART
                continue
            key = member.key if carried and member.key in plain else member.stem
            self._images[member.key].add(key)
            self._put(member, key)

    def _place_by_name(self, member: Member) -> bool:
        """Whether a member's name begins with the key of an image, or lies apart from the sample of its key."""
        name, keys = member.name, self._images.get(member.key, ())
        while keys and len(name) > len(member.key):
            name = name.rpartition(".")[0]
            if name in keys:
                self._put(member, name)
                return True
        if member.key in self._settled:
            self.passed[member.number] = APART
            return True
        return False

    def _place_with_only_image(self, member: Member) -> bool:
        keys = self._images.get(member.key, ())
        if len(keys) != 1:
            return False
        [key] = keys
        if self._times[key, _extension(member, key)]:
            return False
        self._put(member, key)
        return True

    def _place_left(self, left: list[Member]) -> None:
        """Members without an image: texts and jsons are faults, and what else has their key is counted with them."""
        texts = {member.key for member in left if member.extension in ("txt", "json")}
        whole = {member.number: member.key if member.key in texts else member.stem for member in left}
        faults = {whole[member.number] for member in left if member.kind in ("txt", "json")}
        for member in left:
            if (key := whole[member.number]) not in faults:
                self.passed[member.number] = NO_IMAGE
                continue
            group = self._put(member, key)
            if len(self._images.get(member.key, ())) > 1:
                group.problem = "belongs to more than one image"


def _extension(member: Member, key: str) -> str:
    """What a member is to the sample of this key."""
    name = member.name[len(key) + 1 :] if member.name.startswith(f"{key}.") else member.extension
    return name.lower()


def _too_many(group: Group) -> set[int]:
    """The numbers of those members that are more than a sample may carry."""
    size, found = 0, set()
    for name, part in group.parts.items():
        size += part.size if name not in ESSENTIAL else 0
        if name not in ESSENTIAL and size > MAX_EXTRAS:
            found.add(part.number)
    return found


def _until_cut(reader: MemberReader) -> Iterator[Member]:
    try:
        yield from reader
    except Cut:
        return
