"""From a shard to batches of decoded pictures: decoding runs in threads beside the model, a few batches ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capfilt.data.images import decode
from capfilt.data.images.preprocess import Preprocess
from capfilt.data.sample import FailedSample, Sample
from capfilt.errors import ImageError
from capfilt.inference.timer import StageTimer, timed

BLIP = Preprocess()
Decoded = tuple[Sample, np.ndarray] | FailedSample


@dataclass(frozen=True)
class Pictures:
    """Some samples of a shard, in its order, with their pixels; and what could not be read among them."""

    samples: list[Sample]
    pixels: Tensor
    """uint8 [B, S, S, 3], one row per sample; bytes travel to a device four times as fast as floats."""
    faults: list[FailedSample]

    def on(self, device: torch.device, preprocess: Preprocess = BLIP) -> Tensor:
        """The pixels as a model reads them, [B, 3, S, S] normalised floats."""
        pixels = self.pixels.pin_memory() if device.type == "cuda" else self.pixels
        return preprocess.normalise(pixels.to(device, non_blocking=True))


def pictures(
    read: Iterable[Sample | FailedSample],
    batch_size: int,
    image_size: int,
    threads: int = 2,
    clock: StageTimer | None = None,
    preprocess: Preprocess = BLIP,
) -> Iterator[Pictures]:
    """Decode what is read of a shard; every key of it is in exactly one batch, as a sample or as a fault."""
    waiting: deque[Future[Decoded]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        taken: list[Decoded] = []
        for item in _read(read, clock):
            waiting.append(pool.submit(_decode, item, image_size, clock, preprocess))
            if len(waiting) > 3 * batch_size:
                taken.append(waiting.popleft().result())
            if len(taken) == batch_size:
                yield _stack(taken)
                taken = []
        while waiting:
            taken.append(waiting.popleft().result())
            if len(taken) == batch_size:
                yield _stack(taken)
                taken = []
        if taken:
            yield _stack(taken)


def _read(read: Iterable[Sample | FailedSample], clock: StageTimer | None) -> Iterator[Sample | FailedSample]:
    items = iter(read)
    while True:
        with timed(clock, "read", on_device=False):
            item = next(items, None)
        if item is None:
            return
        yield item


def _decode(item: Sample | FailedSample, image_size: int, clock: StageTimer | None, preprocess: Preprocess) -> Decoded:
    if isinstance(item, FailedSample):
        return item
    try:
        with timed(clock, "decode", on_device=False):
            return item, preprocess.to_pixels(decode.decode(item.image), image_size)
    except ImageError as error:
        return FailedSample(item.key, str(error))


def _stack(taken: list[Decoded]) -> Pictures:
    read = [item for item in taken if not isinstance(item, FailedSample)]
    pixels = np.stack([pixels for _, pixels in read]) if read else np.zeros((0, 1, 1, 3), np.uint8)
    return Pictures(
        samples=[sample for sample, _ in read],
        pixels=torch.from_numpy(pixels),
        faults=[item for item in taken if isinstance(item, FailedSample)],
    )
