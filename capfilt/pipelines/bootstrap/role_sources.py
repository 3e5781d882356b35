"""Where a captioner or a filter comes from: fine-tuned from each round's newest model, or a pretrained model.

A source is one class here, its section of a recipe in `config.RoleConfig`, and a line in `SOURCES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

from capfilt.data.loading.config import Source
from capfilt.data.policy import check_scores
from capfilt.errors import RecipeError
from capfilt.inference.roles import NEEDS, check_captioner, check_filter, check_prompts, scores_given
from capfilt.models import Architecture, label
from capfilt.models.architecture import ModelRole
from capfilt.models.checkpoints import store
from capfilt.pipelines.bootstrap.config import BootstrapConfig, PretrainedConfig
from capfilt.pipelines.bootstrap.context import BootstrapContext, RoleSource
from capfilt.stages.compute import ComputeRequest
from capfilt.stages.train import check_training, run_training
from capfilt.storage.paths import StoragePath
from capfilt.training.config import EXECUTION_FIELDS, TrainConfig
from capfilt.training.job import TrainJob

ROLES: tuple[ModelRole, ...] = ("captioner", "filter")


class SourceType(Protocol):
    """The class of a source: how one is checked and opened."""

    @classmethod
    def check(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> None:
        """Refuse what the recipe and the architecture of its `model` show not to fit. Raises RecipeError."""

    @classmethod
    def open(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> RoleSource:
        """Return the source after checking its files. RecipeError, ModelError or TextError."""


@dataclass(frozen=True)
class Finetuned:
    """Trained in every round, from the newest model, on the human pairs."""

    config: BootstrapConfig
    role: ModelRole
    train: TrainConfig

    @classmethod
    def check(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> None:
        """The model that the rounds pretrain must be able to play the role, and its training to be carried out."""
        if missing := NEEDS[role] - architecture.capabilities:
            raise RecipeError(
                f"{label(config.model)} cannot be the {role}: it cannot {', '.join(sorted(missing))}; take a model"
                f" that can, or give {role}.pretrained."
            )
        if role == "filter":
            check_scores(config.select.needed_scores, scores_given(architecture.capabilities), label(config.model))
        train = config.trainings[role]
        check_training(cls._architecture(architecture, role, train), train, config.cluster.finetune, role)

    @classmethod
    def open(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> Self:
        """There is no model yet to be checked; the prompts must leave room for a text."""
        train = config.trainings[role]
        decodes = [config.annotate.decode] if role == "captioner" else []
        check_prompts(config.tokenizer, architecture, {role: train.loader}, decodes)
        return cls(config, role, train)

    def plan(self) -> dict[str, Any]:
        """The settings that decide what is learned."""
        return training_plan(self.train)

    def compute_request(self) -> ComputeRequest:
        """A training's request."""
        return ComputeRequest(self.train.precision, self.config.cluster.finetune, training=True)

    def model(self, context: BootstrapContext, r: int, newest: StoragePath) -> StoragePath:
        """Fine-tune the newest model, without the parts that the role does not use."""
        job = TrainJob(
            out=context.folder(r, self.role),
            architecture=self._architecture(context.opened.architecture, self.role, self.train),
            start=newest,
            tokenizer=self.config.tokenizer,
            sources=(Source(shards=tuple(context.splits["human"])),),
            train=self.train,
            compute=context.compute[self.role],
            seed=context.seed(r, self.role),
        )
        label, counts = f"round {r} {self.role}", context.run.folder.absolute()
        resources, digests = self.config.cluster.finetune, context.written_digests(r)
        return run_training(context.session, job, resources, context.progress, label, digests, counts)

    @staticmethod
    def _architecture(architecture: Architecture, role: ModelRole, train: TrainConfig) -> Architecture:
        return architecture.for_role(role).changed(image_size=train.image_size or architecture.image_size)


@dataclass(frozen=True)
class Pretrained:
    """A model that exists before the run, the same in every round."""

    folder: StoragePath
    fingerprint: str

    @classmethod
    def check(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> None:
        """Nothing yet: reading the model may download it, and `capfilt show` needs no network."""

    @classmethod
    def open(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> Self:
        """Find the model, and refuse one that cannot play the role."""
        section = getattr(config, role)
        assert isinstance(section, PretrainedConfig)
        folder = store.find(section.pretrained)
        if role == "captioner":
            check_captioner(folder, config.annotate.decode)
        else:
            check_filter(folder, config.select.needed_scores)
        return cls(folder, store.fingerprint(folder))

    def plan(self) -> dict[str, Any]:
        """The model by its weights, not by where it lies."""
        return {"pretrained": self.fingerprint}

    def compute_request(self) -> None:
        """Nothing is trained."""

    def model(self, context: BootstrapContext, r: int, newest: StoragePath) -> StoragePath:
        """The same in every round."""
        return self.folder


SOURCES: dict[type, type[SourceType]] = {TrainConfig: Finetuned, PretrainedConfig: Pretrained}
"""What each kind of section means."""


def check_roles(config: BootstrapConfig, architecture: Architecture) -> None:
    """Refuse sources that do not fit, before any file of theirs is read. RecipeError."""
    for role in ROLES:
        SOURCES[type(getattr(config, role))].check(config, role, architecture)


def open_roles(config: BootstrapConfig, architecture: Architecture) -> dict[ModelRole, RoleSource]:
    """The source of each role, after its files have been checked."""
    return {role: SOURCES[type(getattr(config, role))].open(config, role, architecture) for role in ROLES}


def training_plan(train: TrainConfig) -> dict[str, Any]:
    """The settings of a training that decide what is learned, for the plan."""
    plan = train.model_dump(mode="json", exclude=EXECUTION_FIELDS)
    return plan | {"features": bool(train.features)}  # whether, not in which folder
