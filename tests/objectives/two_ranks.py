"""One of two processes that train together on halves of the same pairs: `python two_ranks.py RANK FOLDER`.

Reads FOLDER/task.pt, writes FOLDER/answer-RANK.pt; test_gather.py compares the two with one process's answer.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from capfilt.objectives.gather import gather, rank, ranks
from capfilt.objectives.itc import itc
from capfilt.training import parallel


def half(x: torch.Tensor, of: int) -> torch.Tensor:
    rows = x.shape[0] // 2
    return x[of * rows : of * rows + rows].clone()


def loss_of_features(task: dict[str, Any], of: int) -> dict[str, Any]:
    """ITC of this rank's half, and its gradients as they are before ranks are averaged."""
    own = [half(x, of) for x in task["features"]]
    image, text = own[0].requires_grad_(), own[1].requires_grad_()
    temperature = task["temperature"].clone().requires_grad_()
    pairs = itc(image, text, *own[2:], *task["queues"], temperature, 0.4)
    pairs.loss.backward()
    return {
        "loss": pairs.loss.detach(),
        "gradients": (image.grad, text.grad, temperature.grad),
        "pairs": (pairs.image_to_text_BB, pairs.text_to_image_BB),
    }


def steps_of_learner(task: dict[str, Any], of: int) -> dict[str, Any]:
    """Two steps of the whole learner, its gradients averaged."""
    learner = task["learner"]
    wrapped = parallel.wrap(learner, torch.device("cpu")).train()
    for progress in (0.02, 0.05):
        learner.zero_grad()
        losses, _ = wrapped(*(half(x, of) for x in task["batch"]), progress=progress)
        learner.total(losses).backward()
    return {
        "loss": losses["itc"].detach(),
        "gradients": {name: p.grad for name, p in learner.named_parameters() if p.grad is not None},
        "queues": (learner.momentum.queue_image, learner.momentum.queue_text, learner.momentum.pointer),
    }


def main(of: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=of, world_size=2, timeout=timedelta(seconds=200)
    )
    task = torch.load(folder / "task.pt", weights_only=False)
    answer = {
        "who": (rank(), ranks()),
        "gathered": gather(torch.tensor([[of, of + 10]])),
        "features": loss_of_features(task, of),
        "learner": steps_of_learner(task, of),
    }
    torch.save(answer, folder / f"answer-{of}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
