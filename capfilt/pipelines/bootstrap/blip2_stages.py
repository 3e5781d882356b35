"""final: the last round's pretraining in stages, a BLIP-2 (its section 3) on what rounds led by a BLIP have cleaned.

A part of bootstrap, not a verb. Each stage begins with what the one before left; the first takes the eyes of the model
that led the rounds, unless another tower is given. All stages read the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.loading.loader import Source
from capfilt.errors import RecipeError
from capfilt.models import Architecture, Blip2Config
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.pipelines.bootstrap.language_model import LanguageJob, teach_language
from capfilt.stages.train import TrainResources, check_shape, check_training, read_architecture, run_training
from capfilt.storage.paths import StoragePath
from capfilt.training.language_model import TeachConfig
from capfilt.training.loop import TrainConfig, TrainJob

if TYPE_CHECKING:
    from capfilt.pipelines.bootstrap.rounds import Story


class StageConfig(Config):
    """One stage."""

    model: str
    """A preset of `models/blip2/`, or a YAML."""
    vision: str | None = None
    """Of the first stage: the frozen tower, as `initial.vision` of a pretraining. None: the newest model's eyes."""
    text: str | None = None
    """Of the first stage: what the Q-Former begins as, as `initial.text`. None: fresh."""
    language: str | TeachConfig | None = None
    """Of a model with a language model: a folder of transformers, a name on the hub, or how a small one is taught from
    the texts of this round."""
    train: TrainConfig


def name(number: int) -> str:
    """What a stage is called, and its folder; counted from 1 as in the paper."""
    return f"stage-{number + 1}"


def check_final(
    stages: Sequence[StageConfig], leader: Architecture, leader_name: str, resources: TrainResources
) -> tuple[Architecture, ...]:
    """Refuse stages whose parts do not meet, before anything is loaded; returns their architectures."""
    found: list[Architecture] = []
    for number, stage in enumerate(stages):
        where = f"final.{number} ({stage.model})"
        own = read_architecture(stage.model, stage.train.image_size)
        if not isinstance(own, Blip2Config):
            raise RecipeError(f"{where}: a stage is a BLIP-2, and this is of the family {own.family}; set `model`.")
        check_training(own, stage.train, resources, where)
        check_language(stage, own, where)
        if number:
            if stage.vision or stage.text:
                raise RecipeError(
                    f"{where}: it begins with what the stage before left; vision and text are of final.0."
                )
            check_shape(found[-1], own, f"final.{number - 1}", where, ("vision", "text"))
        elif stage.vision is None:
            check_shape(leader, own, f"the newest {leader_name}, whose eyes it takes unless `vision` is given,", where)
        found.append(own)
    return tuple(found)


def check_language(stage: StageConfig, own: Blip2Config, where: str) -> None:
    """Refuse a language model that is given in vain, that is missing, or that cannot be taught."""
    if own.language is None:
        if stage.language is not None:
            raise RecipeError(f"{where}: `language` is given, and the model has none: leave it out.")
    elif stage.language is None:
        raise RecipeError(
            f"{where} has a frozen language model: say which with `language`, a folder or a name on the Hugging Face"
            " hub, or let a small one be taught with language.steps."
        )
    elif isinstance(stage.language, TeachConfig) and own.language.kind != "opt":
        raise RecipeError(
            f"{where}: a language model that is taught is an OPT, and this is a {own.language.kind.upper()};"
            " give `language` a folder or a name on the Hugging Face hub."
        )


def pretrain_final(story: Story, r: int, sources: tuple[Source, ...], newest: StoragePath) -> dict[str, StoragePath]:
    """Train every stage; returns their models by the names of the stages."""
    done: dict[str, StoragePath] = {}
    for number, (stage, architecture) in enumerate(zip(story.config.final, story.final, strict=True)):
        language = speaker(story, r, number, architecture, sources)
        initial = InitialConfig(language=language).located()
        if number == 0:
            initial = InitialConfig(vision=stage.vision or str(newest), text=stage.text, language=language).located()
        job = TrainJob(
            out=story.folder(r, name(number)),
            architecture=architecture,
            start=done[name(number - 1)] if number else None,
            initial=initial,
            tokenizer=initial.language or story.config.tokenizer,
            sources=sources,
            train=stage.train,
            compute=story.compute[name(number)],
            seed=story.seed(r, name(number)),
        )
        label, counts = f"round {r} {name(number).replace('-', ' ')}", story.run.folder.absolute()
        resources, made = story.config.cluster.train, story.made(r)
        done[name(number)] = run_training(story.session, job, resources, story.show, label, made, counts)
    return done


def speaker(story: Story, r: int, number: int, architecture: Architecture, sources: Sequence[Source]) -> str | None:
    """The folder or the name of a stage's language model, which is taught first where none is given."""
    asked = story.config.final[number].language
    if not isinstance(asked, TeachConfig):
        return asked
    assert isinstance(architecture, Blip2Config)
    assert architecture.language is not None
    urls = tuple(url for source in sources for url in shards.expand(source.shards))
    job = LanguageJob(
        out=story.folder(r),
        language=architecture.language,
        config=asked,
        shards=urls,
        contents=story.contents(r, urls),
        seed=story.seed(r, "language"),
    )
    resources = story.config.cluster.select  # a core: the language model is a small one
    return str(teach_language(story.session, job, resources, story.show, f"round {r} language"))


def merged(figures: Mapping[str, dict[str, object]], models: Sequence[str]) -> dict[str, object]:
    """The figures of a round that ended in stages: of each kind those of the last stage that has them, and all of them
    under `stages`."""
    told = {stage: {"model": model, **figures.get(stage, {})} for stage, model in zip(figures, models, strict=True)}
    last = {kind: figure for own in figures.values() for kind, figure in own.items()}
    return {**last, "stages": told}
