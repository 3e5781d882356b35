"""One of two processes that train one job together: `python two_ranks.py RANK FOLDER`.

Trains FOLDER/job.json to its end; then takes the steps of FOLDER/all.json and leaves what each rank saw and has
learned in FOLDER/rank-RANK.pt; then tells a log in FOLDER/told of a step that was another on each rank, and of
some that are not finite. test_parallel.py looks at all three.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from capfilt.data.loading.loader import Batch, Loader
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ModelError
from capfilt.objectives.tasks.blip import BlipPretraining
from capfilt.training.checkpoints.states import States
from capfilt.training.distributed import data_parallel
from capfilt.training.distributed.data_parallel import Gradients
from capfilt.training.log import StepLog
from capfilt.training.loop import TrainJob, initial_model, run_steps, train
from capfilt.training.optimizer import make_optimizer


def steps(job: TrainJob, folder: Path) -> None:
    tokenizer = Tokenizer.load(job.tokenizer)
    learner = BlipPretraining(initial_model(job, len(tokenizer)), job.train.objectives)
    rank, world_size = data_parallel.rank(), data_parallel.world_size()
    loader = Loader(
        job.sources, job.train.loader, tokenizer, job.architecture.vision.image_size, job.seed, rank, world_size
    )
    seen = []

    def noted() -> Iterator[Batch]:
        for batch in loader.batches():
            seen.append([(uid, tuple(ids.tolist())) for uid, ids in zip(batch.uids, batch.ids, strict=True)])
            yield batch

    job.out.mkdir(exist_ok=True)
    gradients = Gradients(learner, job.execution, torch.device("cpu"), torch.float32)
    optimizer = make_optimizer(learner, job.train.optimizer)
    log = StepLog(job.out / "log.jsonl", job.train)
    run_steps(job, gradients, optimizer, noted(), 0, States(job.out, {}, 1), log)
    torch.save({"seen": seen, "learned": learner.state_dict()}, folder / f"rank-{rank}.pt")


def tell(job: TrainJob, folder: Path) -> None:
    rank = data_parallel.rank()
    folder.mkdir(exist_ok=True)
    log = StepLog(folder / "log.jsonl", job.train.model_copy(update={"log_every": 1, "skips": 1}))
    log.waited = float(rank)
    log.add(0, {"lm": torch.tensor(1.0 + 2 * rank)}, rank + 1, 0.1)
    batch = Batch(*[torch.zeros(1)] * 4, uids=(f"of rank {rank}",), unreadable=0)
    log.skip_step(1, batch, 0.1)
    with pytest.raises(ModelError, match="2 steps in a row, up to step 3"):
        log.skip_step(2, batch, 0.1)


def main(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=200)
    )
    train(TrainJob.model_validate_json((folder / "job.json").read_text()))
    steps(TrainJob.model_validate_json((folder / "all.json").read_text()), folder)
    tell(TrainJob.model_validate_json((folder / "all.json").read_text()), folder / "told")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
