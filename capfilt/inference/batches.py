"""From a shard to batches of decoded pictures: all of it runs in threads beside the model, a few batches ahead.

Of a shard there are at most four batches in memory: one that is computed, one that waits for it, one that is stacked,
one that is decoded. A picture is decoded once, and resized once for each size and rule that the models ask for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from capfilt.data.embeddings import Embedding
from capfilt.data.images import decode
from capfilt.data.images.preprocess import ImageFormat, Resizing
from capfilt.data.loading.prefetch import prefetched
from capfilt.data.sample import FailedSample, Sample
from capfilt.errors import ImageError
from capfilt.inference.timer import StageTimer, timed

if TYPE_CHECKING:
    from capfilt.inference.interface import AsksAhead

T = TypeVar("T")
CPU = torch.device("cpu")
Measures = Mapping[str, Callable[[Image.Image], float]]
"""By name, a number that a decoded picture is asked for."""


class Decoded(NamedTuple):
    """A sample with its decoded picture."""

    sample: Sample
    pixels: list[np.ndarray]
    """Resized by each rule in turn."""
    embedding: Embedding | None
    """Its hashes, where they were asked for."""
    measured: Mapping[str, float]
    """What its measures say of it, by name."""


class Images:
    """Pictures on a device as models read them, and what models have computed from them so far."""

    def __init__(self, pixels: Mapping[ImageFormat, Tensor]):
        self._pixels = dict(pixels)
        self._computed: dict[Hashable, Any] = {}

    def pixels(self, image_format: ImageFormat) -> Tensor:
        """The pictures in one of the formats, normalised floats [B, 3, S, S]."""
        return self._pixels[image_format]

    def part(self, rows: slice | list[int]) -> Images:
        """Some of the pictures, or those of these numbers, which may come again; nothing is computed from them yet."""
        return Images({image_format: pixels[rows] for image_format, pixels in self._pixels.items()})

    def once(self, name: Hashable, compute: Callable[[], T]) -> T:
        """What was computed under this name, or else what `compute` returns now."""
        if name not in self._computed:
            self._computed[name] = compute()
        value: T = self._computed[name]
        return value

    def computed(self, name: Hashable) -> Any:
        """What was computed under this name; None for nothing."""
        return self._computed.get(name)


@dataclass(frozen=True)
class Pictures:
    """Some samples of a shard, in its order, with their decoded pictures; and what could not be read among them."""

    samples: list[Sample]
    pixels: dict[Resizing, Tensor]
    """By size and rule, uint8 as `Preprocess.stack` makes it, one row per sample; bytes travel to a device four times
    as fast as floats."""
    faults: list[FailedSample]
    embeddings: Sequence[Embedding] = ()
    """The hashes of each picture; none unless they were asked for."""
    measured: Sequence[Mapping[str, float]] = ()
    """What the measures say of each picture, by name; nothing of none."""

    def on(self, device: torch.device, formats: Iterable[ImageFormat]) -> Images:
        """The pictures on a device, normalised as each format says."""
        resized: dict[Resizing, Tensor] = {}
        normalised: dict[ImageFormat, Tensor] = {}
        for image_format in formats:
            rule = image_format.resizing
            if rule not in resized:
                resized[rule] = self.pixels[rule].to(device, non_blocking=True)
            normalised[image_format] = image_format.preprocess.normalise(resized[rule])
        return Images(normalised)


@dataclass(frozen=True)
class NotYetCopied:
    """Pictures that are copied to a device part by part, when a part is asked for: where memory runs out, the copy is
    tried again like all the rest, with fewer of them."""

    pictures: Pictures
    device: torch.device
    formats: Sequence[ImageFormat]

    def part(self, rows: slice | list[int]) -> Images:
        """As `Images.part`, on the device."""
        pixels = {rule: pixels[rows] for rule, pixels in self.pictures.pixels.items()}
        return replace(self.pictures, pixels=pixels).on(self.device, self.formats)


def pictures(
    read: Iterable[Sample | FailedSample], batch_size: int, formats: Iterable[ImageFormat], **options: Any
) -> Iterator[Pictures]:
    """`batches_of` in a thread, one batch ahead: reading, stacking and pinning go on while the one before is computed.
    What is read is read in that thread, too."""
    return prefetched(batches_of(read, batch_size, formats, **options), threading.Event(), depth=1)


def batches_of(
    read: Iterable[Sample | FailedSample],
    batch_size: int | Callable[[], int],
    formats: Iterable[ImageFormat],
    device: torch.device = CPU,
    timer: StageTimer | None = None,
    with_hashes: bool = False,
    asker: AsksAhead | None = None,
    measures: Measures | None = None,
    threads: int = 0,
) -> Iterator[Pictures]:
    """Decode what is read of a shard; every key of it is in exactly one batch, as a sample or as a fault.

    Args:
        batch_size: how many pictures a batch has, or what says it when a batch is made.
        device: where the pictures will go; for a GPU they lie in pinned memory.
        asker: is shown each picture as soon as it is decoded.
        measures: are taken of each picture.
        threads: that decode; 0: `decode_threads` of the device.
    """
    threads = threads or decode_threads(device)
    size: Callable[[], int] = batch_size if callable(batch_size) else partial(int, batch_size)
    most_waiting = max(size(), 2 * threads, asker.ahead if asker else 0)
    rules = {image_format.resizing: image_format for image_format in formats}
    how = (list(rules.values()), timer, with_hashes, asker, measures or {})
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        begun = (pool.submit(_decode, item, *how) for item in _read(read, timer))
        items = _in_order(begun, most_waiting)
        while taken := list(islice(items, size())):
            yield _stack(taken, rules, pinned=device.type == "cuda")
    finally:
        pool.shutdown(cancel_futures=True)


def decode_threads(device: torch.device) -> int:
    """Beside a GPU as many as this process may compute with, the CPUs of its worker; on a CPU two, since the models
    compute on all of them."""
    return max(2, torch.get_num_threads()) if device.type == "cuda" else 2


def _in_order(begun: Iterable[Future[T]], most_waiting: int) -> Iterator[T]:
    """The results, of which at most so many are waited for at a time."""
    waiting: deque[Future[T]] = deque()
    for future in begun:
        waiting.append(future)
        if len(waiting) > most_waiting:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _read(read: Iterable[Sample | FailedSample], timer: StageTimer | None) -> Iterator[Sample | FailedSample]:
    items = iter(read)
    while True:
        with timed(timer, "read", on_device=False):
            item = next(items, None)
        if item is None:
            return
        yield item


def _decode(
    item: Sample | FailedSample,
    formats: Sequence[ImageFormat],
    timer: StageTimer | None,
    with_hashes: bool,
    asker: AsksAhead | None,
    measures: Measures,
) -> Decoded | FailedSample:
    if isinstance(item, FailedSample):
        return item
    try:
        with timed(timer, "decode", on_device=False):
            picture = decode.decode(item.image)
            if asker is not None:
                asker.ask(item, picture)
            pixels = [image_format.to_pixels(picture) for image_format in formats]
            measured = {name: measure(picture) for name, measure in measures.items()}
            return Decoded(item, pixels, Embedding.of(item, picture) if with_hashes else None, measured)
    except ImageError as error:
        return FailedSample(item.key, str(error))


def _stack(taken: Sequence[Decoded | FailedSample], rules: Mapping[Resizing, ImageFormat], pinned: bool) -> Pictures:
    readable = [item for item in taken if isinstance(item, Decoded)]
    none = torch.zeros((0, 1, 1, 3), dtype=torch.uint8)
    stacked = {
        rule: image_format.preprocess.stack([item.pixels[i] for item in readable]) if readable else none
        for i, (rule, image_format) in enumerate(rules.items())
    }
    return Pictures(
        [item.sample for item in readable],
        {rule: pixels.pin_memory() for rule, pixels in stacked.items()} if pinned else stacked,
        [item for item in taken if isinstance(item, FailedSample)],
        [item.embedding for item in readable if item.embedding is not None],
        [item.measured for item in readable],
    )
