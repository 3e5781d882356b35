"""Held-out images as a model encodes them, each once, with the human texts of each.

A picture that stands under several keys is one image: else a model that is always right would miss it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.data import shards
from capfilt.data.policy import failure_class
from capfilt.data.sample import Sample
from capfilt.errors import DataError
from capfilt.inference.batches import pictures
from capfilt.inference.local_model import LocalModel


@dataclass(frozen=True)
class EncodedBatch:
    """Some images with their tokens [B, N, D], and why others beside them could not be read."""

    tokens: Tensor
    samples: list[Sample]
    unreadable: Counter[str] = field(default_factory=Counter)

    def only(self, chosen: Sequence[bool]) -> EncodedBatch:
        return EncodedBatch(self.tokens[torch.tensor(chosen)], list(itertools.compress(self.samples, chosen)))


@dataclass(frozen=True)
class EvalSet:
    """Encoded images, each once, with the human texts of each: one at least."""

    tokens: Tensor
    """[I, N, D], not on the accelerator: of COCO's 5,000 images they are 9 GB"""
    uids: list[str]
    texts: list[list[str]]
    device: torch.device
    """Where the model computes."""
    without_text: int = 0
    """Pictures that were left out since they came without a text."""

    @property
    def image_of_text(self) -> np.ndarray:
        """[T]: which image each text belongs to, texts counted image after image."""
        return np.repeat(np.arange(len(self.texts)), [len(of_image) for of_image in self.texts])

    @property
    def flat_texts(self) -> list[str]:
        """All texts, image after image."""
        return [text for of_image in self.texts for text in of_image]

    def split(self, size: int) -> Iterator[Tensor]:
        """The tokens of `size` images at a time."""
        return (part.to(self.device) for part in self.tokens.split(size))

    def of_images(self, indices: np.ndarray) -> Tensor:
        """The tokens of these images."""
        return self.tokens[torch.from_numpy(indices)].to(self.device)


class UniqueImages:
    """Gathers an eval set: a picture that stands under several keys is one image, with the texts of all of them.

    Pictures are the same where their uids are equal or their bytes are, and so are two that are the same as a third.
    """

    def __init__(self) -> None:
        self.without_text = 0
        self._tokens: list[Tensor] = []
        self._uids: list[str] = []
        self._texts: list[list[str]] = []
        self._same: list[int] = []
        """For each image the number of one before it that it turned out to be, else its own number."""
        self._known: dict[str, int] = {}
        """The image by its uid and by its sha256 (32 and 64 digits)."""

    def add(self, batch: EncodedBatch) -> None:
        """Take up a batch; pictures that are known already give only their texts, so they need no memory twice."""
        new = [self._add(sample) for sample in batch.samples]
        if any(new):
            self._tokens.append(batch.only(new).tokens.cpu())  # off the accelerator

    def _add(self, sample: Sample) -> bool:
        if not sample.captions:
            self.without_text += 1
            return False
        names = (sample.uid, sample.sha256)
        known = sorted({self._first(self._known[name]) for name in names if name in self._known})
        if not known:
            self._uids.append(sample.uid)
            self._texts.append([])
            self._same.append(len(self._same))
        image, *others = known or [len(self._same) - 1]
        for other in others:
            self._same[other] = image
            self._texts[image] += self._texts[other]
        self._known |= dict.fromkeys(names, image)
        self._texts[image] += [caption["text"] for caption in sample.captions]
        return not known

    def _first(self, image: int) -> int:
        while self._same[image] != image:
            image = self._same[image]
        return image

    def eval_set(self, device: torch.device) -> EvalSet | None:
        """All of them, in the order in which they came; None where no picture with a text did."""
        if not self._tokens:
            return None
        images = [image for image, first in enumerate(self._same) if image == first]
        tokens = joined(self._tokens)
        if len(images) < len(tokens):
            tokens = tokens[torch.tensor(images)]
        uids, texts = [self._uids[i] for i in images], [self._texts[i] for i in images]
        return EvalSet(tokens, uids, texts, device, self.without_text)


def joined(batches: Sequence[Tensor]) -> Tensor:
    """Image tokens of several batches, padded with zeros where pictures of a batch had more than those of another."""
    most = max(tokens.shape[1] for tokens in batches)
    if all(tokens.shape[1] == most for tokens in batches):
        return torch.cat([*batches])
    return torch.cat([F.pad(tokens, (0, 0, 0, most - tokens.shape[1])) for tokens in batches])


@torch.inference_mode()
def encode_batches(
    local: LocalModel, urls: Sequence[str], batch_size: int, device: torch.device
) -> Iterator[EncodedBatch]:
    """Read shards and encode their images."""
    formats = [local.image_format]
    for url in urls:
        for batch in pictures(shards.read(url), batch_size, formats, device=device):
            tokens = local.image_tokens(batch.on(device, formats)) if batch.samples else torch.empty(0)
            yield EncodedBatch(tokens, batch.samples, Counter(failure_class(fault.reason) for fault in batch.faults))


def encode_pairs(local: LocalModel, urls: Sequence[str], batch_size: int, device: torch.device) -> EvalSet:
    """The eval set of shards, without the pictures that cannot be read or have no text. DataError for an empty one."""
    images = UniqueImages()
    for batch in encode_batches(local, urls, batch_size, device):
        images.add(batch)
    if (pairs := images.eval_set(device)) is None:
        where = ", ".join(urls) or "(no shard)"
        raise DataError(f"the held-out set {where} has no picture that can be read and has a text")
    return pairs
