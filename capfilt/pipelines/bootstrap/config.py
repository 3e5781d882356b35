"""The recipe of `capfilt bootstrap`.

Its dump is the run's `recipe.yaml` and the core of `plan.json`: a renamed field would refuse every existing run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from capfilt import presets
from capfilt.cluster.worker_pool import Resources
from capfilt.config import Config, added
from capfilt.data.policy import PolicyConfig
from capfilt.evaluation.config import EvaluateConfig
from capfilt.inference.config import AnnotateConfig
from capfilt.models import ModelSection
from capfilt.models.architecture import ModelRole
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.pipelines.bootstrap.pool.data import DataConfig, Shards
from capfilt.pipelines.finetune import FinetuneConfig
from capfilt.recipe_tree import read_section
from capfilt.storage.paths import StoragePath
from capfilt.training.config import TeachCaptionerConfig, TeachConfig, TrainConfig, TrainResources


class ClusterConfig(Config):
    """The resources that the stages request of the cluster; a resumed run may request others.

    Annotations do not depend on them, except on the kind of device (docs/promises.md). The results of a training do a
    little: ITM draws its negatives within a process, as BLIP does.
    """

    train: TrainResources = TrainResources()
    """The processes of a pretraining, also of the stages of `final`."""
    finetune: TrainResources = TrainResources()
    """The processes that fine-tune a captioner or a filter."""
    annotate: Resources = Resources()
    """One worker that holds captioner and filter: give it a GPU where there is one."""
    select: Resources = Resources()
    """One worker that reads and writes shards; no accelerator."""


class StageConfig(Config):
    """One stage of `final`."""

    model: ModelSection
    """A preset of `models/blip2/`, a YAML, or an architecture with the keys of one; `extends` in it names what it is
    laid over."""
    vision: str | None = None
    """First stage only: the frozen tower, as `initial.vision` of a pretraining. None: the newest model's tower."""
    text: str | None = None
    """First stage only: the Q-Former's initial weights, as `initial.text`. None: fresh."""
    language: str | TeachConfig | None = None
    """For a model with a language model: a folder of transformers, a name on the hub, or how a small one is trained on
    the texts of this round."""
    train: TrainConfig
    """How this stage is trained."""


class PretrainedConfig(Config):
    """A captioner or a filter that is used as it is in every round; nothing is trained."""

    pretrained: str
    """A model folder, a `.pth` of BLIP, or a name on the Hugging Face hub: what `capfilt annotate` takes; a captioner
    may be `hf:` or `openai:` too (docs/captioners.md). `endpoint: URL#MODEL` stands for `openai:URL#MODEL`."""

    @model_validator(mode="before")
    @classmethod
    def _endpoint(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("endpoint"), str) and given.keys() == {"endpoint"}:
            return {"pretrained": f"openai:{given['endpoint']}"}
        return given


class TaughtConfig(Config):
    """A captioner that is a vision-language model of transformers, fine-tuned on the human pairs once for a run."""

    teach: TeachCaptionerConfig
    """What it begins with and how it learns."""


class SeparateConfig(TrainConfig):
    """A captioner or a filter of another architecture than what the rounds pretrain: an ALBEF that filters beside a
    BLIP. In every round it is pretrained if `pretrain` is given, and then fine-tuned on the human pairs."""

    model: ModelSection
    """A preset of `models/`, a YAML, or an architecture, as the recipe's `model`."""
    tokenizer: str | None = None
    """As the recipe's `tokenizer`, which null stands for."""
    initial: InitialConfig = InitialConfig()
    """The initial weights of its towers."""
    start: StoragePath | None = None
    """A model folder to begin with instead, in every round."""
    pretrain: TrainConfig | None = None
    """Its pretraining, on the pairs that the round before pretrained on: in round 1 the uncleaned web. null: none."""

    @model_validator(mode="after")
    def _one_beginning(self) -> SeparateConfig:
        if self.start is not None and self.initial.model_copy(update={"language": None}) != InitialConfig():
            raise ValueError("start and initial both say what a model begins with; give one of them")
        return self

    @property
    def finetune(self) -> TrainConfig:
        """The fine-tuning alone."""
        return TrainConfig(**{name: getattr(self, name) for name in TrainConfig.model_fields})


def _kind_of_source(given: Any) -> str:
    """The class of a role's section; one that names no other source is a fine-tuning."""
    others = {
        "pretrained": PretrainedConfig,
        "endpoint": PretrainedConfig,
        "teach": TaughtConfig,
        "model": SeparateConfig,
    }
    if not isinstance(given, dict):
        return type(given).__name__ if type(given) in others.values() else TrainConfig.__name__
    return next((kind.__name__ for key, kind in others.items() if key in given), TrainConfig.__name__)


RoleConfig = Annotated[
    Annotated[TrainConfig, Tag("TrainConfig")]
    | Annotated[PretrainedConfig, Tag("PretrainedConfig")]
    | Annotated[TaughtConfig, Tag("TaughtConfig")]
    | Annotated[SeparateConfig, Tag("SeparateConfig")],
    Discriminator(_kind_of_source),
]
"""Where a captioner or a filter comes from: `roles.sources.SOURCES` has the code of each class."""


class TaskTraining(Config):
    """What of a recipe of `capfilt finetune` is the same in every round."""

    model: ModelSection
    """A head, whose base becomes the model of the round."""
    train: TrainConfig
    """How it is trained."""


