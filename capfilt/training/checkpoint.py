"""The state of a training run on disk, so that a killed run goes on where it was.

One file, replaced atomically, holds the learner (model, momentum copy, queues), the optimizer and the number of steps
done. Nothing else is needed: the order of the data and every random draw of a step are functions of the seed and the
step. A run that ended leaves the model alone (`models/weights.py`), and where it was asked to, what a fine-tuning may
go on with: the momentum copy and its queues.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from capfilt.errors import ModelError
from capfilt.models import weights
from capfilt.objectives.momentum import Momentum
from capfilt.reports.ledger import atomic

STATE = "state.pt"


def save(folder: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, step: int, identity: str) -> None:
    """Write the state after `step` steps; `identity` says which training it belongs to.

    Raises ModelError instead where a weight is no longer finite: from such a state nothing could go on.
    """
    spoilt = [name for name, p in learner.named_parameters() if not bool(torch.isfinite(p).all())]
    if spoilt:
        raise ModelError(
            f"{len(spoilt)} weights are not finite after step {step}, first {spoilt[0]}; "
            "lower optimizer.lr or set optimizer.clip"
        )
    state = {
        "identity": identity,
        "step": step,
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic(folder / STATE) as file:
        file.write(buffer.getbuffer())


def resume(folder: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, identity: str) -> int:
    """Load the newest state, if there is one, and return the number of steps done.

    Raises ModelError for the state of another training, and for one that cannot be read.
    """
    path = folder / STATE
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"{path} is damaged ({type(error).__name__}); delete it to begin again") from error
    if state["identity"] != identity:
        raise ModelError(f"{path} belongs to another training (model, data or settings differ); use another folder")
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def discard(folder: Path) -> None:
    """Remove the state of a training that ended."""
    (folder / STATE).unlink(missing_ok=True)


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
