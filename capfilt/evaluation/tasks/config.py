"""How a model is evaluated for each task, and what is known of the task before torch is imported."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field

from capfilt.config import Config, added
from capfilt.data.loading.task_texts import TRUE_FALSE
from capfilt.data.tasks import ENTAILMENT_LABELS, read_classes
from capfilt.errors import DataError, RecipeError
from capfilt.evaluation.config import EvaluateConfig
from capfilt.inference.config import DecodeConfig, Precision
from capfilt.inference.roles import lacking
from capfilt.objectives.kinds.downstream import FAMILIES_OF
from capfilt.storage.paths import storage_path

if TYPE_CHECKING:
    import torch

    from capfilt.evaluation.tasks import Measured
    from capfilt.inference.local_model import LocalModel
    from capfilt.models.architecture import ArchitectureConfig
    from capfilt.storage.paths import StoragePath


class TaskEvalConfig(Config):
    """What evaluations of all tasks have alike."""

    code: ClassVar[str]
    """The function that measures it: MODULE.FUNCTION of this package."""
    needs: ClassVar[str]
    """What of a model the task needs, and which models have that, as the end of a sentence."""
    has_answers: ClassVar[bool] = False
    """Whether there is a result file for the task's server."""

    task: str
    """Which it is; each config allows one."""
    batch_size: int = Field(default=64, ge=1)
    """Images at a time."""
    precision: Precision = added("auto")
    """As of `annotate`: bf16 where all workers have GPUs that multiply it in hardware, fp32 on CPUs."""

    @classmethod
    @abstractmethod
    def can(cls, architecture: ArchitectureConfig) -> bool:
        """Whether a model of this architecture can do it."""

    def with_data(self, urls: Sequence[str]) -> Self:
        """The same with what lies beside the shards, as far as it is not given. DataError where that cannot be read."""
        return self

    def check_architecture(self, model: StoragePath, architecture: ArchitectureConfig) -> None:
        """Refuse a model that can do the task but not so; `model` is how a person knows it. CapfiltError."""

    def measure(self, local: LocalModel, urls: Sequence[str], device: torch.device) -> Measured:
        """Evaluate a model on shards. DataError where nothing can be measured."""
        module, _, function = self.code.partition(".")
        measured: Measured = getattr(import_module(f"capfilt.evaluation.tasks.{module}"), function)(
            local, urls, self, device
        )
        return measured


class RetrievalEvalConfig(TaskEvalConfig):
    """Human texts found among all texts, images among all images."""

    code: ClassVar[str] = "pairs.measure_retrieval"
    needs: ClassVar[str] = "a filter: a model that encodes texts, or fuses them with images"

    task: Literal["retrieval"] = "retrieval"
    rerank: int = Field(default=0, ge=0)
    """Re-score so many ITC candidates with ITM (BLIP: 256 on COCO); 0 = cosines alone."""
    itm_pairs: int = Field(default=1_000_000, ge=0)
    """Of a filter without cosines: the most pairs of an image and a text that are read."""

    @classmethod
    def can(cls, architecture: ArchitectureConfig) -> bool:
        return not lacking("filter", architecture.capabilities)

    def whole(self) -> EvaluateConfig:
        """The settings of the evaluation of which this task is a part."""
        return EvaluateConfig(rerank=self.rerank, itm_pairs=self.itm_pairs, batch_size=self.batch_size)


class CaptioningEvalConfig(TaskEvalConfig):
    """Texts that the model writes, beside human ones."""

    code: ClassVar[str] = "pairs.measure_captioning"
    needs: ClassVar[str] = "a captioner: a model that decodes (blip, blip2, xvlm)"

    task: Literal["captioning"] = "captioning"
    decode: DecodeConfig = DecodeConfig(method="greedy")
    """How captions are written."""

    @classmethod
    def can(cls, architecture: ArchitectureConfig) -> bool:
        return not lacking("captioner", architecture.capabilities)


