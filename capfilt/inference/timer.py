"""Where the time goes: seconds by stage, for `capfilt bench`. Without a timer nothing is measured or waits."""

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
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def stage(self, name: str, on_device: bool = True) -> Iterator[None]:
        """Time a block; an accelerator is waited for before and after, so that no other has its seconds."""
        self._wait(on_device)
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._wait(on_device)
            with self._lock:
                self.seconds[name] += time.perf_counter() - begun

    def _wait(self, on_device: bool) -> None:
        if on_device and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def timed(timer: StageTimer | None, name: str, on_device: bool = True) -> contextlib.AbstractContextManager[None]:
    """A stage of the timer, if there is one."""
    return contextlib.nullcontext() if timer is None else timer.stage(name, on_device)
