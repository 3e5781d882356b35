"""Texts alone, a line each in a .txt: what trainings that read no pictures take beside shards.

A line becomes a sample without image bytes; its uid is a hash of the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from capfilt.data.sample import FailedSample, Sample, is_text
from capfilt.data.shards.members import MAX_TEXT
from capfilt.data.shards.unpack import DamagedError, Readable, decompressed

LINES = (".txt", ".txt.gz")


def is_lines(url: str) -> bool:
    """Whether this is a file of lines, by its name."""
    return url.endswith(LINES)


def lines(stream: Readable) -> Iterator[Sample | FailedSample]:
    """The lines of a file, UTF-8, that have something to read, unpacked within the bounds of shards; one that is longer
    than a text may be ends it.

    Raises (while it is read):
        OSError: the stream failed.
    """
    number = -1
    try:
        file = decompressed(stream)
        while line := file.readline(MAX_TEXT):
            number += 1
            if len(line) == MAX_TEXT and not line.endswith(b"\n"):
                yield FailedSample(str(number), f"a line of {MAX_TEXT // 2**20} MiB or more")
                return
            try:
                text = line.decode("utf-8-sig" if number == 0 else "utf-8").strip()
            except UnicodeError:
                yield FailedSample(str(number), "text is not UTF-8")
                continue
            if is_text(text):
                yield Sample(str(number), b"", "", text, {"uid": hashlib.sha256(text.encode()).hexdigest()[:32]})
    except DamagedError as error:
        yield FailedSample(str(number + 1), str(error))
