"""Steps of generation as CUDA graphs: hundreds of kernels that the host starts at once, in place of one by one.

A step of one shape at one position is a graph of its own, captured when it comes a second time and replayed in every
later batch. What it reads and writes lies at addresses that never change, and batches and the texts that stay in them
have few sizes, so that there are few graphs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from capfilt.errors import is_out_of_memory
from capfilt.inference.generation.runner import MIN_ROWS, EagerRunner, StepRunner
from capfilt.models import Model
from capfilt.models.layers.bert import Head
from capfilt.models.layers.fused_decoder import FusedDecoder
from capfilt.models.layers.image_context import ImageContext

MAX_GRAPHS = 1024
"""Graphs that are kept; what is not captured by then is computed uncaptured."""


def few_sizes(count: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, ... that is no less."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Do it again, on the same tensors."""


class Capture(Protocol):
    """Makes graphs, which share their memory: they are replayed in turn."""

    def __call__(self, step: Callable[[], None]) -> Graph:
        """What a step does, as a graph that has not been replayed yet."""


class CudaCapture:
    """Not by `torch.cuda.graph`, which waits for the device and collects garbage each time."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            # Other threads may allocate and copy meanwhile: the next pictures.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                step()
            finally:
                graph.capture_end()
        current.wait_stream(self.stream)
        return graph


class StepGraphs:
    """The captured steps of a model whose weights stay as they are, and the tensors that they read and write."""

    def __init__(self, model: Model, new_capture: Callable[[], Capture] | None = CudaCapture):
        """`new_capture` begins anew with other memory; None: all is the same, and computed step by step."""
        self.model, self.new_capture = model, new_capture
        self.largest = 0
        """Images of the largest batch so far."""
        self._capture: Capture | None = None
        self._decoders: dict[torch.dtype, FusedDecoder] = {}
        self._room: dict[tuple[str, torch.dtype], Tensor] = {}
        self._graphs: dict[Hashable, Graph | None] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: Model) -> StepGraphs | None:
        """None for what has none: a CPU, and models that are written with by another decoder than BERT's."""
        on_gpu = next(model.parameters()).device.type == "cuda"
        return cls(model) if on_gpu and model.decoder_stack is not None else None

    @contextlib.contextmanager
    def runner(self, image: ImageContext) -> Iterator[GraphRunner]:
        """What writes one batch; another thread's waits. Where memory runs out, all that was held is let go."""
        with self._lock:
            try:
                yield GraphRunner(self, self.decoder(image.device.type))
            except RuntimeError as error:
                if is_out_of_memory(error):
                    self.clear()
                raise

    def decoder(self, kind: str) -> FusedDecoder:
        """The decoder in the format that matrix products have here: autocast's, or that of the weights."""
        stack = self.model.decoder_stack
        assert stack is not None, "a model that cannot be written with so"
        own = next(stack.parameters()).dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else own
        if dtype not in self._decoders:
            self._decoders[dtype] = FusedDecoder(stack, dtype)
        return self._decoders[dtype]

    def clear(self) -> None:
        """Let go of all graphs and of what they work on."""
        self._forget()
        self._room.clear()

    def _forget(self) -> None:
        self._graphs.clear()
        self._capture = None

    def room(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor at the address that this name has, with whatever was there."""
        size = math.prod(shape)
        flat = self._room.get((name, dtype))
        if flat is None or len(flat) < size:
            self._forget()  # what works on the old one
            self._room.pop((name, dtype), None)
            flat = self._room[name, dtype] = torch.empty(size, dtype=dtype, device=device)
        return flat[:size].view(shape)

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Replay a step, or capture it if it was seen before, or just do it."""
        graph = self._graphs.get(key)
        if graph is None and key in self._graphs:
            graph = self._captured(key, step)
        if graph is not None:
            graph.replay()
            return
        if self.new_capture is not None and len(self._graphs) < MAX_GRAPHS:
            self._graphs.setdefault(key, None)
        step()

    def _captured(self, key: Hashable, step: Callable[[], None]) -> Graph | None:
        """The step as a graph; None, and no other is tried again, where no memory is left for it."""
        assert self.new_capture is not None, "what is not captured is not remembered"
        try:
            self._capture = self._capture or self.new_capture()
            graph = self._graphs[key] = self._capture(step)
            return graph
        except RuntimeError as error:
            if not any(cause and is_out_of_memory(cause) for cause in (error, error.__context__)):
                raise
        # Here the exception is gone, and with it what it held on to.
        self._forget()
        self.new_capture = None
        logging.getLogger(__name__).warning("no memory for CUDA graphs of the captioner's steps, going on without")
        return None


class GraphRunner:
    """A batch that is written by a `StepGraphs`."""

    def __init__(self, graphs: StepGraphs, decoder: FusedDecoder):
        self.graphs, self.decoder = graphs, decoder
        self.image: ImageContext
        self.cache_LSRE: Tensor
        self._kind: Hashable

    @property
    def images(self) -> int:
        return self.image.rows

    def begin(self, image: ImageContext, rows: int, length: int, kind: Hashable) -> None:
        assert image.mask is None, "whole images alone are written about so"
        self._kind = (kind, length)
        self._hold_image(image)
        self.cache_LSRE = self._cache(rows, length)

    def hold(self, name: str, value: Tensor) -> Tensor:
        return self.graphs.room(name, tuple(value.shape), value.dtype, value.device).copy_(value)

    def run(self, step: int, advance: Callable[[int], None]) -> None:
        shapes = tuple(self.cache_LSRE.shape), tuple(self.image.tensors[0].shape)
        self.graphs.run((self._kind, self.decoder.dtype, *shapes, step), lambda: advance(step))

    def logits(self, ids_RT: Tensor, start: int) -> Tensor:
        return self.decoder.step(ids_RT, start, self.image, self.cache_LSRE)

    def reorder(self, rows: Tensor, length: int) -> None:
        kept = self.cache_LSRE[:, :length, :, self.decoder.width :]  # no query is read again
        kept.copy_(kept.index_select(2, rows))

    def keep(self, rows: Tensor, images: Tensor, length: int) -> None:
        kept = self.cache_LSRE[:, :length].index_select(2, rows)
        self.cache_LSRE = self._cache(len(rows), self.cache_LSRE.shape[1])
        self.cache_LSRE[:, :length] = kept
        if len(images) < self.images:
            self._hold_image(self.image.select(images))

    def first_size(self, images: int, rows_of_image: int) -> int:
        count = max(images, -(-MIN_ROWS // rows_of_image))
        self.graphs.largest = max(self.graphs.largest, count)
        return min(few_sizes(count), self.graphs.largest)  # most batches are as large as this one, whatever that is

    def size(self, count: int, most: int) -> int:
        return min(few_sizes(count), most)

    def _hold_image(self, image: ImageContext) -> None:
        tensors = (tensor.to(self.decoder.dtype) for tensor in image.tensors)
        self.image = ImageContext(tuple(self.hold(f"image {n}", tensor) for n, tensor in enumerate(tensors)))

    def _cache(self, rows: int, length: int) -> Tensor:
        shape = self.decoder.cache_shape(rows, length)
        return self.graphs.room("cache", shape, self.decoder.dtype, self.image.device)


@contextlib.contextmanager
def runner_for(model: Model, image: ImageContext, head: Head | None, graphs: StepGraphs | None) -> Iterator[StepRunner]:
    """What writes a batch beside these images: captured steps if there are, but beside whole images alone."""
    if graphs is None or image.mask is not None:
        yield EagerRunner(model, head)
    else:
        with graphs.runner(image) as runner:
            yield runner
