"""final: the last round's pretraining in stages, a BLIP-2 (its section 3) on the pairs that the rounds have cleaned.

A part of bootstrap, not a verb. Each stage begins with what the one before left; the first takes the vision tower of
the newest model, unless another one is given. All stages read the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from capfilt.data import shards
from capfilt.data.loading.config import Source
from capfilt.models import Architecture, Blip2Config
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.pipelines.bootstrap.context import BootstrapContext
from capfilt.pipelines.bootstrap.roles.taught import LanguageJob, train_model
from capfilt.storage.paths import StoragePath
from capfilt.training.config import TeachConfig
from capfilt.training.job import TrainJob


def stage_name(number: int) -> str:
    """The name of a stage and of its folder; counted from 1, as in the paper."""
    return f"stage-{number + 1}"


def pretrain_stages(
    context: BootstrapContext, r: int, sources: tuple[Source, ...], newest: StoragePath
) -> dict[str, StoragePath]:
    """Train every stage in turn; returns the folders of their models by the names of the stages."""
    models: dict[str, StoragePath] = {}
    for number, (stage, architecture) in enumerate(zip(context.config.final, context.opened.final, strict=True)):
        name = stage_name(number)
        language = language_source(context, r, number, architecture, sources)
        initial = InitialConfig(language=language).located()
        if number == 0:
            initial = InitialConfig(vision=stage.vision or str(newest), text=stage.text, language=language).located()
        job = TrainJob(
            out=context.folder(r, name),
            architecture=architecture,
            start=models[stage_name(number - 1)] if number else None,
            initial=initial,
            tokenizer=initial.language or context.config.tokenizer,
            sources=sources,
            train=stage.train,
            compute=context.compute[name],
            seed=context.seed(r, name),
        )
        models[name] = context.train(r, job, context.config.cluster.train, name.replace("-", " "))
    return models


def language_source(
    context: BootstrapContext, r: int, number: int, architecture: Architecture, sources: Sequence[Source]
) -> str | None:
    """The folder or the name of a stage's language model, which is trained first where the recipe says so."""
    given = context.config.final[number].language
    if not isinstance(given, TeachConfig):
        return given
    language = cast(Blip2Config, architecture).language  # `check_final` lets no other family through
    assert language is not None
    urls = tuple(url for source in sources for url in shards.expand(source.shards))
    job = LanguageJob(
        out=context.folder(r),
        language=language,
        config=given,
        shards=urls,
        contents=context.contents(r, urls),
        seed=context.seed(r, "language"),
    )
    resources = context.config.cluster.select  # one core: the language model is a small one
    return str(train_model(context.session, job, resources, context.progress, f"round {r} language"))


def merge_figures(figures: Mapping[str, dict[str, object]], models: Sequence[str]) -> dict[str, object]:
    """The figures of a round that ended in stages: of each kind those of the last stage that has them, and all of them
    under `stages`.

    `figures` are by stage, `models` the names of their architectures in the same order.
    """
    stages = {stage: {"model": model, **figures.get(stage, {})} for stage, model in zip(figures, models, strict=True)}
    last = {kind: figure for of_stage in figures.values() for kind, figure in of_stage.items()}
    return {**last, "stages": stages}
