"""Trainings that give the same weights each time: what torch must be set to, and what it may not do then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from capfilt.errors import ModelError

_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""cuBLAS adds in one order only where its workspaces are fixed (its documentation, "Results reproducibility"); read
when the process first multiplies on a GPU."""


@contextmanager
def deterministic(wanted: bool, device: torch.device) -> Iterator[None]:
    """Within the block torch takes deterministic kernels only, where `wanted`; else nothing changes.

    On a CPU trainings are reproducible without it, for a fixed number of threads; there it is a check that costs
    little. On a GPU it takes slower kernels for the backward pass of attention and of indexing.

    Raises:
        ModelError: an operation of the training has no deterministic kernel on this device.
    """
    if not wanted:
        yield
        return
    fill = (
        torch.utils.deterministic
    )  # also fills every new tensor, which finds other bugs and costs a quarter of a step
    before = torch.are_deterministic_algorithms_enabled(), fill.fill_uninitialized_memory  # type: ignore[attr-defined]
    with ExitStack() as stack:
        if device.type == "cuda":
            for name, value in _CUBLAS.items():
                os.environ.setdefault(name, value)
            stack.enter_context(sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]))
        torch.use_deterministic_algorithms(True)
        fill.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise ModelError(
                f"resources.deterministic: true cannot be had on {device.type}: {str(error).split(',')[0]}."
                " Set it to false, or leave out what needs that operation."
            ) from error
        finally:
            torch.use_deterministic_algorithms(before[0])
            fill.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]
