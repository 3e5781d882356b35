"""Models that turn a picture into one vector of unit length, in which near means alike.

Two sorts: the image side of a model that compares images with texts, and a copy-detection descriptor, a TorchScript
file. Loading such a file runs code that lies in it: it is opened only where a person says so, as `copy=FILE`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.data.images.preprocess import ImageFormat
from capfilt.errors import ModelError
from capfilt.inference.batches import Images
from capfilt.inference.device import Compute, autocast
from capfilt.inference.roles import preprocess_for
from capfilt.models.checkpoints import store
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath


class Embedder(Protocol):
    """Makes vectors of pictures."""

    @property
    def image_format(self) -> ImageFormat:
        """The pictures that it reads."""

    def vectors(self, images: Images) -> np.ndarray:
        """Unit vectors of pictures, float32 [B, D]."""


class ModelEmbedder:
    """The image side of a model that encodes images and texts apart."""

    def __init__(self, folder: StoragePath, compute: Compute):
        """Load a saved model; of what lies beside its weights it needs no tokenizer. Raises as `store.load`."""
        self.device, self.compute = compute.open(), compute
        self.model = store.load(folder, compute.dtype).eval().to(self.device)
        config = self.model.config
        self.image_format = ImageFormat(config.image_size, preprocess_for(folder, config))

    @torch.inference_mode()
    def vectors(self, images: Images) -> np.ndarray:
        with autocast(self.device, self.compute.dtype):
            tokens = self.model.encode_image(images.pixels(self.image_format))
            return unit_vectors(self.model.project_image(tokens))


class CopyEmbedder:
    """A descriptor of SSCD's or ISC's layout: a TorchScript module from [B, 3, S, S] to [B, D], computed in fp32."""

    def __init__(self, path: StoragePath, image_format: ImageFormat, device: torch.device):
        self.path, self.image_format = path, image_format
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of torch: descriptors are published so
                self.module = torch.jit.load(str(local_copy(path)), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"{path} cannot be loaded as TorchScript: {' '.join(str(error).split())[:300]}") from None

    @torch.inference_mode()
    def vectors(self, images: Images) -> np.ndarray:
        pixels = images.pixels(self.image_format)
        try:
            # What it fuses after its first batches would round otherwise.
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                made = self.module(pixels)
        except torch.jit.Error as error:
            size = self.image_format.size
            why = " ".join(str(error).split())[-300:]
            raise ModelError(f"{self.path} fails on pictures of {size} px; set size=PIXELS: {why}") from None
        if not isinstance(made, Tensor) or made.ndim != 2 or len(made) != len(pixels):
            shown = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ModelError(
                f"{self.path} answers {len(pixels)} pictures with {shown}; a descriptor makes one vector each"
            )
        return unit_vectors(made)


def unit_vectors(projected: Tensor) -> np.ndarray:
    """What a model projects of images -> unit vectors, float32 [B, D].

    Of several vectors of an image [B, Q, D] (BLIP-2's queries) it is the mean, brought to length 1: a text is compared
    with the nearest of them, and two pictures have no such third.
    """
    vectors = projected.float()
    if vectors.ndim == 3:
        vectors = vectors.mean(dim=1)
    unit: np.ndarray = F.normalize(vectors, dim=-1).cpu().numpy()
    return unit


def dimension(vectors: Callable[[Images], np.ndarray], form: ImageFormat, device: torch.device) -> int:
    """How many numbers a vector has, from a black picture of this format."""
    black = form.preprocess.stack([np.zeros((form.size, form.size, 3), np.uint8)])
    return int(vectors(Images({form: form.preprocess.normalise(black.to(device))})).shape[1])
