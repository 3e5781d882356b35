"""What ledgers say of shards that runs wrote: their sha256, and how many texts those have that `select` wrote.

So a training on a cleaned data set reads no tar before its first step. A record counts only for the file that it was
made of: of the recorded size, and not written after the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from capfilt.data.shards.urls import is_tar
from capfilt.errors import RunError
from capfilt.runs.ledger import Ledger
from capfilt.runs.tally import Tally
from capfilt.storage.paths import StoragePath, listing, storage_path

_MAKERS = ("download", "convert")
"""The stages that write shards into their run folder itself; `select` writes into `dataset/`."""


class WrittenShard(NamedTuple):
    """What a ledger says of one shard."""

    sha256: str
    images: int | None
    """Images that have a text, and their texts; None where the maker does not count what a training counts: a download
    knows how many captions came, and not which of them have something to read."""
    texts: int | None


def written_shards(urls: Iterable[str]) -> dict[str, WrittenShard]:
    """What the ledgers beside these shards say of them, by URL; nothing of shards that no run wrote, or that changed.

    It takes two listings of a folder and reads each completion once, whatever the size of the shards.
    """
    by_folder: dict[str, dict[str, str]] = {}
    for url in urls:
        folder, _, name = url.rpartition("/")
        if folder and not url.startswith(("http://", "https://")) and is_tar(url):
            by_folder.setdefault(folder, {})[name] = url
    return {
        of_folder[name]: found
        for folder, of_folder in by_folder.items()
        for name, found in _of_folder(storage_path(folder), of_folder)
    }


def _of_folder(folder: StoragePath, wanted: Mapping[str, str]) -> Iterator[tuple[str, WrittenShard]]:
    """By file name, what the ledger of the run that wrote a folder says of the wanted tars there."""
    in_dataset = folder.name == "dataset"
    for ledger in [Ledger(folder.parent, "select")] if in_dataset else [Ledger(folder, stage) for stage in _MAKERS]:
        records, prefix = listing(ledger.path), "dataset/" if in_dataset else ""
        files = listing(folder) if records else {}
        try:
            for done in ledger.readable_completions():
                record = records.get(f"{done.shard}.json")
                for output in done.outputs:
                    name = output.path.removeprefix(prefix)
                    file = files.get(name) if name in wanted else None
                    if file is None or record is None or file.st_size != output.bytes:
                        continue
                    if 0 < file.st_mtime <= record.st_mtime:
                        yield name, _written(output.sha256, done.tally if in_dataset else None)
        except RunError:  # its folder is reached by a link, say: then the shards themselves are read
            return


def _written(sha256: str, selected: Tally | None) -> WrittenShard:
    if selected is None:
        return WrittenShard(sha256, None, None)
    return WrittenShard(sha256, selected.samples["kept"], selected.texts["kept"].total())
