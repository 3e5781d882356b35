"""Downstream tasks: losses written out, two ranks as one process, and the table of who can do what."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.task_rows import loader_of
from capfilt.data.loading.task_texts import count_answers
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.errors import RecipeError
from capfilt.models import FAMILIES, ArchitectureConfig, architecture_of, build
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.models.heads.config import AnswererConfig, ClassifierConfig
from capfilt.objectives.interface import ClassBatch, Task
from capfilt.objectives.kinds import TaskConfig
from capfilt.objectives.kinds.classify import (
    AssignObjectives,
    EntailmentObjectives,
    NlvrObjectives,
    VqaClassesObjectives,
)
from capfilt.objectives.kinds.downstream import FAMILIES_OF, DialogObjectives, VqaObjectives
from capfilt.objectives.tasks import build_task, unsupported
from capfilt.objectives.tasks.classify import Assignment, other_pictures
from capfilt.stages.train import check_start
from capfilt.training.config import OptimizerConfig
from capfilt.training.optimizer import make_optimizer

LABELS = ("entailment", "neutral", "contradiction")


def classifier(base: str = "blip/tiny", **settings: Any) -> ClassifierConfig:
    return ClassifierConfig.model_validate({"base": base, "labels": LABELS} | settings)


def task_of(architecture: ArchitectureConfig, config: TaskConfig) -> Task:
    torch.manual_seed(0)
    return build_task(build(architecture), config).double()


def loaded(task: Task, shards: Path, rank: int = 0, world_size: int = 1) -> Any:
    """The first batch of a rank, as the task is given it, in float64."""
    config = LoaderConfig(batch_size=4, max_length=16, shuffle=1, lanes=2)
    architecture = task.model.config
    tokenizer = tokenizer_of("world", architecture.tokenizer_kind)
    sources = [Source(shards=str(shards))]
    kind = task.config.row_kind
    loader = loader_of(kind, sources, config, tokenizer, architecture.image_size, 0, rank, world_size)
    batch = task.batch_of(next(loader.batches()))
    return type(batch)(*(x.double() if x.is_floating_point() else x for x in batch))


def pair(base: str) -> ClassifierConfig:
    return classifier(base, labels=("false", "true"), images=2)


ANSWERS = ("ring", "a ring", "red")
CASES: dict[str, tuple[ArchitectureConfig, TaskConfig]] = {
    "entailment, distilled": (classifier("albef/tiny"), EntailmentObjectives(alpha=0.4)),
    "vqa of blip": (architecture_of("blip/tiny-answers"), VqaObjectives()),
    "vqa of albef": (AnswererConfig.model_validate({"base": "albef/tiny"}), VqaObjectives(alpha=0.4, smoothing=0.0)),
    "vqa by classes": (classifier("vilt/tiny", labels=ANSWERS), VqaClassesObjectives()),
    "nlvr2 of blip": (pair("blip/tiny"), NlvrObjectives()),
    "nlvr2 of xvlm": (pair("xvlm/tiny"), NlvrObjectives()),
    "nlvr2 of vlmo": (pair("vlmo/tiny"), NlvrObjectives()),
    "dialog": (architecture_of("blip/tiny"), DialogObjectives(losses={"rank": 1, "lm": 1})),
}
"""Each way of learning, and of reading two pictures."""


def test_two_ranks_learn_what_one_process_learns(
    task_shards: Path, dialog_shards: Path, rank_pair: Any, tmp_path: Path
) -> None:
    cases, expected = {}, {}
    shards = {name: dialog_shards if name == "dialog" else task_shards for name in CASES}
    for name, (architecture, config) in CASES.items():
        task = task_of(architecture, config)
        cases[name] = task, [loaded(task, shards[name], rank, 2) for rank in range(2)]
    torch.save(cases, tmp_path / "cases.pt")
    for name, (task, _) in cases.items():
        losses, _ = task.train()(loaded(task, shards[name]), 0.5)
        task.total(losses).backward()
        expected[name] = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    rank_pair.run(Path(__file__).parent.parent / "ranks_of_tasks.py", tmp_path)
    for rank in range(2):
        taken = torch.load(tmp_path / f"answer-{rank}.pt")
        assert len(taken) == len(expected) + 3
        for name, gradients in taken.items():
            of_one = expected[name.removesuffix(", fsdp")]
            for weight, gradient in gradients.items():
                wanted = of_one.get(weight, torch.zeros_like(gradient))
                torch.testing.assert_close(gradient, wanted, msg=f"{name}: {weight}")
            assert of_one.keys() <= gradients.keys()


class TestEntailment:
    def test_the_loss_is_of_the_right_class_and_leaves_out_what_has_none(self) -> None:
        task = task_of(classifier(), EntailmentObjectives())
        ids = torch.randint(5, 190, (3, 6))
        targets = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1.0]]).double()
        batch = ClassBatch(torch.randn(3, 3, 32, 32).double(), ids, torch.ones_like(ids), torch.arange(3), targets)
        losses, metrics = task.eval()(batch, 0.0)
        log_p = task.model.classify(task.model.encode_image(batch.images), ids, batch.mask_BT).log_softmax(1)
        torch.testing.assert_close(losses["answer"], -(log_p[0, 0] + log_p[2, 2]) / 2)
        assert metrics["outside"] == pytest.approx(1 / 3)


class TestVqaByClasses:
    def test_the_loss_is_of_every_class_and_leaves_out_questions_without_one(self) -> None:
        task = task_of(classifier("vilt/tiny", labels=ANSWERS), VqaClassesObjectives())
        ids = torch.randint(5, 190, (3, 6))
        targets = torch.tensor([[1.0, 0.3, 0], [0, 0, 0], [0, 0, 0.6]]).double()
        batch = ClassBatch(torch.randn(3, 3, 32, 32).double(), ids, torch.ones_like(ids), torch.arange(3), targets)
        losses, metrics = task.eval()(batch, 0.0)
        p = task.model.classify(task.model.encode_image(batch.images), ids, batch.mask_BT).sigmoid()
        expected = [
            -(targets[row, n] * p[row, n].log() + (1 - targets[row, n]) * (1 - p[row, n]).log())
            for row in (0, 2)
            for n in range(3)
        ]
        torch.testing.assert_close(losses["answer"], sum(expected) / 2)
        assert metrics["outside"] == pytest.approx(1 / 3)

    def test_classes_are_what_most_people_answer(self, task_shards: Path) -> None:
        urls = [str(path) for path in sorted(task_shards.glob("*.tar"))]
        counted = count_answers(urls, 1)
        assert "red" in counted
        assert not {"ring", "a ring"} & set(counted), "three of ten say so, of every question"

    @pytest.mark.parametrize("family", ["vilt", "vlmo", "xvlm"])
    def test_heads_as_in_the_released_codes(self, family: str) -> None:
        model = build(classifier(f"{family}/tiny", labels=ANSWERS))
        first = model.get_parameter("head.0.weight")
        uniform = bool((first.abs() <= first.shape[1] ** -0.5).all())
        assert uniform == (family == "xvlm"), "X-VLM's begin as torch begins a layer, others at a deviation of 0.02"
        groups = make_optimizer(model, OptimizerConfig(decay_vectors=False)).param_groups
        spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
        assert {name for name, p in model.named_parameters() if name.startswith("head.") and id(p) in spared} == {
            "head.0.bias",
            "head.1.bias",
            "head.3.bias",
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_that_is_not_in_the_table_names_those_that_are(family: str) -> None:
    if family in ("classifier", "answerer"):
        return
    bases = {"clip": "clip/vit-b-32", "blip2": "blip2/tiny"}
    said = unsupported(classifier(bases.get(family, f"{family}/tiny")), EntailmentObjectives())
    assert ("blip, albef, vilt, vlmo and xvlm can" in said) == (family not in FAMILIES_OF["entailment"])


def test_what_a_start_or_a_model_lacks_is_said_with_what_to_do(tmp_path: Path) -> None:
    said = unsupported(architecture_of("vilt/tiny"), VqaObjectives())
    assert said.startswith(
        "vqa needs a head, and vilt alone has none: set model to one with a head on it, as in model={"
    )
    store.save(build(pair("blip/tiny")), tmp_path)
    for wanted, why in (
        (classifier(), "is a classifier with images 2, and `model` has images 1"),
        (pair("albef/tiny"), "is a classifier with base blip, and `model` has base albef"),
        (
            architecture_of("blip/tiny"),
            "is of the family classifier, and `model` of blip: set model to an architecture",
        ),
    ):
        with pytest.raises(RecipeError, match=why):
            check_start(tmp_path, wanted, InitialConfig())
    swapped = classifier(labels=("true", "false"), images=2)
    assert check_start(tmp_path, swapped, InitialConfig()) == tmp_path


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text()
    (section,) = (part for part in page.split("\n## ") if part.startswith("Training for a task\n"))
    rows = re.findall(r"^\| `(\w+)` \| ((?:\w+(?:, )?)+) \|", section, re.MULTILINE)
    assert {task: tuple(families.split(", ")) for task, families in rows} == FAMILIES_OF


def test_texts_of_albef_and_xvlm_end_without_sep_and_their_answers_with_it() -> None:
    """Their own code's tokenizer adds [CLS] alone; only what a decoder learns to write ends."""
    for name in ("albef/tiny", "xvlm/tiny"):
        for architecture in (classifier(name), AnswererConfig.model_validate({"base": name})):
            tokenizer = tokenizer_of("world", architecture.tokenizer_kind)
            ids, _ = tokenizer.encode(["a red ring"], 16)
            answers, _ = tokenizer.encode_answers(["a red ring"], 16)
            assert tokenizer.sep not in ids[0]
            assert answers[0].tolist() == [*ids[0].tolist(), tokenizer.sep]


