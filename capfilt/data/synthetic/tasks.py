"""Samples of the downstream tasks, as shards of each task have them (docs/tasks.md).

Each task has two splits of its own beside the world's four, `TASK-train` and `TASK-test`; every picture of the second
shows a held-out appearance, as in `test`. Classification is zero-shot: it has no pictures to train on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from capfilt.data.sample import Sample
from capfilt.data.synthetic import questions, statements
from capfilt.data.synthetic.captions import say_thing
from capfilt.data.synthetic.drawing import Weights, WorldConfig, box, draw_scene, picture, stream
from capfilt.data.synthetic.scenes import COLOURS, SHAPES, Scene

QUESTIONS, DISTRACTORS = 3, 3
"""Questions about a picture, and proposals beside the boxes of its things."""
TEMPLATES = ("a {}", "a picture of a {}")
"""How prompts name a class."""

Box = list[int]
"""[x, y, w, h], pixels."""


@dataclass(frozen=True)
class _Place:
    """Where a sample is, and what its split allows."""

    config: WorldConfig
    seed: int
    split: str
    index: int
    weights: Weights

    @property
    def held_out(self) -> bool:
        return self.split.endswith("-test")

    def stream(self, purpose: str, index: int | None = None) -> np.random.Generator:
        return stream(self.seed, self.split, self.index if index is None else index, purpose)

    def scene(self, purpose: str = "scene") -> Scene:
        return draw_scene(self.stream(purpose), self.weights, self.held_out)

    def picture(self, scene: Scene) -> Sample:
        return picture(self.config, self.seed, self.split, self.index, scene)


def _vqa(place: _Place) -> Sample:
    scene, rng = place.scene(), place.stream("questions")
    rows = [
        {
            "id": place.index * QUESTIONS + number,
            "question": question.text,
            "answers": questions.ten_answers(question, rng),
            "question_type": question.kind,
            "answer_type": question.answer_type,
        }
        for number, question in enumerate(questions.ask(scene, rng, QUESTIONS))
    ]
    return _with(place.picture(scene), questions=rows)


def _nlvr2(place: _Place) -> Sample:
    """Of four samples in a row, which have one statement, it is true of two."""
    number, member = divmod(place.index, statements.GROUP)
    rng = place.stream("statement", number)
    text, stated = statements.draw_pair_claim(draw_scene(rng, place.weights, place.held_out), rng)
    label = bool(rng.permutation(statements.GROUP)[member] % 2)
    left, right = statements.draw_pair(stated, label, place.stream("pair"), place.weights, place.held_out)
    second = picture(place.config, place.seed, f"{place.split}-right", place.index, right)
    group = f"{place.split}-{number}"
    row = {"id": f"{group}-{member}", "text": text, "label": stated.holds(left, right), "group": group}
    extras = {f"right.{second.extension}": second.image}
    return replace(_with(place.picture(left), statements=[row]), extras=extras)


def _entailment(place: _Place) -> Sample:
    scene, rng = place.scene(), place.stream("hypotheses")
    drawn = statements.draw_hypotheses(scene, rng, lambda: draw_scene(rng, place.weights, place.held_out))
    rows = [
        {"id": f"{place.split}-{place.index}-{number}", "text": text, "label": hypothesis.label(scene)}
        for number, (text, hypothesis) in enumerate(drawn)
    ]
    return _with(place.picture(scene), hypotheses=rows)


def _grounding(place: _Place) -> Sample:
    """A phrase for each thing, which names its colour and shape: no other thing of a scene has both."""
    scene, rng, side = place.scene(), place.stream("regions"), place.config.image_size
    boxes = [box(thing, side) for thing in scene.things]
    regions = [
        {"id": f"{place.split}-{place.index}-{number}", "box": boxes[number], "text": say_thing(thing, rng)}
        for number, thing in enumerate(scene.things)
    ]
    proposals = [*boxes, *_distractors(boxes, side, rng)]
    shuffled = [{"box": proposals[i]} for i in rng.permutation(len(proposals))]
    return _with(place.picture(scene), regions=regions, proposals=shuffled)


def _distractors(boxes: list[Box], side: int, rng: np.random.Generator) -> list[Box]:
    """Boxes of the sizes of things that cover none of these: each IoU is below 0.4."""
    drawn: list[Box] = []
    while len(drawn) < DISTRACTORS:
        width, height = (int(rng.integers(round(0.28 * side), round(0.5 * side) + 1)) for _ in range(2))
        one = [int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1)), width, height]
        if all(iou(one, other) < 0.4 for other in boxes):
            drawn.append(one)
    return drawn


def iou(a: Box, b: Box) -> float:
    """How much of two boxes together both cover."""
    across, down = (max(0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    return across * down / (a[2] * a[3] + b[2] * b[3] - across * down)


def _dialog(place: _Place) -> Sample:
    """One round of each dialog has the relevance of its candidates, as VisDial's dense annotations do."""
    scene, rng = place.scene(), place.stream("dialog")
    caption, asked = questions.draw_dialog(scene, rng)
    dense = int(rng.integers(len(asked)))
    rounds: list[dict[str, Any]] = []
    for number, question in enumerate(asked):
        options, relevance = questions.options(question, rng)
        right = {"gt_index": options.index(question.answer)} | ({"relevance": relevance} if number == dense else {})
        rounds.append({"question": question.text, "answer": question.answer, "options": options, **right})
    return _with(place.picture(scene), dialog={"id": place.index, "caption": caption, "rounds": rounds})


def _classification(place: _Place) -> Sample:
    scene = place.scene()
    return _with(place.picture(scene), **{"class": " ".join(scene.things[0].pair)})


def _with(sample: Sample, **rows: Any) -> Sample:
    return replace(sample, meta={**sample.meta, **rows})


@dataclass(frozen=True)
class _Task:
    sample: Callable[[_Place], Sample]
    weights: Weights
    """Of one, two and three things in its scenes."""
    parts: tuple[str, ...] = ("train", "test")


_TASKS = {
    "vqa": _Task(_vqa, (0.3, 0.5, 0.2)),
    "nlvr2": _Task(_nlvr2, (0.5, 0.45, 0.05)),
    "entailment": _Task(_entailment, (0.4, 0.5, 0.1)),
    "grounding": _Task(_grounding, (0.1, 0.6, 0.3)),
    "dialog": _Task(_dialog, (0.2, 0.6, 0.2)),
    "classification": _Task(_classification, (1, 0, 0), ("test",)),
}
TASKS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: tuple(f"{name}-{part}" for part in task.parts) for name, task in _TASKS.items()}
)
"""The splits of each task."""
SPLITS = tuple(split for splits in TASKS.values() for split in splits)


def sample(config: WorldConfig, seed: int, split: str, index: int) -> Sample:
    """Sample `index` (from 0, without end) of one of SPLITS."""
    task = _TASKS[split.rpartition("-")[0]]
    return task.sample(_Place(config, seed, split, index, task.weights))


def files_beside(split: str) -> dict[str, str]:
    """The text files that lie beside the shards of a split, by name: the classes, and the templates of prompts."""
    if split not in TASKS["classification"]:
        return {}
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    return {
        name: "".join(f"{line}\n" for line in lines)
        for name, lines in (("classes.txt", names), ("templates.txt", TEMPLATES))
    }
