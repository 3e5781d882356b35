"""The states of a training on disk, so that a killed one goes on where it was.

A state is one file that appears whole or not at all: the learner (model, momentum copy, queues), the optimizer and the
number of steps done. Nothing else is needed: the order of the data and every random draw of a step are functions of the
seed and the step. The newest few are kept, and written while training goes on. A training that ended leaves the model
alone (`models/weights.py`), and where it was asked to, what a fine-tuning may go on with: the momentum copy and its
queues.
"""

from __future__ import annotations

import io
import logging
import pickle
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from capfilt.errors import ModelError
from capfilt.models import weights
from capfilt.objectives.momentum import Momentum
from capfilt.reports.ledger import atomic

STATES = "states"
"""The folder of the states, each named by its step."""


class States:
    """The states of one training; `identity` says which training they belong to, `keep` how many stay."""

    def __init__(self, out: Path, identity: str, keep: int):
        self.folder, self.identity, self.keep = out / STATES, identity, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, learner: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Take a copy of the state after `step` steps; it is written while the next steps are taken.

        Raises ModelError instead where a weight is no longer finite: from such a state nothing could go on. What went
        wrong with the state before is raised here, too.
        """
        spoilt = [name for name, p in learner.named_parameters() if not bool(torch.isfinite(p).all())]
        if spoilt:
            raise ModelError(
                f"{len(spoilt)} weights are not finite after step {step}, first {spoilt[0]}; "
                "lower optimizer.lr or set optimizer.clip"
            )
        self.settle()
        state = {
            "identity": self.identity,
            "step": step,
            "learner": copied(learner.state_dict()),
            "optimizer": copied(optimizer.state_dict()),
        }
        self._writing = self._pool.submit(self._write, state, step)

    def settle(self) -> None:
        """Wait until the last state is on disk, and raise what kept it from getting there."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def resume(self, learner: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Load the newest state that can be read, if there is any, and return the number of steps done.

        One that is damaged is told in a warning, and the one before it is taken. Raises ModelError for the states of
        another training, and where none of them can be read.
        """
        found = sorted(self.folder.glob("*.pt"), reverse=True)
        for path in found:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                logging.getLogger(__name__).warning(
                    "%s is damaged (%s): training goes on from the state before it", path, type(error).__name__
                )
                continue
            if state["identity"] != self.identity:
                raise ModelError(
                    f"{path} belongs to another training (model, data or settings differ); use another folder"
                )
            learner.load_state_dict(state["learner"])
            optimizer.load_state_dict(state["optimizer"])
            return int(state["step"])
        if found:
            raise ModelError(f"all {len(found)} states in {self.folder} are damaged; delete them to begin again")
        return 0

    def discard(self) -> None:
        """Remove the states of a training that ended."""
        self.settle()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let the state that is being written get to the disk, however the training ended."""
        try:
            self.settle()
        finally:
            self._pool.shutdown()

    def _write(self, state: dict[str, Any], step: int) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with atomic(self.folder / f"{step:09d}.pt") as file:
            file.write(buffer.getbuffer())
        for old in sorted(self.folder.glob("*.pt"))[: -self.keep]:
            old.unlink()


def copied(state: Any) -> Any:
    """A state that later steps do not change, on the CPU."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list) else state


def save_momentum(momentum: Momentum, folder: Path) -> None:
    """Write the momentum copy and its queues beside a model, for `take_up_momentum`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in momentum.state_dict().items()}
    tensors.pop("queue_groups", None)
    with atomic(folder / weights.MOMENTUM) as file:
        file.write(safetensors.torch.save(tensors))


def take_up_momentum(momentum: Momentum, start: Path) -> None:
    """Begin with the momentum copy and the queues of the training that ended with the model `start`.

    As in BLIP's retrieval fine-tuning: the queues are those of another training, so their rows are of no image that
    is known here (their groups stay `NO_IMAGE`), and they are filled from their first row on.

    Raises:
        ModelError: nothing was kept beside that model, or queues of another size.
    """
    found = weights.read_momentum(start, momentum.model.config)
    size = momentum.queue_image.shape[0]
    for name in ("queue_image", "queue_text"):
        rows = found[name].shape[0]
        if rows != size:
            raise ModelError(f"{start} was trained with a queue of {rows}; set objectives.queue to it, not to {size}")
        getattr(momentum, name).copy_(found.pop(name))
    heads = {n: t for n, t in momentum.model.state_dict().items() if n.startswith(("match_head.", "temperature"))}
    weights.fill(momentum.model, {**heads, **found}, start)
    momentum.pointer.zero_()
