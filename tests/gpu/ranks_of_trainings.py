"""What each of two ranks does under torchrun: two steps with DDP and with FSDP, as one process with the whole batch.

torchrun --nproc-per-node=2 ranks_of_trainings.py cuda|cpu FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from capfilt.models import architecture_of, build
from capfilt.objectives.collectives import alone
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.draws import Draws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.tasks import build_task
from capfilt.training.checkpoints.states import States
from capfilt.training.config import ExecutionConfig, OptimizerConfig
from capfilt.training.distributed import fsdp
from capfilt.training.distributed.data_parallel import Gradients
from capfilt.training.optimizer import make_optimizer

ROWS = 8


class Hardest(Draws):
    """Takes the hardest negative and draws none: a draw of two processes is not one of one."""

    def columns(self, name: str, weights_BN: Tensor) -> Tensor:
        return weights_BN.argmax(dim=1)


def train(parallel: Literal["ddp", "fsdp"], device: torch.device, rank: int, size: int, out: Path) -> dict[str, Tensor]:
    """The weights after two steps of this rank's rows, and a state that all ranks write."""
    torch.manual_seed(0)
    config = ObjectivesConfig(queue=2 * ROWS, mean_over="all", negatives="all")
    task = build_task(build(architecture_of("blip/tiny")), config).to(device)
    task.draws = Hardest()
    gradients = Gradients(task, ExecutionConfig(parallel=parallel), device, torch.float32)
    optimizer = make_optimizer(task, OptimizerConfig(lr=1e-4))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 190, (ROWS, 9), generator=generator)
    batch = PairBatch(torch.randn(ROWS, 3, 32, 32, generator=generator), ids, torch.ones_like(ids), torch.arange(ROWS))
    own = batch.select(slice(rank * ROWS // size, (rank + 1) * ROWS // size)).to(device)
    for _ in range(2):
        gradients.of(own, 0.5)
        assert bool(gradients.clip(1.0).isfinite())
        optimizer.step()
    if size > 1:
        states = States(out, {"settings": "of this test"}, 1, shared=gradients.sharded)
        states.save(task, optimizer, 2)
        states.close()
    return {name: value.cpu() for name, value in fsdp.whole(task.model).items()}


def main() -> None:
    device, folder, rank = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
    here = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    with alone():
        wanted = train("ddp", here, 0, 1, folder)
    for parallel in ("ddp", "fsdp"):
        found = train(parallel, here, rank, 2, folder / parallel)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=f"{parallel}: {name}")
        assert any((folder / parallel).iterdir()), "a state was written"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
