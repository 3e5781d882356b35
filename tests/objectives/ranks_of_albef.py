"""What each of two ranks learns of halves of the same pairs with ALBEF's losses: `main`, called by `rank_pair`.

Reads FOLDER/task.pt, writes FOLDER/answer-RANK.pt; tests/objectives/tasks/test_albef.py compares.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.masking import Masked
from capfilt.objectives.tasks.albef import AlbefPretraining
from capfilt.training.distributed import data_parallel


def main(of: int, folder: Path) -> None:
    task = torch.load(folder / "task.pt", weights_only=False)
    rows = len(task["swapped"]) // 2
    mine = slice(of * rows, (of + 1) * rows)
    # Negatives are drawn within a rank, and counted there.
    swapped = task["swapped"][mine] - of * rows
    draws = GivenDraws(wrong_images=swapped, wrong_texts=swapped, masked=Masked(*(x[mine] for x in task["masked"])))
    batch = PairBatch(*(x[mine].clone() for x in task["batch"]))
    answers = {case: steps(copy.deepcopy(learner), batch, draws) for case, learner in task["learners"].items()}
    torch.save(answers, folder / f"answer-{of}.pt")


def steps(learner: AlbefPretraining, batch: PairBatch, draws: GivenDraws) -> dict[str, Any]:
    """Two steps of plain descent, and what the second was of."""
    learner.train()
    learner.draws = draws
    wrapped = data_parallel.wrap(learner, torch.device("cpu"))
    for progress in (0.1, 0.5):
        wrapped.zero_grad()
        losses, _ = wrapped(batch, progress)
        learner.total(losses).backward()
        taken = {name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for name, gradient in taken.items():
                learner.model.get_parameter(name).sub_(0.02 * gradient)
    state = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    return {"losses": {name: loss.detach() for name, loss in losses.items()}, "gradients": taken, "state": state}