def _task_training(given: Any) -> Any:
    """The model and the training of the preset or YAML that is named, or that the section extends."""
    if isinstance(given, str):
        given = {"extends": given}
    if not isinstance(given, Mapping) or "extends" not in given:
        return given
    if others := given.keys() - {"extends", *TaskTraining.model_fields}:
        raise ValueError(f"found {', '.join(sorted(others))}; of a recipe of finetune it has model and train alone")
    whole = read_section(given, FinetuneConfig)
    return {name: whole[name] for name in TaskTraining.model_fields if name in whole}


class TaskConfig(Config):
    """A downstream task (docs/tasks.md)."""

    task: str
    """vqa, nlvr2, entailment, grounding, dialog, classification, retrieval or captioning."""
    finetune: Annotated[TaskTraining | None, BeforeValidator(_task_training)] = None
    """How each round's model is trained for it: a preset of `pipelines/finetune/`, a YAML, or `extends` with `model` or
    `train` otherwise. null: it is measured as it is."""
    train: Shards | None = None
    """Shards to train on; null: the embedded world's."""
    test: Shards | None = None
    """Shards to measure on; null: the embedded world's."""


def _task(given: Any) -> Any:
    """A task's name alone: trained as the preset `finetune/TASK-tiny` says, where there is one."""
    if not isinstance(given, str):
        return given
    usual = f"{given}-tiny"
    return {"task": given} | ({"finetune": usual} if f"finetune/{usual}" in presets.names("pipelines") else {})


class RoundAnnotateConfig(AnnotateConfig):
    """How the texts of each round are written and scored."""

    scores: tuple[str, ...] = added(())
    """Scores beside itm and itc, as `annotate --scores` takes them: `[side, sieve=ENCODER_FOLDER]`. What `select` names
    must be here."""

    @property
    def whole(self) -> AnnotateConfig:
        """The same without the scores, which lie beside the annotations."""
        given = self.model_fields_set & AnnotateConfig.model_fields.keys()  # what is a default stays one
        return AnnotateConfig(**{name: getattr(self, name) for name in given})


class RoundEvaluateConfig(EvaluateConfig):
    """How the model of each round is examined."""

    tasks: tuple[Annotated[TaskConfig, BeforeValidator(_task)], ...] = added(())
    """Downstream tasks that each round's model is measured on: names, of which each is trained as
    the recipe `finetune/TASK-tiny` says where there is one, or sections. They may be added to a finished run."""

    @property
    def whole(self) -> EvaluateConfig:
        """The same without the tasks."""
        return EvaluateConfig(**{name: getattr(self, name) for name in EvaluateConfig.model_fields})


class BootstrapConfig(Config):
    """A recipe of `capfilt bootstrap`."""

    folder: ClassVar[str] = "bootstrap"
    alternatives: ClassVar[frozenset[str]] = frozenset({"pretrained", "endpoint", "teach", "task"})
    named_sections: ClassVar[frozenset[str]] = frozenset({"model"})

    seed: int = 0
    """Decides every random draw of the run."""
    rounds: int = Field(default=2, ge=0)
    """Rounds of CapFilt after round 0, the pretraining on the uncleaned web. A run may be given more of them later."""
    data: DataConfig
    model: ModelSection
    """A preset of `models/`, a YAML, or an architecture with the keys of one; `extends` in it names what it is laid
    over."""
    tokenizer: str = "world"
    """"world", or a folder or file with a BERT vocabulary."""
    human_repeat: int = Field(default=1, ge=1)
    """How often an epoch of pretraining reads the human pairs."""
    initial: InitialConfig = InitialConfig()
    """The initial weights of a new model's towers; the paper: an ImageNet ViT and BERT (BLIP, section 4.1)."""
    start: Literal["scratch", "continue"] = "scratch"
    """What a round pretrains: a new model (the paper's choice, Table 13), or the newest one further."""
    pretrain: TrainConfig
    """The pretraining of each round, as long in every one."""
    final: tuple[StageConfig, ...] = ()
    """What the last round pretrains in place of `model`: a BLIP-2, stage by stage. Round 0 always pretrains `model`."""
    captioner: RoleConfig
    """The training that makes a captioner of each round's newest model; or of a `model` of another architecture; or
    `pretrained`: a model that is there; or `endpoint`: a server; or `teach`: a vision-language model of transformers
    that is fine-tuned once."""
    filter: RoleConfig
    """As `captioner`, but for `endpoint` and `teach`."""
    annotate: RoundAnnotateConfig = RoundAnnotateConfig()
    """How texts are written and scored."""
    select: PolicyConfig = PolicyConfig()
    """Which texts are kept."""
    evaluate: RoundEvaluateConfig = RoundEvaluateConfig()
    """How the model of each round is examined."""
    cluster: ClusterConfig = ClusterConfig()
    """What the stages request of the cluster."""

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """The trainings of a round by the key of each: `pretrain`, and the roles that are fine-tuned."""
        sections = {"pretrain": self.pretrain, "captioner": self.captioner, "filter": self.filter}
        trainings = {key: section for key, section in sections.items() if isinstance(section, TrainConfig)}
        own = ((f"{role}.pretrain", section.pretrain) for role, section in self.separate.items())
        return trainings | {key: section for key, section in own if section is not None}

    def separate_role(self, training: str) -> ModelRole | None:
        """The role whose separate model one of `trainings` trains; None: it trains `model`."""
        return next((role for role in self.separate if training.partition(".")[0] == role), None)

    @property
    def separate(self) -> dict[ModelRole, SeparateConfig]:
        """The roles that models of another architecture play, trained in every round."""
        sections: dict[ModelRole, Any] = {"captioner": self.captioner, "filter": self.filter}
        return {role: section for role, section in sections.items() if isinstance(section, SeparateConfig)}
