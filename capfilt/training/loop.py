"""The training loop: the same for pretraining and for fine-tuning captioner and filter; only the job differs.

A job is a frozen config that any process can be handed. Draws inside a step come from (seed, step, rank), so a
resumed run ends with the same weights as an undisturbed one, and its log has no line twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor

from capfilt.config import Config, digest
from capfilt.data.augment import AugmentConfig
from capfilt.data.language_tokens import tokenizer_of
from capfilt.data.loader import Batch, Loader, LoaderConfig, Source
from capfilt.data.tokens import Tokenizer
from capfilt.engine.device import Precision, autocast, pick_device, pick_dtype
from capfilt.errors import ModelError
from capfilt.models import Architecture, Blip2Config, Model, build, weights
from capfilt.models.initial import InitialConfig
from capfilt.objectives.itm import TRIVIAL_LOSS, Alarm
from capfilt.objectives.stages import AnyLearner, learner_of
from capfilt.objectives.step import ObjectivesConfig
from capfilt.reports.ledger import atomic, write_json
from capfilt.training import checkpoint, features, parallel
from capfilt.training.checkpoint import States
from capfilt.training.optimizer import OptimizerConfig, learning_rate, make_optimizer

LOG, NOT_FINITE = "log.jsonl", "not_finite.json"


class TrainConfig(Config):
    """How long and how a model is trained."""

    steps: int = Field(ge=1)
    image_size: int | None = Field(default=None, ge=1)
    """Picture size other than the architecture's: BLIP pretrains at 224 and fine-tunes at 384."""
    loader: LoaderConfig = LoaderConfig()
    objectives: ObjectivesConfig = ObjectivesConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = "auto"
    recompute: int = Field(default=0, ge=0)
    """The last vision blocks that compute their activations again instead of keeping them: memory for time."""
    keep_momentum: bool = False
    """Leave the momentum copy and the queues beside the model, for a fine-tuning that goes on with them."""
    features: bool | Path = False
    """BLIP-2: keep what the frozen tower sees of each image on disk, and look once only: true (in `features/` of the
    run folder, or of the round) or a folder that several trainings share. An image takes N x D numbers in the format
    `frozen` of the architecture: 724 kB of ViT-g at 224 px. Not with pictures that are changed at random."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between two states on disk: what a kill costs at most."""
    checkpoints: int = Field(default=2, ge=1)
    """How many states are kept: should the newest be damaged, training goes on from the one before."""
    skips: int = Field(default=10, ge=0)
    """Steps in a row whose gradients are not finite that are left out before training stops; 0: the first stops it."""
    log_every: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _queue(self) -> TrainConfig:
        queue, rows = self.objectives.queue, self.loader.batch_size
        itc = "itc" in self.objectives.losses
        if itc and queue % rows:
            near = queue - queue % rows
            raise ValueError(f"objectives.queue {queue} is not a multiple of loader.batch_size {rows}; {near} is")
        if not itc and (self.keep_momentum or self.objectives.momentum_from == "start"):
            raise ValueError("without the objective itc there is no momentum copy to keep or to begin with")
        if self.features and self.loader.augment != AugmentConfig():
            raise ValueError("features are kept of pictures as they are; set loader.augment={} or features=false")
        return self


class TrainJob(Config):
    """Everything that a training process needs to know."""

    out: Path
    """Its folder: `log.jsonl`, `states/` while it runs, and in the end the model in `checkpoint/`."""
    architecture: Architecture
    start: Path | None = None
    """A model folder to start from; parts that the architecture lacks are left behind. None: from scratch."""
    initial: InitialConfig = InitialConfig()
    """What the towers of a model from scratch begin with."""
    tokenizer: str
    sources: tuple[Source, ...] = Field(min_length=1)
    rows: Path | None = None
    """A JSON that says how many rows each shard has; None: every process counts them before it begins."""
    train: TrainConfig
    seed: int = 0

    @property
    def model_folder(self) -> Path:
        """Where the finished model lies."""
        return self.out / "checkpoint"

    @property
    def features_folder(self) -> Path:
        """Where features are kept, if they are."""
        kept = self.train.features
        return kept if isinstance(kept, Path) else self.out.parent / "features"

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer of its texts: the language model's, if the architecture has one."""
        return tokenizer_of(self.tokenizer, self.architecture.language_kind)


