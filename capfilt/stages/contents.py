"""Whether shards still are what was read of them: known by their size and by the version that storage tells, and where
only the version is another (a touch, an upload of the same) by their sha256, for which they are read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from capfilt.data import shards
from capfilt.runs.ledger import Completion, Input, Ledger
from capfilt.runs.progress import Progress
from capfilt.storage.paths import map_concurrent


def changed(
    ledger: Ledger, done: Mapping[str, Completion], urls: Mapping[str, str], show: Progress, label: str
) -> set[str]:
    """The shards that are not what was read when they were done, by name; `urls` says where each lies.

    Of those that have another version and the same bytes the new version is written down, so that they are not read a
    second time. ShardError for one that is not there any more.
    """
    stats = shards.stats([urls[name] for name in done])
    moved, gone = [], set()
    for name, completion in done.items():
        stat, read = stats[urls[name]], completion.input
        if read is None or stat["size"] not in (None, read.bytes):
            gone.add(name)
        elif stat["version"] != read.version:
            moved.append(name)
    if not moved:
        return gone
    show.say(f"{label}: {len(moved)} shards have another time of writing and the same size; reading them to compare")
    places = [urls[name] for name in moved]
    for name, now in zip(moved, map_concurrent(shards.input_now, places, shards.on_a_store(places)), strict=True):
        if same(done[name].input, now):
            ledger.renew(replace(done[name], input=replace(now, version=stats[urls[name]]["version"])))
        else:
            gone.add(name)
    return gone


def same(read: Input | None, now: Input) -> bool:
    """Whether these are the same bytes, whatever storage says of when they were written."""
    return read is not None and (read.bytes, read.sha256) == (now.bytes, now.sha256)
