"""What each of two ranks computes of halves of the same pairs with CLIP's loss: `main`, called by `rank_pair`.

Reads FOLDER/task.pt, writes FOLDER/answer-RANK.pt; tests/objectives/tasks/test_clip.py compares.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from capfilt.objectives.interface import PairBatch
from capfilt.objectives.kinds.clip import ClipObjectives
from capfilt.objectives.tasks.clip import ClipPretraining
from capfilt.training.config import ExecutionConfig
from capfilt.training.distributed.data_parallel import Gradients


def step(task: dict[str, Any], of: int, chunks: int = 1, parallel: str = "ddp", **options: Any) -> dict[str, Any]:
    """One step's loss and gradients, averaged over ranks as a training does."""
    learner = ClipPretraining(copy.deepcopy(task["model"]), ClipObjectives(**options))
    rows = len(task["batch"][0]) // 2
    mine = PairBatch(*(x[of * rows : of * rows + rows] for x in task["batch"]))
    execution = ExecutionConfig(micro_batches=chunks, parallel=parallel)
    gradients = Gradients(learner, execution, torch.device("cpu"), torch.float32)
    losses, metrics = gradients.of(mine, 0.0)
    taken = {name: p.grad for name, p in learner.model.named_parameters()}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in taken.items()}
    return {"loss": losses["itc"].detach(), "metrics": metrics, "gradients": whole}


def main(of: int, folder: Path) -> None:
    task = torch.load(folder / "task.pt", weights_only=False)
    answers = {name: step(task, of, **options) for name, options in task["cases"].items()}
    torch.save(answers, folder / f"answer-{of}.pt")
