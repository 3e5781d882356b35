"""Refuses a bootstrap recipe whose parts do not fit together, before any cluster is contacted.

`check` reads architectures only and is all that `capfilt show` needs; `check_files` also looks for the checkpoints:
the last of them is read when days have passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from capfilt.data.policy import check_calibrated, check_further
from capfilt.errors import RecipeError
from capfilt.inference.roles import check_prompts
from capfilt.inference.scores.spec import name_of, score_specs
from capfilt.models import Architecture, architecture_of, label
from capfilt.models.architecture import ModelRole
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.pipelines.bootstrap.config import BootstrapConfig, StageConfig
from capfilt.pipelines.bootstrap.roles.sources import check_roles, separate_architecture
from capfilt.pipelines.bootstrap.tasks import check_tasks
from capfilt.pipelines.tokenizer_checks import Texts, check_vocabulary, length_warnings
from capfilt.stages.train import check_shape, check_sources, check_training
from capfilt.training.config import TeachConfig, TrainResources


def check(config: BootstrapConfig) -> tuple[Architecture, tuple[Architecture, ...]]:
    """Check the parts of a recipe against each other; returns its architecture and those of the stages of `final`.

    Raises:
        RecipeError: parts that do not fit, with the key to change.
    """
    architecture, name = architecture_of(config.model, config.pretrain.image_size), label(config.model)
    check_training(architecture, config.pretrain, config.cluster.train, f"pretrain ({name})")
    check_vocabulary(config.tokenizer, architecture, config.model)
    check_roles(config, architecture)
    check_tasks(config, architecture)
    check_momentum(config)
    check_policy(config)
    if config.final and not config.rounds:
        raise RecipeError("final is what the last round pretrains, and rounds is 0: set rounds to 1 or more.")
    final = check_final(config.final, architecture, name, config.cluster.train)
    for number, (stage, stage_architecture) in enumerate(zip(config.final, final, strict=True)):
        if not isinstance(stage.language, TeachConfig):  # of which the tokenizer is not made yet
            check_vocabulary(
                stage.language or config.tokenizer, stage_architecture, stage.model, f"final.{number}.model"
            )
    return architecture, final


def check_policy(config: BootstrapConfig) -> None:
    """Refuse a policy that could decide nothing after the annotations of a round are there. RecipeError."""
    policy = config.select
    policy.rules.check()
    made = [name_of(text) for text in config.annotate.scores]
    check_further(
        policy.used_scores, made, "a round", "Say how it is made: annotate.scores=[SPEC, ...] (docs/scores.md)."
    )
    if policy.threshold != "calibrated":
        return
    check_calibrated(policy.score)
    if config.rounds and not config.data.has("val"):
        raise RecipeError(
            'select.threshold is "calibrated", which needs validation pairs: give data.val,'
            " or set select.threshold to a number such as 0.5."
        )


def warnings_of_lengths(config: BootstrapConfig, architecture: Architecture) -> Iterator[str]:
    """The keys that allow texts for which a model that the recipe trains has no positions."""
    yield from length_warnings(architecture, lengths_of(config))
    for role, section in config.separate.items():
        name = f"{label(section.model)} ({role}.model)"
        yield from length_warnings(separate_architecture(section), lengths_of(config, role), name)


def lengths_of(config: BootstrapConfig, role: ModelRole | None = None) -> dict[str, int]:
    """The tokens that a text of `model` may have, or of the separate model of a role, by the key that says so."""
    written = {"captioner": "annotate.decode.max_length", "filter": "annotate.max_length"}
    values = {"captioner": config.annotate.decode.max_length, "filter": config.annotate.max_length}
    trained = {key: train for key, train in config.trainings.items() if config.separate_role(key) == role}
    lengths = {f"{key}.loader.max_length": train.loader.max_length for key, train in trained.items()}
    lengths |= {written[key]: values[key] for key in written if key in trained}
    return lengths if role else lengths | {"evaluate.decode.max_length": config.evaluate.decode.max_length}


def texts_of(config: BootstrapConfig) -> list[Texts]:
    """The texts that the recipe names; none of the embedded world, whose tokenizer knows its words, and none that are
    not yet downloaded. Of the lengths those of trainings with the recipe's tokenizer."""
    other = {role for role, section in config.separate.items() if section.tokenizer is not None}
    trained = {key: train for key, train in config.trainings.items() if config.separate_role(key) not in other}
    lengths = {f"{key}.loader.max_length": train.loader.max_length for key, train in trained.items()}
    pretraining = {key: length for key, length in lengths.items() if "pretrain." in key}
    named = ((f"data.{split}", getattr(config.data, split)) for split in ("web", "human"))
    return [Texts(key, spec, pretraining if key == "data.web" else lengths) for key, spec in named if spec is not None]