def train(job: TrainJob) -> None:
    """Train to the end, from the newest state if there is one, and leave the model in its folder."""
    device = pick_device()
    tokenizer = job.load_tokenizer()
    model = initial_model(job, len(tokenizer))
    job.out.mkdir(parents=True, exist_ok=True)
    loader = Loader(
        job.sources,
        job.train.loader,
        tokenizer,
        job.architecture.vision.image_size,
        job.seed,
        parallel.rank(),
        parallel.ranks(),
        json.loads(job.rows.read_bytes()) if job.rows else None,
        features.prepare(model, job.sources, job.features_folder, job.out, device) if job.train.features else None,
    )
    model.vision.recompute = job.train.recompute
    learner = learner_of(model, job.train.objectives, loader.prompt_tokens)
    if learner.momentum is not None and job.train.objectives.momentum_from == "start":
        assert job.start is not None, "whoever reads a recipe asks for a start"
        checkpoint.take_up_momentum(learner.momentum, job.start)
    learner.to(device)
    optimizer = make_optimizer(learner, job.train.optimizer)
    with closing(States(job.out, digest(job), job.train.checkpoints)) as states:
        done = states.resume(learner, optimizer)
        run_steps(job, learner, optimizer, loader.batches(start=done), done, device, states)
    if parallel.rank() == 0:
        tokenizer.save(job.model_folder)
        if learner.momentum is not None and job.train.keep_momentum:
            checkpoint.save_momentum(learner.momentum, job.model_folder)
        weights.save(model, job.model_folder)
        states.discard()
    parallel.barrier()


def initial_model(job: TrainJob, vocabulary: int) -> Model:
    """The model before its first step: fresh from the seed, or from a folder."""
    wanted = job.architecture.words
    if vocabulary > wanted:
        raise ModelError(
            f"the vocabulary {job.tokenizer} has {vocabulary} entries, the model takes {wanted}: "
            f"set text.vocab_size={job.architecture.text.vocab_size + vocabulary - wanted}"
        )
    torch.manual_seed(draw(job.seed, "weights"))
    if job.start is None:
        model = build(job.architecture)
        weights.initialise(model, job.initial.vision, job.initial.text, job.initial.language)
        return model
    if isinstance(job.architecture, Blip2Config):
        model = weights.grown(job.start, job.architecture)
        weights.initialise(model, language=job.initial.language)
        return model
    return weights.load(job.start, roles=job.architecture.text.roles, image_size=job.architecture.vision.image_size)


def run_steps(
    job: TrainJob,
    learner: AnyLearner,
    optimizer: torch.optim.AdamW,
    batches: Iterator[Batch],
    done: int,
    device: torch.device,
    states: States,
) -> None:
    """Steps `done` .. `steps`; logs means every `log_every`, saves the state every `checkpoint_every`."""
    config = job.train
    wrapped = parallel.wrap(learner, device).train()
    dtype = pick_dtype(config.precision, device)
    log = StepLog(job.out / LOG, config, done)
    for step in range(done, config.steps):
        with log.waiting():
            batch = next(batches)
        torch.manual_seed(draw(job.seed, "step", step, parallel.rank()))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, config.steps)
        with autocast(device, dtype):
            tensors = (x.to(device, non_blocking=True) for x in (batch.images, batch.ids, batch.mask, batch.groups))
            losses, figures = wrapped(*tensors, progress=step / config.steps)
            total = learner.total(losses)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        # The gradients are the same on all ranks, so that all of them leave out the same steps.
        norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), config.optimizer.clip or math.inf)
        if bool(norm.isfinite()):
            optimizer.step()
            log.add(step, losses | figures | {"grad_norm": norm}, batch.unreadable, optimizer.param_groups[0]["lr"])
        else:
            log.leave_out(step, batch, optimizer.param_groups[0]["lr"])
        if (step + 1) % config.checkpoint_every == 0 and step + 1 < config.steps and parallel.rank() == 0:
            states.save(learner, optimizer, step + 1)


