"""Samples from the members of a shard, wherever in it they lie.

Adjacent members of a key that have an image with a text are a sample: that is every shard that img2dataset wrote, and
it is read in one pass. At the first members that are not, the names of the whole shard are read once, its data skipped,
and the rest is put together by them (`scattered.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.groups import Group
from capfilt.data.shards.members import Member, MemberCounts, MemberReader
from capfilt.data.shards.scattered import Reopen, ScatteredSamples
from capfilt.data.shards.tar import Cut
from capfilt.data.shards.unpack import Readable

MAX_ADJACENT = 64 * 2**20, 256
"""Bytes and members of a key that are held before the names of the shard are read to know where the key ends."""


def samples(
    stream: Readable, reopen: Reopen, shard: str, counts: MemberCounts, extras: bool = False
) -> Iterator[Sample | FailedSample]:
    """Stream the samples of a tar in its order; a cut tar ends in a FailedSample.

    Args:
        reopen: opens the same tar once more.
        shard: its name, for errors.
        counts: counts the members by what became of them.
        extras: whether members that are neither image, text nor json are read too.
    """
    reader = MemberReader(stream, counts, (lambda _: True) if extras else (lambda member: member.is_essential))
    members, seen = iter(reader), set[str]()
    group: Group | None = None
    rest: Iterator[Member] | None = None
    """The members from the first that are not adjacent on; None while all are."""
    try:
        for member in members:
            if group is not None and not group.takes(member):
                if not group.is_final:
                    rest = chain(group.parts.values(), [member], members)
                    break
                yield group.outcome(seen, counts)
                group = None
            group = group or Group(member.key)
            group.add(member)
            if _is_large(group):
                rest = chain(group.parts.values(), members)
                break
        if rest is None and group is not None:
            if group.is_final:
                yield group.outcome(seen, counts)
            else:
                rest = iter(group.parts.values())
    except Cut as cut:
        if group is None or (_is_whole(group, reader) and group.is_final):
            if group is not None:
                yield group.outcome(seen, counts)
            yield reader.failed_at_cut(cut, shard)
            return
        rest = chain(group.parts.values(), _raising(cut))
    if rest is not None:
        yield from ScatteredSamples(reopen, extras).outcomes(rest, reader, shard, seen, counts)


def _is_whole(group: Group, reader: MemberReader) -> bool:
    """Whether a tar that was cut has all members of a group: another key had begun, or none can follow."""
    return group.has_text_and_json if reader.reading is None else reader.reading.key != group.key


def _is_large(group: Group) -> bool:
    max_bytes, max_members = MAX_ADJACENT
    parts = group.parts.values()
    return len(parts) > 1 and (len(parts) > max_members or sum(part.size for part in parts) > max_bytes)


def _raising(cut: Cut) -> Iterator[Member]:
    raise cut
    yield
