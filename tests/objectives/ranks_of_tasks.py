"""What each of two ranks learns of halves of the same rows of downstream tasks: `main`, called by `rank_pair`.

Reads FOLDER/cases.pt: by name, a task and the batch of each rank; writes FOLDER/answer-RANK.pt: by name, the gradients
of data-parallel training, and of FSDP.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from capfilt.training.config import ExecutionConfig
from capfilt.training.distributed import data_parallel
from capfilt.training.distributed.data_parallel import Gradients

CPU = torch.device("cpu")
CUT = ("vqa of albef", "nlvr2 of blip", "nlvr2 of xvlm")
"""What FSDP trains too: parts of layers are called one by one, and layers are copies of others."""


def main(of: int, folder: Path) -> None:
    answers = {}
    for name, (task, batches) in torch.load(folder / "cases.pt", weights_only=False).items():
        if name in CUT:
            sharded = Gradients(copy.deepcopy(task), ExecutionConfig(parallel="fsdp"), CPU, torch.float32)
            sharded.of(batches[of], 0.5)
            cut = {name: p.grad for name, p in sharded.task.model.named_parameters() if p.grad is not None}
            answers[f"{name}, fsdp"] = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in cut.items()}
        wrapped = data_parallel.wrap(task.train(), CPU)
        losses, _ = wrapped(batches[of], 0.5)
        task.total(losses).backward()
        answers[name] = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    torch.save(answers, folder / f"answer-{of}.pt")
