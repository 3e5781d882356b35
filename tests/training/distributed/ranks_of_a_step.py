"""What each of two ranks does that take the same steps together as one process takes alone: `main`, called by the
fixture `rank_pair`.

Reads FOLDER/task.pt, {case: Case}, and writes FOLDER/steps-RANK.pt; test_step_of_ranks.py takes the steps alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.objectives.draws import Draws
from capfilt.objectives.interface import PairBatch, Task
from capfilt.training.checkpoints.states import States
from capfilt.training.config import ExecutionConfig, OptimizerConfig
from capfilt.training.distributed import fsdp
from capfilt.training.distributed.data_parallel import Gradients
from capfilt.training.optimizer import make_optimizer

CPU = torch.device("cpu")
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.01, decay_vectors=False)
WHO = {"settings": "of this test"}


@dataclass
class Case:
    learner: Task
    batch: list[Tensor]
    execution: ExecutionConfig
    dtype: torch.dtype = torch.float32


class Hardest(Draws):
    """Takes the hardest negative and draws none: a draw of two processes is not one of one."""

    def columns(self, name: str, weights_BN: Tensor) -> Tensor:
        return weights_BN.argmax(dim=1)


def take(case: Case, rank: int, world_size: int, out: Path) -> dict[str, Any]:
    """Two steps of this rank's rows, AdamW between them, and a state after the second."""
    case.learner.draws = Hardest()
    gradients = Gradients(case.learner, case.execution, CPU, case.dtype)
    optimizer = make_optimizer(case.learner, OPTIMIZER)
    rows = case.batch[0].shape[0] // world_size
    images, ids, mask, image_ids = (x[rank * rows : (rank + 1) * rows].clone() for x in case.batch)
    for number in range(2):
        losses, figures = gradients.of(PairBatch(images, ids, mask, image_ids), 0.02)
        found = {name: whole(p.grad) for name, p in case.learner.named_parameters() if p.grad is not None}
        norm = gradients.clip(0.0)
        if number == 0:
            clipped = float(gradients.clip(0.5)), float(gradients.clip(0.0))
        optimizer.step()
    states = States(out, WHO, 1, shared=gradients.sharded)
    states.save(case.learner, optimizer, 2)
    states.close()
    return {
        "losses": {name: loss.detach() for name, loss in (losses | figures).items()},
        "gradients": {name: g for name, g in found.items() if g.any()},
        "norm": norm,
        "clipped": clipped,
        "after": fsdp.whole(case.learner),
    }


def resumed(case: Case, out: Path) -> dict[str, Any]:
    """What the state of `out` makes of an untrained case."""
    gradients = Gradients(case.learner, case.execution, CPU, case.dtype)
    optimizer = make_optimizer(case.learner, OPTIMIZER)
    states = States(out, WHO, 1, shared=gradients.sharded)
    done = states.resume(case.learner, optimizer)
    states.close()
    names = {p: name for name, p in case.learner.named_parameters()}
    moments = {names[p]: {k: whole(v) for k, v in own.items()} for p, own in optimizer.state.items()}
    return {"done": done, "learner": fsdp.whole(case.learner), "moments": moments}


def whole(tensor: Tensor) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.clone()


def main(rank: int, folder: Path) -> None:
    task = torch.load(folder / "task.pt", weights_only=False)
    taken = {name: take(case, rank, 2, folder / name) for name, case in task["cases"].items()}
    back = {name: resumed(case, folder / source) for name, (case, source) in task["resumed"].items()}
    torch.save({"taken": taken, "resumed": back}, folder / f"steps-{rank}.pt")
