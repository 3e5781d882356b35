"""What each of two ranks computes of halves of the same pairs with VLMo's losses: `main`, called by `rank_pair`.

Reads FOLDER/task.pt, writes FOLDER/answer-RANK.pt; tests/objectives/tasks/test_vlmo.py compares.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.kinds.vlmo import VlmoObjectives
from capfilt.objectives.masking import Masked
from capfilt.objectives.tasks.vlmo import VlmoPretraining
from capfilt.training.config import ExecutionConfig
from capfilt.training.distributed.data_parallel import Gradients


def step(task: dict[str, Any], rows: slice, **options: Any) -> dict[str, Any]:
    """One step's losses, and gradients averaged over ranks as a training does."""
    parallel = options.pop("parallel", "ddp")
    learner = VlmoPretraining(copy.deepcopy(task["model"]), VlmoObjectives(**options))
    learner.draws = GivenDraws(
        **{name: task[name][rows] for name in ("wrong_images", "wrong_texts")},
        masked=Masked(*(each[rows] for each in task["masked"])),
    )
    execution = ExecutionConfig(parallel=parallel)
    gradients = Gradients(learner, execution, torch.device("cpu"), torch.float32)
    losses, _ = gradients.of(PairBatch(*(each[rows] for each in task["batch"])), 0.0)
    taken = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in taken.items()},
        "weights": learner.draws.weights,
    }


def main(of: int, folder: Path) -> None:
    task = torch.load(folder / "task.pt", weights_only=False)
    half = len(task["batch"][0]) // 2
    rows = slice(of * half, of * half + half)
    answers = {name: step(task, rows, **options) for name, options in task["cases"].items()}
    torch.save(answers, folder / f"answer-{of}.pt")
