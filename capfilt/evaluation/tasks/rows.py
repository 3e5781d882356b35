"""The rows of a task: read from shards with the pictures that they are about.

Each row is either handed on or counted with the reason why it cannot be used, so that no score is of fewer rows than it
says. A row whose id came before is one that cannot be used.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.tasks import FailedRow, right_picture
from capfilt.errors import DataError
from capfilt.inference.batches import batches_of
from capfilt.inference.local_model import LocalModel
from capfilt.printable import printable
from capfilt.runs.tally import MAX_REASONS, OTHER

_VALUES = re.compile(r"b?'[^']*'|\"[^\"]*\"|\[[^]]*\]|-?\d+(?:\.\d+)?")


class HasId(Protocol):
    """A row of a task."""

    @property
    def id(self) -> Any:
        """What no other row has; None where rows need none."""


Row = TypeVar("Row", bound=HasId)
Parse = Callable[[Sample, list[FailedRow]], Sequence[Row]]
"""The rows of a sample; those that cannot be used are appended to the list. DataError where none can be read."""


@dataclass
class LeftOut:
    """How many rows there were, and how many of them are in no score, by the reason."""

    rows: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, where: str, count: int = 1) -> None:
        """So many rows more that cannot be used; the first one for a reason is named in a warning."""
        self.rows += count
        kind = printable(_VALUES.sub("...", re.split(r";|\. | \(| at byte", reason, maxsplit=1)[0]), 80)
        if kind not in self.reasons and len(self.reasons) >= MAX_REASONS:
            kind = OTHER
        if kind not in self.reasons:
            logging.getLogger(__name__).warning("%s: %s; such rows are counted in left_out", where, reason)
        self.reasons[kind] += count

    def figures(self) -> dict[str, Any]:
        """`rows`, all of them, and `left_out`, absent where none is."""
        return {"rows": self.rows} | ({"left_out": dict(self.reasons.most_common())} if self.reasons else {})


@dataclass(frozen=True)
class RowBatch(Generic[Row]):
    """Some samples whose pictures can be read, with their rows, one at least of each."""

    pixels: Tensor
    """[B, 3, S, S] as the model reads them; of tasks with two pictures [2 B, 3, S, S], the left ones first."""
    samples: list[Sample]
    rows: list[list[Row]]

    @property
    def flat(self) -> list[Row]:
        """The rows, sample after sample."""
        return [row for of_sample in self.rows for row in of_sample]

    @property
    def sample_of_row(self) -> list[int]:
        """The number of each one's sample."""
        return [number for number, of_sample in enumerate(self.rows) for _ in of_sample]


class RowReader(Generic[Row]):
    """Reads the rows of shards, and knows afterwards how many there were and which were left out."""

    def __init__(
        self,
        local: LocalModel,
        parse: Parse[Row],
        batch_size: int,
        device: torch.device,
        pairs: bool = False,
        extras: bool = False,
    ):
        """Args:
        parse: makes the rows of a sample.
        pairs: whether rows are of two pictures, of which the right one is `tasks.right_picture`.
        extras: whether `parse` needs more of a sample than image, text and json.
        """
        self.left_out = LeftOut()
        self._local, self._parse, self._batch_size, self._device = local, parse, batch_size, device
        self._pictures, self._extras = 2 if pairs else 1, extras or pairs
        self._ids: set[str] = set()
        self._pending: dict[str, tuple[Sample, list[Row]]] = {}
        """By key: samples with rows whose pictures are being decoded."""

    def batches(self, urls: Sequence[str]) -> Iterator[RowBatch[Row]]:
        """The rows of shards, some samples at a time. DataError, at the end, where no row could be used."""
        image_format = self._local.image_format
        used = 0
        for url in urls:
            size = self._pictures * self._batch_size
            # Read in this thread, since reading counts what is left out.
            for decoded in batches_of(self._samples(url), size, [image_format], device=self._device):
                places = {sample.key: place for place, sample in enumerate(decoded.samples)}
                faults = {fault.key: fault.reason for fault in decoded.faults}
                kept: list[tuple[Sample, list[Row]]] = []
                for key in [key for key in self._pending if key in places or key in faults]:
                    sample, rows = self._pending.pop(key)
                    if reason := next((faults[name] for name in self._names(key) if name in faults), ""):
                        self.left_out.add(f"picture: {reason}", f"{url}, {key}", len(rows))
                    else:
                        kept.append((sample, rows))
                if not kept:
                    continue
                used += (count := sum(len(rows) for _, rows in kept))
                self.left_out.rows += count
                names = zip(*(self._names(sample.key) for sample, _ in kept), strict=True)
                chosen = torch.tensor([places[name] for of_side in names for name in of_side], device=self._device)
                pixels = decoded.on(self._device, [image_format]).pixels(image_format)[chosen]
                yield RowBatch(pixels, [sample for sample, _ in kept], [rows for _, rows in kept])
        if not used:
            raise DataError(self._nothing(urls))

    def _names(self, key: str) -> list[str]:
        """The name of each picture of a sample while it is decoded; no key has a line break."""
        return [key, f"{key}\nright"][: self._pictures]

    def _samples(self, url: str) -> Iterator[Sample]:
        """The samples of a shard that have rows, one for each picture of them, adjacent."""
        for item in shards.read(url, extras=self._extras):
            where = f"{url}, {item.key}"
            if isinstance(item, FailedSample):
                self.left_out.add(f"sample: {item.reason}", where)
                continue
            rows = self._rows(item, where)
            if not rows:
                continue
            try:
                images = [item.image, right_picture(item.extras)] if self._pictures == 2 else [item.image]
            except DataError as error:
                self.left_out.add(str(error), where, len(rows))
                continue
            self._pending[item.key] = (item, rows)
            yield from (
                replace(item, key=name, image=image) for name, image in zip(self._names(item.key), images, strict=True)
            )

    def _rows(self, sample: Sample, where: str) -> list[Row]:
        failed: list[FailedRow] = []
        try:
            rows = self._parse(sample, failed)
        except DataError as error:
            self.left_out.add(str(error), where)
            return []
        for row in failed:
            self.left_out.add(row.reason, f"{where}, {row.id}")
        new = []
        for one in rows:
            if one.id is not None and str(one.id) in self._ids:
                self.left_out.add("its id comes twice", f"{where}, {one.id}")
            else:
                self._ids.add(str(one.id))
                new.append(one)
        return new

    def _nothing(self, urls: Sequence[str]) -> str:
        where = ", ".join(urls[:3]) + (", ..." if len(urls) > 3 else "")
        why = "".join(f", mostly: {reason}" for reason, _ in self.left_out.reasons.most_common(1))
        which = (
            f"none of {self.left_out.rows} rows of this task can be used"
            if self.left_out.rows
            else "no row of this task"
        )
        return (
            f"nothing can be evaluated on {where or '(no shard)'}: {which}{why}; docs/tasks.md says what a sample's"
            " json has for each task."
        )
