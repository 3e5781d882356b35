"""What each of two ranks computes of halves of the same pairs: `main`, called by the fixture `rank_pair`.

Reads FOLDER/task.pt, writes FOLDER/answer-RANK.pt; test_collectives.py compares the two with one process's answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from capfilt.objectives.collectives import gather, rank, world_size
from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.losses.itc import itc
from capfilt.objectives.losses.itc_queries import itc_queries
from capfilt.objectives.losses.itm import global_negatives, itm
from capfilt.training.distributed import data_parallel


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
        "pairs": (pairs.image_to_text_BN, pairs.text_to_image_BN),
        "targets": pairs[3:],
    }


def steps_with_own_keys(task: dict[str, Any], of: int) -> dict[str, Any]:
    """Two steps whose keys are this rank's own and the queue, negatives drawn from all ranks."""
    learner = task["learner with own keys"].train()
    draws = learner.draws = GivenDraws(**{name: half(x, of) for name, x in task["drawn"].items()})
    for _ in range(2):
        images, *texts = (half(x, of) for x in task["batch"])
        losses, _ = learner(PairBatch(images.double(), *texts), progress=0.5)
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "weights": draws.weights,
        "queue": learner.momentum.queue_text,
    }


def steps_of_learner(task: dict[str, Any], of: int) -> dict[str, Any]:
    """Two steps of the whole learner, its gradients averaged."""
    learner = task["learner"]
    wrapped = data_parallel.wrap(learner, torch.device("cpu")).train()
    for progress in (0.02, 0.05):
        learner.zero_grad()
        losses, _ = wrapped(PairBatch(*(half(x, of) for x in task["batch"])), progress=progress)
        learner.total(losses).backward()
    return {
        "loss": losses["itc"].detach(),
        "gradients": {name: p.grad for name, p in learner.named_parameters() if p.grad is not None},
        "queues": (learner.momentum.queue_image, learner.momentum.queue_text, learner.momentum.pointer),
    }


def loss_of_queries(task: dict[str, Any], of: int, detached: bool = False) -> dict[str, Any]:
    """BLIP-2's ITC of this rank's half, and its gradients as they are before ranks are averaged."""
    every = [*(half(x, of) for x in task["queries"]), task["temperature"].clone()]
    image, text, heat = (x.requires_grad_() for x in every)
    pairs = itc_queries(image, text, heat, image_ids_B=half(task["pairs"]["groups"], of), detached=detached)
    pairs.loss.backward()
    return {"loss": pairs.loss.detach(), "gradients": (image.grad, text.grad, heat.grad), "pairs": pairs[1:]}


def step_of_first_stage(task: dict[str, Any], of: int) -> dict[str, Any]:
    """One step of BLIP-2's first stage without ITM, whose draws are each process's own; its gradients averaged."""
    learner = task["first_stage"]
    wrapped = data_parallel.wrap(learner, torch.device("cpu")).train()
    images, *texts = (half(x, of) for x in task["batch"])
    losses, _ = wrapped(PairBatch(images.double(), *texts), progress=0.0)
    learner.total(losses).backward()
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": {name: p.grad for name, p in learner.named_parameters() if p.grad is not None},
    }


def itm_of_all(task: dict[str, Any], of: int) -> dict[str, Any]:
    """ITM of this rank's half with partners from both, and its gradients averaged."""
    model, case = task["matcher"], task["pairs"]
    ids, mask = half(case["ids"], of), half(case["mask"], of)
    # A rank's texts are as wide as its own longest.
    width = int(mask.sum(dim=1).max())
    ids, mask = ids[:, :width], mask[:, :width]
    tokens = half(case["tokens"], of).requires_grad_()
    wrong = global_negatives(
        model, tokens, ids, mask, half(case["groups"], of), half(case["images"], of), half(case["texts"], of)
    )
    loss, _ = itm(model, ids, mask, model.image_context(tokens, "encoder"), wrong)
    loss.backward()
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad /= world_size()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"width": width, "loss": loss.detach(), "tokens": tokens.grad, "gradients": gradients}


def main(of: int, folder: Path) -> None:
    task = torch.load(folder / "task.pt", weights_only=False)
    answer = {
        "who": (rank(), world_size()),
        "gathered": gather(torch.tensor([[of, of + 10]])),
        "features": loss_of_features(task, of),
        "learner": steps_of_learner(task, of),
        "itm": itm_of_all(task, of),
        "own keys": steps_with_own_keys(task, of),
        "queries": loss_of_queries(task, of),
        "detached queries": loss_of_queries(task, of, detached=True),
        "first_stage": step_of_first_stage(task, of),
        "itm of BLIP-2": itm_of_all({**task, "matcher": task["matcher of BLIP-2"]}, of),
    }
    torch.save(answer, folder / f"answer-{of}.pt")
