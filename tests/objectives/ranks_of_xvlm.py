"""What each of two ranks computes of halves of the same pairs and regions with X-VLM's losses: `main`, called by
`rank_pair`.

Reads FOLDER/task.pt, writes FOLDER/answer-RANK.pt; tests/objectives/tasks/test_xvlm.py compares.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.kinds.xvlm import XvlmObjectives
from capfilt.objectives.tasks.xvlm import XvlmPretraining
from capfilt.training.config import ExecutionConfig
from capfilt.training.distributed.data_parallel import Gradients


def main(of: int, folder: Path) -> None:
    task = torch.load(folder / "task.pt", weights_only=False)
    answers: dict[str, Any] = {}
    for name, options in task["cases"].items():
        learner = XvlmPretraining(copy.deepcopy(task["model"]), XvlmObjectives(**options))
        gradients = Gradients(learner, ExecutionConfig(), torch.device("cpu"), torch.float32)
        for kind, (batch, draws) in task["batches"][of].items():  # pairs, then regions: each reaches other weights
            learner.draws = GivenDraws(**draws)
            losses, _ = gradients.of(batch, 0.0)
            taken = {n: p.grad.clone() for n, p in learner.model.named_parameters() if p.grad is not None}
            answers[f"{name}, {kind}"] = {n: loss.detach() for n, loss in losses.items()}, taken
    torch.save(answers, folder / f"answer-{of}.pt")
