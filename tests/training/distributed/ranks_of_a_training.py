"""What each of two ranks does that train one job together: `main`, called by the fixture `rank_pair`.

Trains FOLDER/job.json to its end; then takes the steps of FOLDER/all.json and leaves what each rank saw and has
learned in FOLDER/rank-RANK.pt; then logs in FOLDER/logged a step that was another on each rank, and some that are not
finite. test_data_parallel.py reads all three.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from capfilt.data.loading.loader import Batch, Loader
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ModelError
from capfilt.objectives.tasks.blip import BlipPretraining
from capfilt.training.checkpoints.states import States
from capfilt.training.distributed import data_parallel
from capfilt.training.distributed.data_parallel import Gradients
from capfilt.training.job import TrainJob
from capfilt.training.log import StepLog
from capfilt.training.loop import initial_model, run_steps, train
from capfilt.training.optimizer import make_optimizer


def take_steps(job: TrainJob, folder: Path) -> None:
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


def log_steps(job: TrainJob, folder: Path) -> None:
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
    train(TrainJob.model_validate_json((folder / "job.json").read_text()))
    take_steps(TrainJob.model_validate_json((folder / "all.json").read_text()), folder)
    log_steps(TrainJob.model_validate_json((folder / "all.json").read_text()), folder / "logged")