def check_momentum(config: BootstrapConfig) -> None:
    """Refuse a training that would resume a momentum copy that no training has kept."""
    if config.pretrain.objectives.resumes_momentum:
        raise RecipeError(
            "pretrain.objectives.momentum_from is 'start', and round 0 starts from nothing: take 'model'."
        )
    filter_training = config.trainings.get("filter")
    if filter_training is None or not filter_training.objectives.resumes_momentum:
        return
    separate = config.separate.get("filter")
    if separate is None:
        key, pretraining = "pretrain", config.pretrain
    elif separate.pretrain is not None:
        key, pretraining = "filter.pretrain", separate.pretrain
    else:
        return  # whether the start has kept it shows when it is opened
    if not pretraining.keep_momentum:
        raise RecipeError(f"filter.objectives.momentum_from is 'start': set {key}.keep_momentum=true, or take 'model'.")


def check_final(
    stages: Sequence[StageConfig], first: Architecture, first_name: str, resources: TrainResources
) -> tuple[Architecture, ...]:
    """Check the stages of `final` against each other and against `first`, the model that the rounds before pretrain.

    Returns their architectures. Raises RecipeError.
    """
    architectures: list[Architecture] = []
    for number, stage in enumerate(stages):
        where = f"final.{number} ({label(stage.model)})"
        architecture = architecture_of(stage.model, stage.train.image_size)
        if architecture.family != "blip2":
            raise RecipeError(
                f"{where}: a stage is a BLIP-2, and this is of the family {architecture.family}; set `model`."
            )
        check_training(architecture, stage.train, resources, where)
        check_language(stage, architecture, where)
        if number:
            if stage.vision or stage.text:
                raise RecipeError(
                    f"{where}: it begins with what the stage before left; vision and text are of final.0."
                )
            check_shape(architectures[-1], architecture, f"final.{number - 1}", where, ("vision", "text"))
        elif stage.vision is None:
            whose = f"the newest {first_name}, whose vision tower it takes unless `vision` is given,"
            check_shape(first, architecture, whose, where)
        architectures.append(architecture)
    return tuple(architectures)


def check_language(stage: StageConfig, architecture: Architecture, where: str) -> None:
    """Refuse a language model that is given but not used, that is missing, or that cannot be trained here."""
    kind = architecture.language_kind
    if kind is None:
        if stage.language is not None:
            raise RecipeError(f"{where}: `language` is given, and the model has none: leave it out.")
    elif stage.language is None:
        raise RecipeError(
            f"{where} has a frozen language model: say which with `language`, a folder or a name on the Hugging Face"
            " hub, or let a small one be trained with language.steps."
        )
    elif isinstance(stage.language, TeachConfig) and kind != "opt":
        raise RecipeError(
            f"{where}: a language model that is trained here is an OPT, and this is a {kind.upper()};"
            " give `language` a folder or a name on the Hugging Face hub."
        )


def check_files(config: BootstrapConfig, architecture: Architecture, final: Sequence[Architecture]) -> None:
    """Refuse prompts that leave no room for a text, and checkpoints and scorers that are not there."""
    for spec in score_specs(config.annotate.scores):
        spec.check()
    check_sources(config.initial, architecture)
    for stage, stage_architecture in zip(config.final, final, strict=True):
        language = stage.language if isinstance(stage.language, str) else None
        check_sources(InitialConfig(vision=stage.vision, text=stage.text, language=language), stage_architecture)
    check_prompts(config.tokenizer, architecture, {"pretrain": config.pretrain.loader}, [config.evaluate.decode])
