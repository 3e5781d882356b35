"""Where the time goes: seconds by stage, for metrics and `capfilt bench`. On a GPU its own clock is read, afterwards:
nobody waits for it while work is under way."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

import torch


class StageTimer:
    """Adds up seconds by stage, from several threads."""

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        """Stages of the GPU that are not added yet: between which marks in its work each of them is."""
        self._lock = threading.Lock()

    @property
    def seconds(self) -> defaultdict[str, float]:
        """By stage. The last one's end is waited for: read it where the results are there."""
        with self._lock:
            for name, begin, end in self._running:
                end.synchronize()
                self._seconds[name] += begin.elapsed_time(end) / 1000
            self._running.clear()
        return self._seconds

    @contextlib.contextmanager
    def stage(self, name: str, on_device: bool = True) -> Iterator[None]:
        """Time a block: what the host does, or `on_device` what an accelerator does of it."""
        if on_device and self.device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            try:
                yield
            finally:
                marks[1].record()
                with self._lock:
                    self._running.append((name, marks[0], marks[1]))
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] += time.perf_counter() - begun


def timed(timer: StageTimer | None, name: str, on_device: bool = True) -> contextlib.AbstractContextManager[None]:
    """A stage of the timer, if there is one."""
    return contextlib.nullcontext() if timer is None else timer.stage(name, on_device)
