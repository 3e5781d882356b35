"""Texts written on a GPU by the decoder that is laid out for it, its steps started one by one or captured."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from capfilt.inference.generation.graphs import StepGraphs, few_sizes
from capfilt.inference.generation.runner import EagerRunner, StepRunner, least_images
from capfilt.models import Model
from capfilt.models.layers.bert import Head
from capfilt.models.layers.fused_decoder import FusedDecoder
from capfilt.models.layers.image_context import ImageContext


class FusedSteps:
    """What writes the batches of a model whose weights stay as they are."""

    def __init__(self, model: Model, graphs: StepGraphs | None = None):
        """`graphs`: steps are captured."""
        self.model, self.graphs = model, graphs
        self._decoders: dict[torch.dtype, FusedDecoder] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: Model, capture: bool = False) -> FusedSteps | None:
        """None for what has none: a CPU, and models that write by another decoder than BERT's."""
        if next(model.parameters()).device.type != "cuda" or model.decoder_stack is None:
            return None
        return cls(model, StepGraphs() if capture else None)

    @contextlib.contextmanager
    def runner(self, image: ImageContext) -> Iterator[StepRunner]:
        """What writes one batch; another thread's waits, where steps are captured. Where memory runs out, all that
        graphs hold is let go."""
        decoder = self.decoder(image.device.type)
        if self.graphs is None:
            yield FusedRunner(decoder)
            return
        with self._lock, self.graphs.cleared_when_full():
            yield CapturedRunner(decoder, self.graphs)

    def decoder(self, kind: str) -> FusedDecoder:
        """The decoder in the format that matrix products have here: autocast's, or that of the weights."""
        stack = self.model.decoder_stack
        assert stack is not None, "a model that cannot be written with so"
        own = next(stack.parameters()).dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
        if dtype not in self._decoders:
            self._decoders[dtype] = FusedDecoder(stack, dtype)
        return self._decoders[dtype]


class FusedRunner:
    """A batch whose steps are started one by one."""

    def __init__(self, decoder: FusedDecoder):
        self.decoder = decoder
        self.image: ImageContext
        self.cache_LSRE: Tensor

    @property
    def images(self) -> int:
        return self.image.rows

    def begin(self, image: ImageContext, rows: int, length: int, kind: Hashable) -> None:
        assert image.mask is None, "whole images alone are written about so"
        self._hold_image(image)
        self.cache_LSRE = self._room("cache", self.decoder.cache_shape(rows, length))

    def hold(self, name: str, value: Tensor) -> Tensor:
        return value

    def run(self, step: int, advance: Callable[[int], None]) -> None:
        advance(step)

    def logits(self, ids_RT: Tensor, start: int, without: int | None = None) -> Tensor:
        return self.decoder.step(ids_RT, start, self.image, self.cache_LSRE, without)

    def reorder(self, rows: Tensor, length: int) -> None:
        kept = self.cache_LSRE[:, :length, :, self.decoder.width :]  # no query is read again
        kept.copy_(kept.index_select(2, rows))

    def keep(self, rows: Tensor, images: Tensor, length: int) -> None:
        kept = self.cache_LSRE[:, :length].index_select(2, rows)
        self.cache_LSRE = self._room("cache", self.decoder.cache_shape(len(rows), self.cache_LSRE.shape[1]))
        self.cache_LSRE[:, :length] = kept
        if len(images) < self.images:
            self._hold_image(self.image.select(images))

    def first_size(self, images: int, rows_of_image: int) -> int:
        return least_images(images, rows_of_image)

    def size(self, count: int, most: int) -> int:
        return count

    def _hold_image(self, image: ImageContext) -> None:
        tensors = (tensor.to(self.decoder.dtype) for tensor in image.tensors)
        self.image = ImageContext(tuple(self.hold(f"image {n}", tensor) for n, tensor in enumerate(tensors)))

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.decoder.dtype, device=self.image.device)


class CapturedRunner(FusedRunner):
    """A batch whose steps are captured: whatever they read and write lies where graphs look for it."""

    def __init__(self, decoder: FusedDecoder, graphs: StepGraphs):
        super().__init__(decoder)
        self.graphs = graphs
        self._kind: Hashable

    def begin(self, image: ImageContext, rows: int, length: int, kind: Hashable) -> None:
        self._kind = (kind, self.decoder.dtype)
        super().begin(image, rows, length, kind)

    def hold(self, name: str, value: Tensor) -> Tensor:
        return self.graphs.room(name, tuple(value.shape), value.dtype, value.device).copy_(value)

    def run(self, step: int, advance: Callable[[int], None]) -> None:
        shapes = tuple(self.cache_LSRE.shape), tuple(self.image.tensors[0].shape)
        self.graphs.run((self._kind, *shapes, step), lambda: advance(step))

    def first_size(self, images: int, rows_of_image: int) -> int:
        count = least_images(images, rows_of_image)
        self.graphs.largest = max(self.graphs.largest, count)
        return min(few_sizes(count), self.graphs.largest)  # most batches are as large as this one, whatever that is

    def size(self, count: int, most: int) -> int:
        return min(few_sizes(count), most)

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.graphs.room(name, shape, self.decoder.dtype, self.image.device)


@contextlib.contextmanager
def runner_for(model: Model, image: ImageContext, head: Head | None, fused: FusedSteps | None) -> Iterator[StepRunner]:
    """What writes a batch beside these images; the model itself beside parts of them."""
    if fused is None or image.mask is not None:
        yield EagerRunner(model, head)
    else:
        with fused.runner(image) as runner:
            yield runner