def test_a_text_is_assigned_to_its_picture_or_to_none() -> None:
    architecture = classifier("albef/tiny", labels=("left", "right", "neither"), images=2)
    task = build_task(build(architecture), AssignObjectives())
    assert isinstance(task, Assignment)
    torch.manual_seed(0)
    images = torch.tensor([7, 7, 8, 9, 9, 9]).repeat(20)
    tokens = task.model.encode_image(torch.randn(120, 3, 32, 32))
    labels, left, right = task._assigned(tokens, images)
    assert labels.unique().tolist() == [0, 1, 2]
    for side, number in ((left, 0), (right, 1)):
        assert (side[labels == number] == torch.arange(120)[labels == number]).all()
        assert (images[side] != images)[labels != number].all()
    assert (left != right).all()
    few, ids = tokens[:4], images[:4]
    vectors = task.model.project_image(few)
    for one, row in enumerate(other_pictures(vectors, ids)):
        alike = torch.stack(
            [(vectors[one] @ other / 0.07).exp() * (ids[one] != ids[n]) for n, other in enumerate(vectors)]
        )
        torch.testing.assert_close(row / row.sum(), alike / alike.sum())
    assert unsupported(classifier("vilt/tiny", labels=("left", "right", "neither"), images=2), AssignObjectives())
