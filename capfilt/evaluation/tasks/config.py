"""How a model is evaluated for each task: configs, checked without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from capfilt.config import Config, added
from capfilt.data.tasks import read_classes
from capfilt.errors import DataError, RecipeError
from capfilt.evaluation.config import EvaluateConfig
from capfilt.inference.config import DecodeConfig, Precision
from capfilt.objectives.kinds.downstream import FAMILIES_OF
from capfilt.storage.paths import storage_path

if TYPE_CHECKING:
    from capfilt.models.architecture import ArchitectureConfig
    from capfilt.storage.paths import StoragePath


class TaskEvalConfig(Config):
    """What evaluations of all tasks have alike."""

    task: str
    """Which it is; each config allows one."""
    batch_size: int = Field(default=64, ge=1)
    """Images at a time."""
    precision: Precision = added("auto")
    """As of `annotate`: bf16 where all workers have GPUs that multiply it in hardware, fp32 on CPUs."""

    def with_data(self, urls: Sequence[str]) -> Self:
        """The same with what lies beside the shards, as far as it is not given. DataError where that cannot be read."""
        return self

    def check_architecture(self, model: StoragePath, architecture: ArchitectureConfig) -> None:
        """Refuse a model that can do the task but not so; `model` is how a person knows it. CapfiltError."""


class RetrievalEvalConfig(TaskEvalConfig):
    """Human texts found among all texts, images among all images."""

    task: Literal["retrieval"] = "retrieval"
    rerank: int = Field(default=0, ge=0)
    """Re-score so many ITC candidates with ITM (BLIP: 256 on COCO); 0 = cosines alone."""
    itm_pairs: int = Field(default=1_000_000, ge=0)
    """Of a filter without cosines: the most pairs of an image and a text that are read."""

    def whole(self) -> EvaluateConfig:
        """The settings of the evaluation of which this task is a part."""
        return EvaluateConfig(rerank=self.rerank, itm_pairs=self.itm_pairs, batch_size=self.batch_size)


class CaptioningEvalConfig(TaskEvalConfig):
    """Texts that the model writes, beside human ones."""

    task: Literal["captioning"] = "captioning"
    decode: DecodeConfig = DecodeConfig(method="greedy")
    """How captions are written."""


class ClassificationEvalConfig(TaskEvalConfig):
    """Zero-shot: the class whose prompts, averaged, are nearest to the image (CLIP section 3.1)."""

    task: Literal["classification"] = "classification"
    classes: tuple[str, ...] = ()
    """The classes, as prompts spell them; none: those of the file beside the shards (docs/tasks.md)."""
    templates: tuple[str, ...] = ()
    """Prompts, each with one {} for the class; none: those of the file beside the shards, or "a photo of a {}."."""

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

    @staticmethod
    def can(architecture: ArchitectureConfig) -> bool:
        """Whether a model can rank in one way or the other."""
        return architecture.family in FAMILIES_OF["dialog"] and bool({"fuse", "decode"} & architecture.capabilities)

    def by_match(self, architecture: ArchitectureConfig) -> bool:
        """Whether candidates are ranked by the head that matches."""
        return self.by == "match" or (self.by == "auto" and "fuse" in architecture.capabilities)


class VqaEvalConfig(TaskEvalConfig):
    """Answers to questions about a picture, by VQAv2's rule."""

    task: Literal["vqa"] = "vqa"
    write: bool = False
    """Whether a decoder writes its answers freely, also where it has a list to choose from."""
    ranked: int = Field(default=128, ge=1)
    """How many answers of the list, by their first token, a decoder scores as a whole (BLIP, ALBEF and X-VLM: 128)."""

    def check_architecture(self, model: StoragePath, architecture: ArchitectureConfig) -> None:
        """Refuse free answers of a classifier. CapfiltError."""
        if self.write and "answer" not in architecture.capabilities:
            raise RecipeError(f"{model} chooses among its classes and cannot write an answer: set write=false")


class Nlvr2EvalConfig(TaskEvalConfig):
    """Statements about two pictures, true or false."""

    task: Literal["nlvr2"] = "nlvr2"


class EntailmentEvalConfig(TaskEvalConfig):
    """What a picture says of a hypothesis: entailment, neutral or contradiction."""

    task: Literal["entailment"] = "entailment"
