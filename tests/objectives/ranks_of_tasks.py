"""What each of two ranks learns of halves of the same rows of downstream tasks: `main`, called by `rank_pair`.

Reads FOLDER/cases.pt: by name, a task and the batch of each rank; writes FOLDER/answer-RANK.pt.
"""

from __future__ import annotations

from pathlib import Path

import torch

from capfilt.training.distributed import data_parallel


def main(of: int, folder: Path) -> None:
    answers = {}
    for name, (task, batches) in torch.load(folder / "cases.pt", weights_only=False).items():
        wrapped = data_parallel.wrap(task.train(), torch.device("cpu"))
        losses, _ = wrapped(batches[of], 0.5)
        task.total(losses).backward()
        answers[name] = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    torch.save(answers, folder / f"answer-{of}.pt")
