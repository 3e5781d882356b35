"""The benchmark of a training: steps of `pretrain` in one process, from tars to updated weights.

The training itself is run and ended from the callback that gets its log. Where a step's time goes is seen from outside:
`data` is what the log says of waiting, `update` lies between the optimizer's hooks, `compute` is the rest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.errors import RecipeError
from capfilt.evaluation import speed
from capfilt.inference.device import Compute, ability, choose, local_device
from capfilt.models import ArchitectureConfig
from capfilt.objectives.kinds import TaskConfig
from capfilt.objectives.tasks import PRETRAINING, unsupported
from capfilt.pipelines.bench.bench import BenchTrainConfig
from capfilt.pipelines.bench.floor import MachineRate, floor_figures
from capfilt.pipelines.bench.made_up import PICTURES, make_shard, tokenizer_for
from capfilt.pipelines.bench.time_box import spread
from capfilt.runs import cost
from capfilt.runs.cost import Price
from capfilt.runs.progress import Progress, StageLine
from capfilt.training.config import ExecutionConfig, TrainConfig
from capfilt.training.flops import step_flops
from capfilt.training.job import TrainJob
from capfilt.training.loop import train

WARM = 1
"""Lines of the log that are left out: kernels are chosen, memory is taken, blocks are compiled."""
MOST = 1_000_000
"""Steps after which a training would end by itself."""


class _TimeIsUp(Exception):
    """Ends the training."""


def bench_train(
    config: BenchTrainConfig,
    architecture: ArchitectureConfig,
    folder: Path,
    show: Progress,
    seconds: float,
    price: Price | None = None,
) -> dict[str, Any]:
    """Measure steps of pretraining a model of this architecture."""
    compute, _ = choose(config.precision, local_device(), [ability()])
    device = compute.open()
    pairs = config.batch_size or (8 if device.type == "cpu" else 64)
    objectives = _objectives(config, architecture, pairs)
    with show.wait("making up pairs"):
        job = _job(config, architecture, objectives, pairs, compute, folder)
        rate = MachineRate(device, compute.dtype)
        rate.measure()
    with show.stage("bench train", round(seconds), "seconds") as line, _update_seconds(device) as updates:
        steps = _Steps(job, seconds, line)
        with suppress(_TimeIsUp):
            train(job, steps.on_line)
    with show.wait("counting the floor"):
        rate.measure()
        flops = step_flops(architecture, objectives, pairs, config.tokens) / pairs
    figures = steps.figures(updates)
    share, per_second = figures["share"], figures["images_per_second"]
    spent = {"compute": share["compute"] / per_second, "all": 1 / per_second}
    figures["floor"] = floor_figures(rate, {"compute": flops}, spent)
    figures |= cost.rate_figures(per_second, torch.get_num_threads(), float(device.type == "cuda"), price)
    setup = {**config.model_dump(mode="json"), "batch_size": pairs, "dtype": str(compute.dtype)}
    setup |= {"architecture": architecture.model_dump(mode="json"), "objectives": objectives.model_dump(mode="json")}
    about = {"machine": speed.machine(device), "versions": speed.versions()}
    return {"stage": "train", **figures, "setup": setup, "runs": {"seconds": steps.seconds}, **about}


def _objectives(config: BenchTrainConfig, architecture: ArchitectureConfig, pairs: int) -> TaskConfig:
    """The family's pretraining with its defaults, but for a queue that batches fill evenly."""
    objectives = PRETRAINING[architecture.family].config.model_validate({})
    if queue := getattr(objectives, "queue", 0):
        objectives = objectives.model_copy(update={"queue": max(queue - queue % pairs, pairs)})
    if said := unsupported(architecture, objectives, config.micro_batches):
        raise RecipeError(f"{config.model}: {said}")
    return objectives


def _job(
    config: BenchTrainConfig,
    architecture: ArchitectureConfig,
    objectives: TaskConfig,
    pairs: int,
    compute: Compute,
    folder: Path,
) -> TrainJob:
    tokenizer, num_words = tokenizer_for(architecture)
    tokenizer.save(folder / "vocabulary")
    words = config.tokens - 2  # with a beginning and an end
    images = max(PICTURES, pairs)
    make_shard(folder / "data" / "00000.tar", images, config.width, num_words, (words, words))
    settings = TrainConfig(
        steps=MOST,
        loader=LoaderConfig(batch_size=pairs, shuffle=images, max_length=config.tokens),
        objectives=objectives,
        precision=config.precision,
        log_every=1 if compute.device == "cpu" else 10,  # a line waits for the GPU
        checkpoint_every=MOST,
    )
    return TrainJob(
        out=folder / "train",
        architecture=architecture,
        tokenizer=str(folder / "vocabulary"),
        sources=(Source(shards=str(folder / "data")),),
        train=settings,
        compute=compute,
        execution=ExecutionConfig(micro_batches=config.micro_batches, compile=config.compile),
    )


class _Steps:
    """What the log of a training says, until the time is over."""

    def __init__(self, job: TrainJob, seconds: float, line: StageLine):
        self.pairs, self.line = job.train.loader.batch_size, line
        self.begun = time.monotonic()
        self.limit = seconds
        self.lines: list[dict[str, Any]] = []
        line.wait("the first steps")

    def on_line(self, entry: dict[str, Any]) -> None:
        """Take a line of the log; raises _TimeIsUp behind the last."""
        self.lines.append(entry)
        spent = time.monotonic() - self.begun
        self.line.update(
            min(int(spent), self.line.total), f"step {entry['step']}, {entry['samples_per_second']} pairs/s"
        )
        if spent > self.limit and len(self.lines) > WARM:
            raise _TimeIsUp

    @property
    def seconds(self) -> list[float]:
        """Of a step, by the lines of the log behind the warm-up."""
        return [entry["step_seconds"] for entry in self.lines[WARM:]]

    def figures(self, updates: list[float]) -> dict[str, Any]:
        """Medians, and the shares of a step."""
        rates = spread("images_per_second", [self.pairs / took for took in self.seconds])
        step, waited = self.pairs / rates["images_per_second"], [entry["data_wait"] for entry in self.lines[WARM:]]
        data, update = statistics.median(waited), statistics.median(updates) / step
        return {
            **rates,
            "step_seconds": step,
            "share": {"data": data, "compute": 1 - data - update, "update": update},
        }


@contextmanager
def _update_seconds(device: torch.device) -> Iterator[list[float]]:
    """The seconds of each call of an optimizer in the block."""
    begun, taken = [0.0], list[float]()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(*_: Any) -> None:
        begun[0] = now()

    def after(*_: Any) -> None:
        taken.append(now() - begun[0])

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()
