"""VQA, NLVR2 and entailment: figures of the models' own answers, asked one by one, and rows with faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from row_shards import picture, write_shard
from torch import Tensor

from capfilt.data import shards
from capfilt.data.images import decode
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import Sample
from capfilt.data.tasks import ENTAILMENT_LABELS
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.errors import DataError, RecipeError
from capfilt.evaluation.metrics import vqa as measures
from capfilt.evaluation.tasks import TASKS, Measured, check_task
from capfilt.inference import answers
from capfilt.inference.local_model import LocalModel
from capfilt.models import architecture_of, build, preprocess_of
from capfilt.models.blip.config import BlipConfig
from capfilt.models.checkpoints import store
from capfilt.models.heads.config import ClassifierConfig

CPU = torch.device("cpu")


def local(architecture: Any) -> LocalModel:
    """A model of random weights, wide enough that its answers differ."""
    torch.manual_seed(1)
    model = build(architecture).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    return LocalModel(model, tokenizer_of("world", architecture.tokenizer_kind), preprocess_of(architecture))


def classifier(base: str, labels: tuple[str, ...], images: int = 1) -> LocalModel:
    return local(ClassifierConfig.model_validate({"base": base, "labels": labels, "images": images}))


def measure(model: LocalModel, task: str, *urls: str, **settings: Any) -> Measured:
    return TASKS[task].model_validate({"batch_size": 3, **settings}).measure(model, urls, CPU)


def pixels(image_format: ImageFormat, data: bytes) -> Tensor:
    stacked = image_format.preprocess.stack([image_format.to_pixels(decode.decode(data))])
    return image_format.preprocess.normalise(stacked)


def read(*specs: Path | str) -> list[Sample]:
    urls = [url for one in specs for url in shards.expand(str(one))]
    return [one for url in urls for one in shards.read(url, extras=True) if isinstance(one, Sample)]


@pytest.mark.parametrize("kind", ["classes", "list", "written"])
def test_vqa_scores_the_model_s_answer_to_each_question(kind: str, task_shards: Path, tmp_path: Path) -> None:
    listed = ("red", "a ring", "gray", "two")
    if kind == "classes":
        model = classifier("vlmo/tiny", listed)
    else:
        architecture = architecture_of("blip/tiny-answers")
        assert isinstance(architecture, BlipConfig)
        model = local(architecture.with_answers(listed))
    urls = shards.expand(str(task_shards))[: 1 if kind == "written" else 2]
    measured = measure(model, "vqa", *urls, write=kind == "written")
    wanted, references = [], []
    for sample in read(*urls):
        for row in sample.meta["questions"]:
            image = pixels(model.image_format, sample.image)
            wanted += answers.answer(model, image, [row["question"]], [0], () if kind == "written" else None)
            references.append(row.get("answers", ()))
    figures = measured.figures["vqa"]
    expected = measures.accuracy(wanted, references) | measures.best_constants(references)
    assert {name: figures[name] for name in expected} == expected
    assert (measured.figures["rows"], figures["without_answers"]) == (len(wanted), len(wanted) // 2)
    asked = [row for row in references if row]
    outside = sum("red" not in row and "gray" not in row and "a ring" not in row for row in asked)
    assert figures.get("outside") == (None if kind == "written" else outside)
    assert measured.write_answers is not None
    measured.write_answers(tmp_path / "answers.json")
    rows = json.loads((tmp_path / "answers.json").read_text())
    assert rows == [{"question_id": number, "answer": text} for number, text in enumerate(wanted)]


@pytest.mark.parametrize("base", ["blip/tiny", "vilt/tiny"])
def test_nlvr2_reads_both_pictures_of_each_statement(base: str, task_shards: Path) -> None:
    model = classifier(base, ("true", "false"), images=2)
    figures = measure(model, "nlvr2", *shards.expand(str(task_shards))).figures
    right, consistent = 0, 0
    for sample in read(task_shards):
        (other,) = sample.extras.values()
        both = torch.cat([pixels(model.image_format, data) for data in (sample.image, other)])
        said = [answers.classify(model, both, [row["text"]], [0])[0].argmax() == 0 for row in sample.meta["statements"]]
        hits = [bool(one) == row["label"] for one, row in zip(said, sample.meta["statements"], strict=True)]
        right, consistent = right + sum(hits), consistent + all(hits)
    assert figures["rows"] == figures["nlvr2"]["statements"] == 64
    assert figures["nlvr2"]["accuracy"] == pytest.approx(100 * right / 64)
    assert figures["nlvr2"]["consistency"] == pytest.approx(100 * consistent / 32)
    assert figures["nlvr2"]["majority"] == 50


def test_of_two_pictures_one_may_be_broken_or_absent(tmp_path: Path) -> None:
    def statement(number: int, **fields: Any) -> dict[str, Any]:
        return {"statements": [{"id": number, "text": "a ring", **fields}]}

    model = classifier("blip/tiny", ("false", "true"), images=2)
    url = write_shard(
        tmp_path / "00000.tar",
        {"json": statement(0, label=True), "right.png": picture(9)},
        {"json": statement(1, label=True), "right.png": b"broken"},
        {"json": statement(2, label=True)},
        {"json": statement(3, label="true"), "right.png": picture(9)},
        {"json": statement(4, label=False), "right.png": picture(9), "png": b"broken"},
        {"json": statement(5), "right.png": picture(9)},
        {"json": statement(0, label=True), "right.png": picture(9)},
    )
    figures = measure(model, "nlvr2", url).figures
    assert (figures["rows"], figures["nlvr2"]["statements"], figures["nlvr2"]["unlabelled"]) == (7, 1, 1)
    assert figures["left_out"] == {
        "picture: not an image": 2,
        "there is no right picture": 1,
        "label is ...": 1,
        "its id comes twice": 1,
    }


def test_entailment_has_three_classes_in_whatever_order(task_shards: Path, tmp_path: Path) -> None:
    labels = ("contradiction", "entailment", "neutral")
    model = classifier("albef/tiny", labels)
    figures = measure(model, "entailment", *shards.expand(str(task_shards))).figures
    hits: dict[str, list[bool]] = {label: [] for label in labels}
    for sample in read(task_shards):
        for row in sample.meta["hypotheses"]:
            likely = answers.classify(model, pixels(model.image_format, sample.image), [row["text"]], [0])
            hits[row["label"]].append(labels[int(likely[0].argmax())] == row["label"])
    every = [hit for of_label in hits.values() for hit in of_label]
    assert figures["entailment"]["top1"] == pytest.approx(100 * sum(every) / 64)
    assert figures["entailment"]["contradiction"] == pytest.approx(100 * sum(hits["contradiction"]) / 32)
    assert "neutral" not in figures["entailment"]
    with pytest.raises(DataError, match="none of 1 rows of this task can be used, mostly: label is"):
        wrong = {"id": 1, "text": "a ring", "label": "Neutral"}
        measure(model, "entailment", write_shard(tmp_path / "00000.tar", {"json": {"hypotheses": [wrong]}}))


MODELS: dict[str, tuple[Any, set[str]]] = {
    "clip": ("clip/tiny", {"retrieval", "classification"}),
    "blip": ("blip/tiny", {"retrieval", "captioning", "classification", "grounding", "dialog"}),
    "a captioner": ("blip/base-captioner", {"captioning", "dialog"}),
    "albef": ("albef/tiny", {"retrieval", "classification", "grounding", "dialog"}),
    "vilt": ("vilt/tiny", {"retrieval", "dialog"}),
    "vlmo": ("vlmo/tiny", {"retrieval", "classification", "dialog"}),
    "xvlm": ("xvlm/tiny", {"retrieval", "classification", "grounding", "dialog"}),
    "answers": ("blip/tiny-answers", {"vqa"}),
    "entailment": ({"base": "vilt/tiny", "labels": ENTAILMENT_LABELS}, {"entailment"}),
    "pairs": ({"base": "vilt/tiny", "labels": ("true", "false"), "images": 2}, {"nlvr2"}),
    "classes": ({"base": "vilt/tiny", "labels": ("red", "two")}, {"vqa"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_refused_for_all_other_tasks_before_it_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described, able = MODELS[name]
    architecture = (
        architecture_of(described) if isinstance(described, str) else ClassifierConfig.model_validate(described)
    )
    monkeypatch.setattr(store, "architecture", lambda _: architecture)
    assert {task for task, one in TASKS.items() if one.can(architecture)} == able & TASKS.keys()
    for task in TASKS.keys() - able:
        with pytest.raises(RecipeError, match=f"nowhere cannot be evaluated for {task}: that needs "):
            check_task(Path("nowhere"), TASKS[task](task=task))
