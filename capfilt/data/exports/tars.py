"""webdataset: tars as capfilt reads and writes them, of as many samples as wanted.

Samples of several shards may share a key, so tars that mix them have new keys, the number of the tar and the place in
it; the json keeps the old one, and the uid is what to join on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice

from capfilt.data import shards
from capfilt.data.exports.form import Finished, Form, Part
from capfilt.data.sample import Sample
from capfilt.storage import write_guard
from capfilt.storage.paths import StoragePath, remove_file


def write(part: Part, samples: Iterator[Sample]) -> list[StoragePath]:
    """The tars of a part; one without samples is not written, since other loaders fail on it."""
    written: list[StoragePath] = []
    for number in range(part.files):
        path = part.out / f"{part.name(number)}.tar"
        first = next(samples, None)
        if first is None:
            write_guard.check_lock(path)
            remove_file(path)
            continue
        of_file = chain([first], islice(samples, part.per_file - 1) if part.per_file else samples)
        shards.write(path, _renamed(part, number, of_file) if part.per_file else of_file)
        written.append(path)
    return written


def _renamed(part: Part, number: int, samples: Iterator[Sample]) -> Iterator[Sample]:
    for place, sample in enumerate(samples):
        key = f"{part.name(number)}{place:0{max(4, len(str(part.per_file - 1)))}d}"
        yield replace(sample, key=key, meta={**sample.meta, "original_key": sample.key})


def sizes(out: StoragePath, parts: Iterable[Finished], _total: int) -> list[StoragePath]:
    """Write sizes.json, as open_clip reads it."""
    counts = {}
    for part in parts:
        for number, file in enumerate(part.files):
            rest = part.kept - number * part.per_file
            counts[file.name] = min(part.per_file, rest) if part.per_file else rest
    shards.write_sizes(out, counts)
    return []


WEBDATASET = Form(write, sizes, resharded=True, needs_text=False, carries=True)
