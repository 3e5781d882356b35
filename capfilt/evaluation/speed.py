"""How fast: the annotator on pictures in memory, what other number formats change, and what machine it was."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from capfilt import cpus
from capfilt.data.sample import Sample
from capfilt.inference.annotator import Annotator, Text
from capfilt.inference.batches import Images
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.device import autocast

CPU = torch.device("cpu")
PACKAGES = ("capfilt", "torch", "numpy", "pillow", "pyarrow", "tokenizers")


@dataclass(frozen=True)
class Load:
    """Decoded pictures with the texts that came with them."""

    images: Images
    samples: list[Sample]
    web: list[list[str]]

    def part(self, start: int, stop: int) -> Load:
        rows = slice(start, stop)
        return Load(self.images.part(rows), self.samples[rows], self.web[rows])

    def annotated(self, annotator: Annotator, batch_size: int) -> list[list[Text]]:
        """All of it through the annotator."""
        texts = []
        for start in range(0, len(self.samples), batch_size):
            some = self.part(start, start + batch_size)
            texts += annotator.annotate(some.images, some.samples, some.web)
        return texts


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long something takes, the device's part of it too."""
    _wait(device)
    begun = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begun


def agreement(
    annotator: Annotator, load: Load, device: torch.device, dtype: torch.dtype, batch_size: int
) -> dict[str, float]:
    """What another number format or batch size changes against fp32 in one batch.

    The share of generated tokens that are the same, and how far apart the scores of the web texts are.
    """
    one = load.annotated(annotator, len(load.samples))
    with autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext():
        other = load.annotated(annotator, batch_size)
    captioner = annotator.captioner
    assert isinstance(captioner, LocalCaptioner), "token by token only texts of a model in this process are compared"
    tokens = [(_tokens(captioner, a), _tokens(captioner, b)) for a, b in zip(one, other, strict=True)]
    same = sum(int(np.sum(a[:, : b.shape[1]] == b[:, : a.shape[1]])) for a, b in tokens)
    most = sum(len(a) * max(a.shape[1], b.shape[1]) for a, b in tokens)
    pairs = [pair for texts in zip(one, other, strict=True) for pair in zip(*texts, strict=True)]
    web = [(a, b) for a, b in pairs if a.source == "web"]
    return {
        "equal_tokens": same / most,
        **{f"{s}_error": max(abs(getattr(a, s) - getattr(b, s)) for a, b in web) for s in ("itm", "itc")},
    }


def _tokens(captioner: LocalCaptioner, texts: Sequence[Text]) -> np.ndarray:
    """Ids of the written texts of an image [C, T]."""
    written = [text.text for text in texts if text.source == "synthetic"]
    ids, _ = captioner.tokenizer.encode(written, 1 << 16)
    return ids


def machine(device: torch.device) -> dict[str, Any]:
    """What figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "cores_allowed": cpus.available(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """The packages that figures depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
