"""Steps of generation as CUDA graphs: hundreds of kernels that the host starts at once, in place of one by one.

A step of one shape at one position is a graph of its own, captured when it comes a second time and replayed in every
later batch. What it reads and writes lies at addresses that never change, and batches and the texts that stay in them
have few sizes, so that there are few graphs.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from capfilt.errors import is_out_of_memory

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
    """Captured steps, and the tensors that they read and write."""

    def __init__(self, new_capture: Callable[[], Capture] = CudaCapture):
        """`new_capture` begins anew with other memory."""
        self.largest = 0
        """Images of the largest batch so far."""
        self.full = False
        """Whether a graph has found no memory: no other is tried."""
        self._new_capture = new_capture
        self._capture: Capture | None = None
        self._room: dict[tuple[str, torch.dtype], Tensor] = {}
        self._graphs: dict[Hashable, Graph | None] = {}

    def clear(self) -> None:
        """Let go of all graphs and of what they work on."""
        self._forget()
        self._room.clear()

    @contextlib.contextmanager
    def cleared_when_full(self) -> Iterator[None]:
        """Where memory runs out within it, a smaller batch may need what lies here."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                self.clear()
            raise

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
        if not self.full and len(self._graphs) < MAX_GRAPHS:
            self._graphs.setdefault(key, None)
        step()

    def _captured(self, key: Hashable, step: Callable[[], None]) -> Graph | None:
        """The step as a graph; None where no memory is left for it."""
        try:
            self._capture = self._capture or self._new_capture()
            graph = self._graphs[key] = self._capture(step)
            return graph
        except RuntimeError as error:
            if not any(cause and is_out_of_memory(cause) for cause in (error, error.__context__)):
                raise
        # Here the exception is gone, and with it what it held on to.
        self._forget()
        self.full = True
        logging.getLogger(__name__).warning("no memory for CUDA graphs of the captioner's steps, going on without")
        return None
