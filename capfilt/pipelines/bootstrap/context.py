"""What every step of one bootstrap needs: the recipe, the opened run folder, the data and the cluster."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from capfilt.cluster.session import Session
from capfilt.data.loading.config import Source
from capfilt.evaluation.tasks.config import TaskEvalConfig
from capfilt.inference.captioners.spec import CaptionerSpec, LocalSpec
from capfilt.inference.device import Compute
from capfilt.models import Architecture
from capfilt.models.architecture import ModelRole
from capfilt.pipelines.bootstrap.config import BootstrapConfig, TaskConfig
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.stages.compute import ComputeRequest
from capfilt.stages.count_pairs import shard_digests
from capfilt.stages.runner import digests
from capfilt.stages.train import run_training
from capfilt.storage.paths import StoragePath
from capfilt.training.config import TrainResources
from capfilt.training.job import TrainJob


@dataclass(frozen=True)
class Task:
    """A downstream task of a recipe, checked."""

    config: TaskConfig
    evaluation: TaskEvalConfig
    architecture: Architecture | None
    """Of the fine-tuned model; None where the round's model is measured as it is."""

    @property
    def name(self) -> str:
        return self.config.task

    @property
    def stage(self) -> str:
        """Its folder in that of a round, and its computation in the plan."""
        return f"task-{self.name}"


class RoleSource(ABC):
    """Where the model of a role comes from, round by round."""

    @classmethod
    @abstractmethod
    def check(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> None:
        """Refuse what the recipe and the architecture of its `model` show not to fit. Raises RecipeError."""

    @classmethod
    @abstractmethod
    def open(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> Self:
        """Return the source after checking its files. RecipeError, ModelError or TextError."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What the run's plan has under the key of the role."""

    def compute_requests(self) -> dict[str, ComputeRequest]:
        """What each of its trainings requests to compute with, by the name of its folder."""
        return {}

    @abstractmethod
    def model(self, context: BootstrapContext, r: int, newest: StoragePath) -> StoragePath:
        """The model that plays the role in round `r`; `newest` is the model that the round before pretrained."""

    def captioner(self, context: BootstrapContext, r: int, newest: StoragePath) -> CaptionerSpec:
        """The same where the role is the captioner's, which need not be a model of ours."""
        return LocalSpec(model=self.model(context, r, newest))


@dataclass(frozen=True)
class OpenedRun:
    """A checked recipe, the architectures that it names, and its run folder, of which this process is the driver."""

    config: BootstrapConfig
    architecture: Architecture
    final: tuple[Architecture, ...]
    """The architectures of `config.final`."""
    roles: Mapping[ModelRole, RoleSource]
    run: Run
    tasks: tuple[Task, ...] = ()
    """The downstream tasks of `config.evaluate`."""


@dataclass(frozen=True)
class BootstrapContext:
    """What every step of one bootstrap needs."""

    session: Session
    opened: OpenedRun
    progress: Progress
    splits: dict[str, list[str]]
    """The URLs of the shards of each split: web, human and, where there are such, val and test."""
    compute: dict[str, Compute]
    """Device and number format of each stage, by its name."""

    @property
    def config(self) -> BootstrapConfig:
        return self.opened.config

    @property
    def run(self) -> Run:
        return self.opened.run

    def folder(self, r: int, *parts: str) -> StoragePath:
        """A path in the folder of round `r`, absolute: workers may have another working directory."""
        return self.run.round(r).absolute().joinpath(*parts)

    def written_digests(self, *rounds: int) -> dict[str, str]:
        """The sha256, by URL, of the shards that the run wrote itself, including those of these rounds."""
        ledgers = (
            (Ledger(self.run.path("data"), "world")),
            (Ledger(self.run.path("data", "web"), "download")),
            (Ledger(self.run.path("data", "web-kept"), "leave-out")),
            *(Ledger(self.folder(r), "select") for r in rounds),
        )
        return {url: sha256 for ledger in ledgers for url, sha256 in digests(ledger).items()}

    def contents(self, r: int, urls: Sequence[str]) -> dict[str, str]:
        """The sha256 of shards that round `r` reads, by URL."""
        return shard_digests(self.session, urls, self.written_digests(r), self.run.folder.absolute(), self.progress)

    def train(self, r: int, job: TrainJob, resources: TrainResources, label: str) -> StoragePath:
        """Carry out a training of round `r`, unless it is done; the folder of its model."""
        made, counts = self.written_digests(*range(max(r - 1, 0), r + 1)), self.run.folder.absolute()
        return run_training(self.session, job, resources, self.progress, f"round {r} {label}", made, counts)

    def pairs(self, r: int) -> tuple[Source, ...]:
        """What round `r` pretrains on: the web as it is in round 0, later what the round kept of it; and the human
        pairs."""
        web = Source(shards=str(self.folder(r, "dataset")) if r else tuple(self.splits["web"]))
        return (web, Source(shards=tuple(self.splits["human"]), repeat=self.config.human_repeat))

    def seed(self, r: int, purpose: str) -> int:
        """A different seed for each training: the rounds must not draw the same noise."""
        name = f"{self.config.seed}|{r}|{purpose}".encode()
        return int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "big")
