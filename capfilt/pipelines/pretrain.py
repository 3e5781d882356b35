"""pretrain: one recipe, one model."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from capfilt import config as configs
from capfilt.cluster.session import connect
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.loading.config import Source
from capfilt.inference.roles import check_prompts
from capfilt.models import Architecture, ModelSection, architecture_of, label
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.pipelines.tokenizer_checks import Texts, check_vocabulary, length_warnings, text_warnings
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.stages.compute import ComputeRequest, decide
from capfilt.stages.count_pairs import num_without_text, with_known_answers
from capfilt.stages.train import (
    check_beginning,
    check_features,
    check_pictures,
    check_sources,
    check_start,
    check_training,
    run_training,
)
from capfilt.storage.paths import StoragePath
from capfilt.training.config import EXECUTION_FIELDS, TrainConfig, TrainResources
from capfilt.training.job import TrainJob


class PretrainConfig(Config):
    """A recipe of `capfilt pretrain`."""

    folder: ClassVar[str] = "pretrain"
    alternatives: ClassVar[frozenset[str]] = frozenset({"task"})
    named_sections: ClassVar[frozenset[str]] = frozenset({"model"})

    seed: int = 0
    """Decides every random draw of the run."""
    model: ModelSection
    """A preset of `models/`, a YAML, or an architecture with the keys of one; `extends` in it names what it is laid
    over."""
    tokenizer: str = "world"
    """"world", or a folder or file with a BERT vocabulary."""
    start: StoragePath | None = None
    """A model folder to start from instead of fresh weights."""
    initial: InitialConfig = InitialConfig()
    """What the towers of a fresh model begin with; the paper: an ImageNet ViT and BERT (BLIP, section 4.1)."""
    data: tuple[Source, ...] = Field(min_length=1)
    """The shards to read; `data=shards/` is short for one source."""
    train: TrainConfig
    """How long and how the model is trained."""
    resources: TrainResources = TrainResources()
    """The processes that train."""

    @field_validator("data", mode="before")
    @classmethod
    def _one_source(cls, data: object) -> object:
        return ({"shards": data},) if isinstance(data, str) else data

    @model_validator(mode="after")
    def _one_beginning(self) -> PretrainConfig:
        if self.start is not None and self.initial.model_copy(update={"language": None}) != InitialConfig():
            raise ValueError("start and initial both say what a model begins with; give one of them")
        if self.start is None and self.train.objectives.resumes_momentum:
            raise ValueError("train.objectives.momentum_from is 'start', and there is none: give `start`")
        return self


def check(config: PretrainConfig) -> Architecture:
    """Refuse a recipe whose parts do not meet, before anything is loaded; returns its architecture."""
    architecture, name = architecture_of(config.model, config.train.image_size), label(config.model)
    check_training(architecture, config.train, config.resources, name)
    check_beginning(architecture, config.initial, config.start, name)
    check_vocabulary(config.tokenizer, architecture, config.model)
    return architecture


def lengths_of(config: PretrainConfig) -> dict[str, int]:
    """The tokens that a text may have, by the key that says so."""
    return {"train.loader.max_length": config.train.loader.max_length}


def texts_of(config: PretrainConfig) -> list[Texts]:
    """The texts of each source."""
    lengths = lengths_of(config)
    return [Texts(f"data.{number}", source.shards, lengths) for number, source in enumerate(config.data)]


def _has_fresh_head(architecture: Architecture, saved: Architecture) -> bool:
    """Whether a training from a saved model begins with a fresh head: it has none, or one of other classes."""
    classes = "classify" in architecture.capabilities and architecture.known_answers != saved.known_answers
    return architecture.family != saved.family or classes


def run(address: str, config: PretrainConfig, out: StoragePath, show: Progress) -> dict[str, Any]:
    """The verb: run a recipe of a training in a run folder of its own; tells where the model is."""
    architecture = check(config)
    check_features(out, config.train)
    check_sources(config.initial, architecture)
    check_prompts(config.tokenizer, architecture, {"train": config.train.loader})
    lengths = length_warnings(architecture, lengths_of(config))
    for warning in (*lengths, *text_warnings(config.tokenizer, architecture, texts_of(config))):
        logging.getLogger(__name__).warning(warning)
    start = check_start(config.start, architecture, config.initial) if config.start else None
    sources = tuple(source.model_copy(update={"shards": tuple(shards.expand(source.shards))}) for source in config.data)
    check_pictures(sources, config.train)
    if config.train.objectives.least_answers is not None:
        with show.wait("counting answers"):
            urls = [url for source in sources for url in source.shards]
            architecture = with_known_answers(architecture, config.train.objectives, urls)
        show.say(f"the model chooses among {len(architecture.known_answers or ())} answers")
    if start is not None and _has_fresh_head(architecture, store.architecture(start)):
        show.say(f"the head of {label(config.model)} begins fresh on the model at {start}")
    plan = config.model_dump(mode="json", exclude={"resources": True, "train": EXECUTION_FIELDS})
    plan["train"]["features"] = bool(config.train.features)  # not where they lie
    plan |= {"architecture": architecture.model_dump(mode="json"), "data": [s.model_dump(mode="json") for s in sources]}
    opened = Run.open(out, configs.to_yaml(config), plan)
    with connect(address, show=show) as session:
        wanted = ComputeRequest(config.train.precision, config.resources, training=True)
        job = TrainJob(
            out=out.absolute() / "pretrain",
            architecture=architecture,
            start=start,
            initial=config.initial.located(),
            tokenizer=config.tokenizer,
            sources=sources,
            train=config.train,
            compute=decide(session, opened, {"pretrain": wanted}, show)["pretrain"],
            seed=config.seed,
        )
        model = run_training(session, job, config.resources, show, "pretrain")
    bare = num_without_text(job.out.parent) if config.train.objectives.row_kind == "captions" else 0
    return {"model": str(model)} | ({"without_text": bare} if bare else {})
