from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from capfilt.data.loading.loader import Loader
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.models.checkpoints import store
from capfilt.objectives.config import ObjectivesConfig
from capfilt.training.config import ExecutionConfig
from capfilt.training.distributed import data_parallel
from capfilt.training.job import TrainJob
from capfilt.training.loop import initial_model, train

pytestmark = pytest.mark.timeout(300)  # two processes start, perhaps on a busy machine

MakeJob = Callable[..., TrainJob]


@pytest.fixture(scope="module")
def jobs(make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainJob, TrainJob]:
    """A training that has one right answer (ITC: its negatives are all ranks'), and one with everything."""
    folder = tmp_path_factory.mktemp("ranks")
    itc = ObjectivesConfig(losses={"itc": 1.0}, queue=16, momentum=0.9)
    exact = make_job(folder / "job", text={"roles": ("encoder",), "dropout": 0.0}, objectives=itc, checkpoint_every=2)
    return exact, make_job(folder / "all")


@pytest.fixture(scope="module")
def ranks(jobs: tuple[TrainJob, TrainJob], rank_pair: Any) -> list[dict[str, Any]]:
    """What each of two gloo ranks saw and learned."""
    folder = jobs[0].out.parent
    for job in jobs:
        (folder / f"{job.out.name}.json").write_text(job.model_dump_json())
    rank_pair.run(Path(__file__).with_name("ranks_of_a_training.py"), folder)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


def lines_of(job: TrainJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]


def test_one_process_is_rank_0_of_1_and_wraps_nothing() -> None:
    module = nn.Linear(2, 2)
    assert (data_parallel.rank(), data_parallel.world_size()) == (0, 1)
    assert data_parallel.wrap(module, torch.device("cpu")) is module
    data_parallel.barrier()


def test_ranks_see_disjoint_rows_that_make_up_the_batches(
    jobs: tuple[TrainJob, TrainJob], ranks: list[dict[str, Any]]
) -> None:
    _, job = jobs
    alone = Loader(job.sources, job.train.loader, Tokenizer.load("world"), 16, job.seed)
    for step, batch in enumerate(islice(alone.batches(), 4)):
        one, other = ranks[0]["seen"][step], ranks[1]["seen"][step]
        assert len(one) == len(other) == 4
        assert [uid for uid, _ in (*one, *other)] == list(batch.uids)
        assert not set(one) & set(other)


def test_ranks_end_with_the_same_weights(ranks: list[dict[str, Any]]) -> None:
    one, other = (rank["learned"] for rank in ranks)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_ranks_learn_what_one_process_learns(
    jobs: tuple[TrainJob, TrainJob], ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    job, _ = jobs
    alone = job.model_copy(update={"out": tmp_path})
    train(alone)
    found = store.load(job.model_folder).state_dict()
    wanted = store.load(alone.model_folder).state_dict()
    # AdamW makes steps of the learning rate out of a gradient's last bit where the gradient is nothing else, as a
    # key's bias always is. So: nearly all weights, nearly equal.
    gaps = torch.cat([(found[name] - wanted[name]).abs().flatten() for name in wanted if ".key." not in name])
    assert float((gaps < 1e-6).float().mean()) > 0.98
    before = initial_model(alone, len(Tokenizer.load("world"))).state_dict()
    moved = torch.cat([(wanted[n] - before[n]).abs().flatten() for n in wanted if ".key." not in n])
    assert float((moved > 1e-4).float().mean()) > 0.5


def test_what_is_logged_is_of_all_ranks(jobs: tuple[TrainJob, TrainJob], ranks: list[dict[str, Any]]) -> None:
    folder = jobs[0].out.parent / "logged"
    first = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    assert (first["lm"], first["unreadable"]) == (2.0, 3)
    assert first["data_wait"] > 0, "rank 0 itself did not wait"
    batches = json.loads((folder / "not_finite.json").read_text())["batches"]
    assert batches == [{"step": step, "uids": ["of rank 0", "of rank 1"]} for step in (2, 3)]


def test_one_rank_writes(jobs: tuple[TrainJob, TrainJob], ranks: list[dict[str, Any]]) -> None:
    job, _ = jobs
    assert {path.name for path in job.out.iterdir()} == {"log.jsonl", "checkpoint", "states"}
    assert [json.loads(line)["step"] for line in (job.out / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.timeout(500)  # the compiler is a C++ one
@pytest.mark.filterwarnings("ignore")  # what the compiler says to itself
def test_compiled_blocks_learn_the_same(make_job: MakeJob, tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile has no C++ compiler here")
    curves = []
    for compiled in (False, True):
        job = make_job(tmp_path / str(compiled), steps=4, text={"dropout": 0.0})
        train(job.model_copy(update={"execution": ExecutionConfig(compile=compiled)}))
        curves.append([[line[name] for name in ("itc", "itm", "lm", "grad_norm")] for line in lines_of(job)])
    for plain, quick in zip(*curves, strict=True):
        assert quick == pytest.approx(plain, rel=1e-4, abs=1e-4)