class ClassificationEvalConfig(TaskEvalConfig):
    """Zero-shot: the class whose prompts, averaged, are nearest to the image (CLIP section 3.1)."""

    code: ClassVar[str] = "classification.measure"
    needs: ClassVar[str] = "a cosine between images and texts (clip, blip, albef, xvlm, vlmo, blip2's first stage)"

    task: Literal["classification"] = "classification"
    classes: tuple[str, ...] = ()
    """The classes, as prompts spell them; none: those of the file beside the shards (docs/tasks.md)."""
    templates: tuple[str, ...] = ()
    """Prompts, each with one {} for the class; none: those of the file beside the shards, or "a photo of a {}."."""

    @classmethod
    def can(cls, architecture: ArchitectureConfig) -> bool:
        return {"encode_image", "encode_text"} <= architecture.capabilities

    def with_data(self, urls: Sequence[str]) -> Self:
        """With the classes and templates that lie beside the shards. DataError: there are none, or several."""
        if self.classes and self.templates:
            return self
        folders = {storage_path(url).parent: url for url in urls}
        lists = {read_classes(url, self.classes, self.templates) for url in folders.values()}
        if len(lists) > 1:
            raise DataError(
                f"the shards of {len(folders)} folders have {len(lists)} different lists of classes or templates;"
                " evaluate them one by one, or give --classes and --templates."
            )
        (known,) = lists
        return self.model_copy(update={"classes": known.names, "templates": known.templates})


class GroundingEvalConfig(TaskEvalConfig):
    """Where in a picture a phrase is; a box is right that overlaps the annotated one by half (IoU >= 0.5)."""

    code: ClassVar[str] = "grounding.measure"
    needs: ClassVar[str] = (
        "a head for boxes (xvlm), or layers in which a text attends to a grid of patches (blip, albef, xvlm)"
    )

    task: Literal["grounding"] = "grounding"
    method: Literal["auto", "boxes", "heatmap"] = "auto"
    """boxes: by the model's head for boxes. heatmap: by Grad-CAM of P(match), the best of a sample's proposals, or
    without these the box around what is hot (ALBEF section 5, weakly supervised). auto: boxes, where it has one."""
    layer: int | None = Field(default=None, ge=0)
    """Heatmaps: whose attention is drawn; ALBEF: 8, X-VLM: 9. null: the architecture's usual one."""
    area_power: float = Field(default=0.5, ge=0)
    """Proposals: the heat in a box is divided by this power of its area (ALBEF, X-VLM: 0.5)."""
    hot: float = Field(default=0.5, gt=0, le=1)
    """Without proposals: the box goes around all of this share of the largest heat that hangs together with it."""

    @classmethod
    def can(cls, architecture: ArchitectureConfig) -> bool:
        return "ground" in architecture.capabilities or bool(architecture.fusion_layers)

    def check_architecture(self, model: StoragePath, architecture: ArchitectureConfig) -> None:
        if self.method == "boxes" and "ground" not in architecture.capabilities:
            raise RecipeError(f"{model} has no head for boxes: set method=heatmap")
        if not self.by_boxes(architecture):
            from capfilt.inference.heatmap import check_heatmap

            check_heatmap(model, architecture, self.layer)

    def by_boxes(self, architecture: ArchitectureConfig) -> bool:
        """Whether the model's head for boxes answers."""
        return self.method == "boxes" or (self.method == "auto" and "ground" in architecture.capabilities)


