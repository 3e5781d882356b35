"""Where a captioner or a filter comes from: fine-tuned from each round's newest model, a model of another architecture
that is trained beside it, a pretrained model, or a vision-language model that is taught before the rounds.

A source is one class here, its section of a recipe in `config.RoleConfig`, and a line in `SOURCES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from capfilt.cluster.worker_pool import Resources
from capfilt.data.loading.config import Source
from capfilt.data.policy import check_scores
from capfilt.errors import RecipeError
from capfilt.inference.captioners.prompts import IGNORE, templates
from capfilt.inference.captioners.spec import CaptionerSpec, LocalSpec, captioner_spec
from capfilt.inference.captioners.vlm.spec import VlmSpec, check_decode
from capfilt.inference.roles import check_filter, check_prompts, lacking, scores_given
from capfilt.models import Architecture, architecture_of, label
from capfilt.models.architecture import ModelRole
from capfilt.models.checkpoints import store
from capfilt.pipelines.bootstrap.config import BootstrapConfig, PretrainedConfig, SeparateConfig, TaughtConfig
from capfilt.pipelines.bootstrap.context import BootstrapContext, RoleSource
from capfilt.pipelines.bootstrap.roles.taught import TeachJob, train_model
from capfilt.pipelines.tokenizer_checks import check_vocabulary
from capfilt.stages.compute import ComputeRequest
from capfilt.stages.train import check_beginning, check_sources, check_start, check_training
from capfilt.storage.paths import StoragePath
from capfilt.training.config import EXECUTION_FIELDS, TeachCaptionerConfig, TrainConfig
from capfilt.training.job import TrainJob

ROLES: tuple[ModelRole, ...] = ("captioner", "filter")


@dataclass(frozen=True)
class Finetuned(RoleSource):
    """Trained in every round, from the newest model, on the human pairs."""

    config: BootstrapConfig
    role: ModelRole
    train: TrainConfig

    @classmethod
    def check(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> None:
        """The model that the rounds pretrain must be able to play the role, and its training to be carried out."""
        refuse_unable(config, role, architecture, label(config.model))
        train = config.trainings[role]
        check_training(role_architecture(architecture, role, train), train, config.cluster.finetune, role)

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

    def compute_requests(self) -> dict[str, ComputeRequest]:
        return {self.role: ComputeRequest(self.train.precision, self.config.cluster.finetune, training=True)}

    def model(self, context: BootstrapContext, r: int, newest: StoragePath) -> StoragePath:
        """Fine-tune the newest model, without the parts that the role does not use."""
        job = TrainJob(
            out=context.folder(r, self.role),
            architecture=role_architecture(context.opened.architecture, self.role, self.train),
            start=newest,
            tokenizer=self.config.tokenizer,
            sources=(Source(shards=tuple(context.splits["human"])),),
            train=self.train,
            compute=context.compute[self.role],
            seed=context.seed(r, self.role),
        )
        return context.train(r, job, self.config.cluster.finetune, self.role)


@dataclass(frozen=True)
class Separate(RoleSource):
    """Of another architecture than what the rounds pretrain, and trained in every round beside that."""

    config: BootstrapConfig
    role: ModelRole
    section: SeparateConfig
    architecture: Architecture
    start: StoragePath | None

    @classmethod
    def check(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> None:
        """Its own architecture must be able to play the role, and its trainings to be carried out."""
        section, resources = config.separate[role], config.cluster
        mine, name = separate_architecture(section), f"{label(section.model)} ({role}.model)"
        refuse_unable(config, role, mine, name)
        check_training(role_architecture(mine, role, section), section, resources.finetune, role)
        if section.pretrain is not None:
            check_training(mine, section.pretrain, resources.train, f"{role}.pretrain")
        first = section if section.pretrain is None else section.pretrain
        if section.start is None and first.objectives.resumes_momentum:
            key = role if section.pretrain is None else f"{role}.pretrain"
            raise RecipeError(f"{key}.objectives.momentum_from is 'start', and there is none: give {role}.start.")
        check_beginning(mine, section.initial, section.start, name, f"{role}.")
        check_vocabulary(section.tokenizer or config.tokenizer, mine, section.model, f"{role}.model")

    @classmethod
    def open(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> Self:
        """Refuse prompts that leave no room for a text, and checkpoints that are not there or of another shape."""
        section = config.separate[role]
        mine = separate_architecture(section)
        loaders = {key: train.loader for key, train in config.trainings.items() if config.separate_role(key) == role}
        decodes = [config.annotate.decode] if role == "captioner" else []
        check_prompts(section.tokenizer or config.tokenizer, mine, loaders, decodes)
        check_sources(section.initial, mine)
        start = section.start and check_start(section.start, mine, section.initial, f"{role}.")
        return cls(config, role, section, mine, start)

    def plan(self) -> dict[str, Any]:
        """The settings that decide what is learned, and what it begins with: a model by its weights."""
        pretrain = self.section.pretrain
        return training_plan(self.section) | {
            "architecture": self.architecture.model_dump(mode="json"),
            "start": store.fingerprint(self.start) if self.start else None,
            "pretrain": pretrain and training_plan(pretrain),
        }

    def compute_requests(self) -> dict[str, ComputeRequest]:
        resources, pretrain = self.config.cluster, self.section.pretrain
        requests: dict[str, ComputeRequest] = {
            self.role: ComputeRequest(self.section.precision, resources.finetune, training=True)
        }
        if pretrain is not None:
            requests[f"{self.role}-pretrain"] = ComputeRequest(pretrain.precision, resources.train, training=True)
        return requests

    def model(self, context: BootstrapContext, r: int, newest: StoragePath) -> StoragePath:
        """Pretrain on what the round before pretrained on, if the recipe says so, and fine-tune on the human pairs."""
        job = TrainJob(
            out=context.folder(r, self.role),
            architecture=role_architecture(self.architecture, self.role, self.section),
            start=self.start,
            tokenizer=self.section.tokenizer or self.config.tokenizer,
            sources=(Source(shards=tuple(context.splits["human"])),),
            train=self.section.finetune,
            compute=context.compute[self.role],
            seed=context.seed(r, self.role),
        )
        initial, cluster = self.section.initial.located(), self.config.cluster
        if self.section.pretrain is None:
            return context.train(r, job.model_copy(update={"initial": initial}), cluster.finetune, self.role)
        name = f"{self.role}-pretrain"
        changed = {
            "out": context.folder(r, name),
            "architecture": self.architecture,
            "initial": initial,
            "sources": context.pairs(r - 1),
            "train": self.section.pretrain,
            "compute": context.compute[name],
            "seed": context.seed(r, name),
        }
        pretrained = context.train(r, job.model_copy(update=changed), cluster.train, name)
        return context.train(r, job.model_copy(update={"start": pretrained}), cluster.finetune, self.role)


@dataclass(frozen=True)
class Pretrained(RoleSource):
    """A model that exists before the run, the same in every round."""

    spec: CaptionerSpec
    """A filter is a model of ours."""
    fingerprint: str

    @classmethod
    def check(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> None:
        """Nothing yet: reading the model may download it, and `capfilt show` needs no network."""

    @classmethod
    def open(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> Self:
        """Find the model, and refuse one that cannot play the role."""
        section = getattr(config, role)
        assert isinstance(section, PretrainedConfig)
        spec: CaptionerSpec
        if role == "captioner":
            spec = captioner_spec(section.pretrained)
            spec.check(config.annotate)
        else:
            spec = LocalSpec(model=store.find(section.pretrained))
            check_filter(spec.model, config.select.needed_scores)
        return cls(spec, spec.fingerprint())

    def plan(self) -> dict[str, Any]:
        """The model by its weights, not by where it lies."""
        return {"pretrained": self.fingerprint}

    def model(self, context: BootstrapContext, r: int, newest: StoragePath) -> StoragePath:
        assert isinstance(self.spec, LocalSpec), "a filter is a model of ours"
        return self.spec.model

    def captioner(self, context: BootstrapContext, r: int, newest: StoragePath) -> CaptionerSpec:
        return self.spec


@dataclass(frozen=True)
class Taught(RoleSource):
    """A vision-language model of transformers, fine-tuned on the human pairs before the first round that needs it."""

    config: BootstrapConfig
    teach: TeachCaptionerConfig
    start: VlmSpec | None

    @classmethod
    def check(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> None:
        """It writes and does not score; the decoding must be one that it can do."""
        if role == "filter":
            raise RecipeError("filter.teach: a vision-language model is no filter; only `captioner` has it.")
        check_decode(config.annotate.decode)

    @classmethod
    def open(cls, config: BootstrapConfig, role: ModelRole, architecture: Architecture) -> Self:
        """Find the model that it begins with, and refuse one that does not answer about images."""
        section = config.captioner
        assert isinstance(section, TaughtConfig)
        start = None if section.teach.start is None else VlmSpec.of(section.teach.start)
        if start is not None:
            start.check(config.annotate)
        return cls(config, section.teach, start)

    def plan(self) -> dict[str, Any]:
        """The settings, and what it begins with: a model by its weights."""
        start = None if self.start is None else self.start.fingerprint()
        return {"teach": self.teach.model_dump(mode="json") | {"start": start}}

    def compute_requests(self) -> dict[str, ComputeRequest]:
        """That of its training, which is done in one process."""
        return {"captioner": ComputeRequest(self.teach.precision, self._worker)}

    @property
    def _worker(self) -> Resources:
        """One process with the CPUs of all those that fine-tune the other roles, and the GPU of one of them."""
        size = self.config.cluster.finetune
        return Resources(cpus=size.cpus * size.workers, gpus=size.gpus, workers=1)

    def model(self, context: BootstrapContext, r: int, newest: StoragePath) -> StoragePath:
        """The folder, the same in every round."""
        human = context.splits["human"]
        job = TeachJob(
            out=context.run.folder.absolute(),
            config=self.teach,
            start=None if self.start is None else self.start.model,
            start_fingerprint=None if self.start is None else self.start.fingerprint(),
            prompt=templates(self.config.annotate.vlm)[IGNORE],
            shards=tuple(human),
            contents=context.contents(0, human),
            compute=context.compute["captioner"],
            seed=context.seed(0, "captioner"),
        )
        return train_model(context.session, job, self._worker, context.progress, "teach the captioner")

    def captioner(self, context: BootstrapContext, r: int, newest: StoragePath) -> CaptionerSpec:
        return VlmSpec(model=self.model(context, r, newest))


SOURCES: dict[type, type[RoleSource]] = {
    TrainConfig: Finetuned,
    SeparateConfig: Separate,
    PretrainedConfig: Pretrained,
    TaughtConfig: Taught,
}
"""What each kind of section means."""


def check_roles(config: BootstrapConfig, architecture: Architecture) -> None:
    """Refuse sources that do not fit, before any file of theirs is read. RecipeError."""
    for role in ROLES:
        SOURCES[type(getattr(config, role))].check(config, role, architecture)


def open_roles(config: BootstrapConfig, architecture: Architecture) -> dict[ModelRole, RoleSource]:
    """The source of each role, after its files have been checked."""
    return {role: SOURCES[type(getattr(config, role))].open(config, role, architecture) for role in ROLES}


def refuse_unable(config: BootstrapConfig, role: ModelRole, architecture: Architecture, name: str) -> None:
    """Refuse an architecture that cannot play a role, or a filter without a score that the policy needs. RecipeError;
    `name` is how a person knows it."""
    able = architecture.for_role(role).capabilities  # a pretrained X-VLM does not write; a captioner made of it does
    if missing := lacking(role, able):
        raise RecipeError(
            f"{name} cannot be the {role}: it cannot {', '.join(sorted(missing))}; give {role}.model, an architecture"
            f" that can, or {role}.pretrained."
        )
    if role == "filter":
        check_scores(config.select.needed_scores, scores_given(able), name)


def role_architecture(architecture: Architecture, role: ModelRole, train: TrainConfig) -> Architecture:
    """An architecture without the parts that a role does not use, at the picture size of its fine-tuning."""
    return architecture.for_role(role).changed(image_size=train.image_size or architecture.image_size)


def separate_architecture(section: SeparateConfig) -> Architecture:
    """The architecture of a role with a model of its own, at the picture size of its pretraining."""
    return architecture_of(section.model, section.pretrain.image_size if section.pretrain else None)


def training_plan(train: TrainConfig) -> dict[str, Any]:
    """The settings of a training that decide what is learned, for the plan."""
    plan = train.model_dump(mode="json", exclude=EXECUTION_FIELDS)
    return plan | {"features": bool(train.features)}  # whether, not in which folder
