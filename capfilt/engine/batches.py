"""From a shard to batches of decoded pictures: decoding runs in threads beside the model, a few batches ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capfilt.data import images, shards
from capfilt.data.sample import Fault, Sample
from capfilt.errors import ImageError


@dataclass(frozen=True)
class Pictures:
    """Some samples of a shard, in its order, with their pixels; and what could not be read among them."""

    samples: list[Sample]
    pixels: Tensor
    """[B, 3, S, S] normalised floats, one row per sample."""
    faults: list[Fault]


def pictures(
    url: str | Iterable[Sample | Fault], batch_size: int, image_size: int, threads: int = 2
) -> Iterator[Pictures]:
    """Read a shard, or what was read of one; every key of it is in exactly one batch, as a sample or as a fault."""
    waiting: deque[Future[Sample | Fault] | Future[tuple[Sample, np.ndarray] | Fault]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        taken: list[tuple[Sample, np.ndarray] | Fault] = []
        for item in shards.read(url) if isinstance(url, str) else url:
            waiting.append(pool.submit(_decode, item, image_size))
            if len(waiting) > 3 * batch_size:
                taken.append(waiting.popleft().result())  # type: ignore[arg-type]
            if len(taken) == batch_size:
                yield _stack(taken)
                taken = []
        while waiting:
            taken.append(waiting.popleft().result())  # type: ignore[arg-type]
            if len(taken) == batch_size:
                yield _stack(taken)
                taken = []
        if taken:
            yield _stack(taken)


def _decode(item: Sample | Fault, image_size: int) -> tuple[Sample, np.ndarray] | Fault:
    if isinstance(item, Fault):
        return item
    try:
        return item, images.to_pixels(images.decode(item.image), image_size)
    except ImageError as error:
        return Fault(item.key, str(error))


def _stack(taken: list[tuple[Sample, np.ndarray] | Fault]) -> Pictures:
    read = [item for item in taken if not isinstance(item, Fault)]
    pixels = np.stack([pixels for _, pixels in read]) if read else np.zeros((0, 1, 1, 3), np.uint8)
    return Pictures(
        samples=[sample for sample, _ in read],
        pixels=torch.from_numpy(images.normalise(pixels)),
        faults=[item for item in taken if isinstance(item, Fault)],
    )