def draw(*parts: object) -> int:
    """A 63-bit number from its arguments: the seed of whatever they name."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


class StepLog:
    """Means of the losses, one JSON line every `log_every` steps, written by rank 0.

    Lines past step `done` tell of steps that a kill undid and that are done again: they are taken out.
    """

    def __init__(self, path: Path, config: TrainConfig, done: int = 0):
        self.path, self.config = path, config
        self.alarm = Alarm(config.steps)
        self.warned = False
        self.sums: dict[str, Tensor] = {}
        self.count = self.skipped = self.unreadable = 0
        self.in_a_row = 0
        self.since = time.perf_counter()
        self.waited = 0.0
        if parallel.rank() == 0 and path.exists():
            self._take_up(done)

    def _take_up(self, done: int) -> None:
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            entry = json.loads(line) if line.endswith(b"}\n") else {"step": done + 1}
            if entry["step"] <= done:
                kept.append(line)
                self._stuck(entry)
        with atomic(self.path) as file:
            file.writelines(kept)

    def _stuck(self, entry: dict[str, float]) -> bool:
        return "itm" in entry and self.alarm.stuck(int(entry["step"]), entry["itm"])

    @property
    def _clock(self) -> float:
        return time.perf_counter()

    def waiting(self) -> _Wait:
        """Time what happens inside as waiting for data."""
        return _Wait(self)

    def add(self, step: int, figures: dict[str, Tensor], unreadable: int, lr: float) -> None:
        """Add one step; write a line when it is due. Figures stay on the device until then."""
        for name, value in figures.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        self.unreadable += unreadable
        self.in_a_row = 0
        self._write_if_due(step + 1, lr)

    def leave_out(self, step: int, batch: Batch, lr: float) -> None:
        """Count a step that was not taken because its gradients are not finite.

        Raises:
            ModelError: `skips` steps in a row were left out before; the images of this one are in `NOT_FINITE` then.
        """
        self.skipped += 1
        self.unreadable += batch.unreadable
        self.in_a_row += 1
        if self.in_a_row > self.config.skips:
            path = self.path.with_name(NOT_FINITE)
            if parallel.rank() == 0:
                write_json(path, {"step": step + 1, "uids": batch.uids})
            raise ModelError(
                f"the gradients of {self.in_a_row} steps in a row, up to step {step + 1}, are not finite; lower "
                f"optimizer.lr or set optimizer.clip. The images of the last are in {path}."
            )
        self._write_if_due(step + 1, lr)

    def _write_if_due(self, step: int, lr: float) -> None:
        if step % self.config.log_every == 0 or step == self.config.steps:
            self._write(step, lr)

    def _write(self, step: int, lr: float) -> None:
        seconds = self._clock - self.since
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        line = {
            "step": step,
            "steps": self.config.steps,
            **{name: round(value, 5) for name, value in means.items()},
            "lr": lr,
            "samples_per_second": round((self.count + self.skipped) * self.config.loader.batch_size / seconds, 1),
            "data_wait": round(self.waited / seconds, 4),
            "unreadable": self.unreadable,
            "skipped": self.skipped,
        }
        if parallel.rank() == 0:
            if self._stuck(line):
                line["itm_stuck"] = True
                self._warn(step)
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.sums, self.count, self.skipped, self.unreadable = {}, 0, 0, 0
        self.since, self.waited = self._clock, 0.0

    def _warn(self, step: int) -> None:
        if not self.warned:
            logging.getLogger(__name__).warning(
                "step %d: itm has stood at %.4f since step %d, which is guessing: lower optimizer.lr, "
                "raise loader.batch_size, or look whether the texts belong to the images",
                step, TRIVIAL_LOSS, self.alarm.moved,
            )  # fmt: skip
        self.warned = True


class _Wait:
    """A stopwatch around the loader."""

    def __init__(self, log: StepLog):
        self.log = log

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.log.waited += time.perf_counter() - self.start
