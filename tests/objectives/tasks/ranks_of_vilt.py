"""What each of two ranks computes of halves of the same pairs: `main`, called by the fixture `rank_pair`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.masking import Masked
from capfilt.training.distributed import data_parallel


def half(x: Any, of: int) -> Any:
    if isinstance(x, Masked):
        return Masked(*(half(part, of) for part in x))
    rows = len(x) // 2
    return x[of * rows : of * rows + rows].clone()


def main(of: int, folder: Path) -> None:
    """One step of this rank's half by each task, its gradients averaged."""
    tasks = torch.load(folder / "tasks.pt", weights_only=False)
    answers = []
    for task in tasks:
        learner = task["learner"].train()
        wrapped = data_parallel.wrap(learner, torch.device("cpu"))
        learner.draws = GivenDraws(**{name: half(x, of) for name, x in task["drawn"].items()})
        losses, _ = wrapped(PairBatch(*(half(x, of) for x in task["batch"])), 0.0)
        learner.total(losses).backward()
        losses = {name: loss.detach() for name, loss in losses.items()}
        answers.append({"losses": losses, "gradients": {name: p.grad for name, p in learner.named_parameters()}})
    torch.save(answers, folder / f"answer-{of}.pt")
