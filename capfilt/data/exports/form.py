"""What a format of an export is, and the part of the data that a writer is given.

Texts are cleaned of lone surrogates for every format: a json may spell them, and neither UTF-8 nor a tokenizer can.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from capfilt.data.sample import Sample
from capfilt.storage.paths import StoragePath

CHANGED = "text changed for the format"
"""The remark that counts texts which a format cannot hold, or its reader would misread, as they are."""

_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Part:
    """A part of the data, and where its files go."""

    out: StoragePath
    first: int
    """The number of its first file; parts are numbered so that files are without gaps, in the order of the shards."""
    files: int
    """How many files it may have."""
    per_file: int
    """Samples of a file at most; 0 for all."""
    total: int
    """Files of all parts."""
    image_root: str
    """What stands before the paths of pictures in a list; "" or with a slash at its end."""
    remarks: Counter[str] = field(default_factory=Counter)

    def name(self, number: int = 0) -> str:
        """The name of one of its files, `00012`, by its number in the part."""
        return f"{self.first + number:0{max(5, len(str(self.total - 1)))}d}"

    def text(self, text: str, escape: Callable[[str], str] = str) -> str:
        """A text as the format has it; one that had to change for that is counted."""
        written = escape(_SURROGATES.sub("\ufffd", text))
        self.remarks[CHANGED] += written != text
        return written


class Finished(NamedTuple):
    """What a part came to."""

    files: Sequence[StoragePath]
    kept: int
    """Its samples."""
    per_file: int


@dataclass(frozen=True)
class Form:
    """One format."""

    write: Callable[[Part, Iterator[Sample]], list[StoragePath]]
    """Writes the files of a part and returns them; it pulls all of the samples."""
    finish: Callable[[StoragePath, Iterable[Finished], int], list[StoragePath]] = lambda *_: []
    """Writes what is one file for all parts, into a folder, given the parts in order and the number of all samples;
    returns the paths of those that a reader is given; without them it is given the folder."""
    resharded: bool = False
    """Whether the number of samples in a file can be chosen."""
    needs_text: bool = True
    """Whether a picture without a text is left out."""
    reads: str = "samples"
    """"uids": of a run folder, its tables alone are read."""
    carries: bool = False
    """Whether the other members of a key are wanted."""


def best(captions: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The text of highest itc, else itm; the first one where none has a score."""

    def score(caption: Mapping[str, Any]) -> float:
        values = (number(caption.get(name)) for name in ("itc", "itm"))
        return next((value for value in values if value is not None), -math.inf)

    return max(captions, key=score)


def number(value: object) -> float | None:
    """A finite number out of a json; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < 1e300 else None


def whole(value: object) -> int | None:
    """A whole number of 64 bits out of a json; None for anything else."""
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def words(value: object) -> str | None:
    """A text out of a json, without lone surrogates; None for anything else."""
    return _SURROGATES.sub("\ufffd", value) if isinstance(value, str) else None