class DialogEvalConfig(TaskEvalConfig):
    """The candidate answers of rounds of dialogs, ranked."""

    code: ClassVar[str] = "dialog.measure"
    needs: ClassVar[str] = (
        "a head that matches texts with images (blip, albef, vilt, vlmo, xvlm), or a decoder (blip, xvlm)"
    )
    has_answers: ClassVar[bool] = True

    task: Literal["dialog"] = "dialog"
    by: Literal["auto", "match", "likelihood"] = "auto"
    """match: by the head that matches texts with images. likelihood: by how likely the decoder is to write a candidate.
    auto: match, where a model can; set it for a model that was fine-tuned to write answers."""
    max_length: int | None = Field(default=None, ge=8)
    """Tokens of caption, history, question and candidate; of longer ones the beginning goes. null: what the model
    reads."""

    def check_architecture(self, model: StoragePath, architecture: ArchitectureConfig) -> None:
        needs = {"match": "fuse", "likelihood": "decode"}
        if self.by in needs and needs[self.by] not in architecture.capabilities:
            other = next(by for by, capability in needs.items() if capability in architecture.capabilities)
            raise RecipeError(f"by is {self.by}, and {model} cannot {needs[self.by]}: set by={other}")

    @classmethod
    def can(cls, architecture: ArchitectureConfig) -> bool:
        """Whether a model can rank in one way or the other."""
        return architecture.family in FAMILIES_OF["dialog"] and bool({"fuse", "decode"} & architecture.capabilities)

    def by_match(self, architecture: ArchitectureConfig) -> bool:
        """Whether candidates are ranked by the head that matches."""
        return self.by == "match" or (self.by == "auto" and "fuse" in architecture.capabilities)


class VqaEvalConfig(TaskEvalConfig):
    """Answers to questions about a picture, by VQAv2's rule."""

    code: ClassVar[str] = "answering.measure_vqa"
    needs: ClassVar[str] = (
        "a model that answers questions (capfilt finetune vqa-tiny ...: blip, albef, vilt, vlmo, xvlm)"
    )
    has_answers: ClassVar[bool] = True

    task: Literal["vqa"] = "vqa"
    write: bool = False
    """Whether a decoder writes its answers freely, also where it has a list to choose from."""
    ranked: int = Field(default=128, ge=1)
    """How many answers of the list, by their first token, a decoder scores as a whole (BLIP, ALBEF and X-VLM: 128)."""

    @classmethod
    def can(cls, architecture: ArchitectureConfig) -> bool:
        """A classifier's classes are taken for answers unless they are entailment's."""
        classifies = "classify" in architecture.capabilities and architecture.pictures_of_text == 1
        return "answer" in architecture.capabilities or (classifies and not EntailmentEvalConfig.can(architecture))

    def check_architecture(self, model: StoragePath, architecture: ArchitectureConfig) -> None:
        """Refuse free answers of a classifier. CapfiltError."""
        if self.write and "answer" not in architecture.capabilities:
            raise RecipeError(f"{model} chooses among its classes and cannot write an answer: set write=false")


class Nlvr2EvalConfig(TaskEvalConfig):
    """Statements about two pictures, true or false."""

    code: ClassVar[str] = "answering.measure_nlvr2"
    needs: ClassVar[str] = (
        "a classifier of two pictures with the classes true and false (capfilt finetune nlvr2-tiny ...: blip, albef, "
        "vilt, vlmo, xvlm)"
    )

    task: Literal["nlvr2"] = "nlvr2"

    @classmethod
    def can(cls, architecture: ArchitectureConfig) -> bool:
        return _classifies(architecture, 2, TRUE_FALSE.values())


class EntailmentEvalConfig(TaskEvalConfig):
    """What a picture says of a hypothesis: entailment, neutral or contradiction."""

    code: ClassVar[str] = "answering.measure_entailment"
    needs: ClassVar[str] = (
        f"a classifier with the classes {', '.join(ENTAILMENT_LABELS)} (capfilt finetune entailment-tiny ...: blip, "
        "albef, vilt, vlmo, xvlm)"
    )

    task: Literal["entailment"] = "entailment"

    @classmethod
    def can(cls, architecture: ArchitectureConfig) -> bool:
        return _classifies(architecture, 1, ENTAILMENT_LABELS)


def _classifies(architecture: ArchitectureConfig, pictures: int, labels: Iterable[str]) -> bool:
    """Whether a model has just these classes, for texts beside so many pictures."""
    classifies = "classify" in architecture.capabilities and architecture.pictures_of_text == pictures
    return classifies and set(architecture.known_answers or ()) == set(labels)
