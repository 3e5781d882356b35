"""The tasks of the embedded world against a slow reader of their texts, which looks at each thing of the scene."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from world_reader import MEANING, SIDES, SLOTS, parse, true_of

from capfilt.data import shards
from capfilt.data.regions import proposals_of, regions_of
from capfilt.data.sample import Sample
from capfilt.data.synthetic import tasks, world
from capfilt.data.synthetic.scenes import Scene, Thing
from capfilt.data.synthetic.world import HELD_OUT, TASKS, WorldConfig
from capfilt.data.tasks import (
    class_of,
    dialog_of,
    hypotheses_of,
    questions_of,
    read_classes,
    right_picture,
    statements_of,
)
from capfilt.errors import DataError

SEED, MANY = 3, 120
CONFIG = WorldConfig()
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross", "rings": "ring"}
SPLITS = [split for splits in TASKS.values() for split in splits]


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> list[Scene]:
    """Every scene that is painted from here on."""
    painted: list[Scene] = []
    paint = tasks.picture

    def watched(config: WorldConfig, seed: int, split: str, index: int, shown: Scene) -> Sample:
        painted.append(shown)
        return paint(config, seed, split, index, shown)

    monkeypatch.setattr(tasks, "picture", watched)
    return painted


def made(split: str, scenes: list[Scene], number: int = MANY) -> list[tuple[Sample, list[Scene]]]:
    samples = []
    for i in range(number):
        del scenes[:]
        samples.append((world.sample(CONFIG, SEED, split, i), list(scenes)))
    return samples


def words_of(text: str) -> list[str]:
    return [MEANING.get(word, word) for word in re.findall(r"[a-z0-9]+", text.lower())]


def fits(thing: Thing, words: list[str]) -> bool:
    return all(word in (thing.shape, thing.colour, thing.size, thing.texture) for word in words)


def answer_of(scene: Scene, text: str, topic: Thing | None = None) -> tuple[str, Thing | None]:
    """The answer to a question, and the thing that "it" means after it."""
    words = words_of(text)
    every = {word for values in SLOTS.values() for word in values}
    if words[:2] == ["how", "many"]:
        wanted = [PLURALS.get(word, word) for word in words[2:] if PLURALS.get(word, word) in every]
        return str(sum(fits(thing, wanted) for thing in scene.things)), topic
    if words[:2] == ["is", "there"]:
        return ("yes" if any(fits(thing, words[3:]) for thing in scene.things) else "no"), topic
    said = [word for word in words if word in every or word in SIDES]
    side = next((word for word in said if word in SIDES), None)
    if words[1] == "it":
        assert topic is not None
        return ("yes" if fits(topic, said) else "no"), topic
    if words[:2] == ["where", "is"]:
        thing = topic if "it" in words else one(scene, said)
        assert thing is not None
        return f"{'top' if thing.y < 0.5 else 'bottom'} {'left' if thing.x < 0.5 else 'right'}", thing
    if words[0] == "what":
        thing = one(scene, said)
        return (thing.colour if words[1] == "color" else thing.shape), thing
    if side is not None:
        a, b = one(scene, said[: said.index(side)]), one(scene, said[said.index(side) + 1 :])
        dx, dy = SIDES[side]
        return ("yes" if (b.x - a.x) * dx + (b.y - a.y) * dy > 0.2 else "no"), a
    return ("yes" if fits(one(scene, said[:2]), said[2:]) else "no"), one(scene, said[:2])


def one(scene: Scene, words: list[str]) -> Thing:
    (thing,) = [thing for thing in scene.things if fits(thing, words)]
    return thing


def test_most_annotators_answer_what_is_true(scenes: list[Scene]) -> None:
    kinds: Counter[str | None] = Counter()
    answers = Counter()
    ids: list[int | str] = []
    for sample, (scene,) in made("vqa-train", scenes) + made("vqa-test", scenes):
        for question in questions_of(sample.meta):
            true = answer_of(scene, question.question)[0]
            assert len(question.answers) == 10
            assert question.answers.count(true) >= 7, (scene, question)
            assert question.question.startswith(str(question.question_type))
            assert question.answer_type == (
                "yes/no" if true in ("yes", "no") else "number" if true.isdigit() else "other"
            )
            kinds[question.question_type] += 1
            answers.update(question.answers)
            ids.append(question.id)
    assert min(kinds.values()) > 0.1 * sum(kinds.values())
    assert len(kinds) == 6
    assert {"crimson", "two", "disc", "red", "2", "yes", "top left"} <= set(answers)
    assert 0.4 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.6
    assert len(set(ids)) == len(ids) // 2  # each split counts from 0


def test_a_statement_is_true_of_half_of_its_pairs(scenes: list[Scene]) -> None:
    places: Counter[str] = Counter()
    for split in TASKS["nlvr2"]:
        groups: dict[str | None, list[tuple[str, bool | None]]] = {}
        for sample, (right, left) in made(split, scenes, 60):
            (statement,) = statements_of(sample.meta)
            claim, _, where = statement.text.rpartition(" on ")
            said = parse(claim.replace(" is", "") if claim.endswith(" is") else claim)
            a, b = true_of(left, said), true_of(right, said)
            truth = {"the left picture": a, "the right picture": b, "both pictures": a and b}
            truth |= {"no picture": not a and not b, "only one picture": a != b}
            assert statement.label == truth[where], (left, right, statement)
            places[where] += 1
            groups.setdefault(statement.group, []).append((statement.text, statement.label))
            assert right_picture(sample.extras) != sample.image
        for group in groups.values():
            assert len({text for text, _ in group}) == 1
            assert sorted(bool(label) for _, label in group) == [False, False, True, True]
    assert len(places) == 5


def test_a_hypothesis_is_true_false_or_says_what_cannot_be_seen(scenes: list[Scene]) -> None:
    unseen = ("sale", "price", "shipping", "admin", "home", "outside")
    beside: Counter[tuple[str | None, bool]] = Counter()
    for sample, (scene,) in made("entailment-train", scenes) + made("entailment-test", scenes):
        hypotheses = hypotheses_of(sample.meta)
        assert sorted(str(one.label) for one in hypotheses) == ["contradiction", "entailment", "neutral"]
        for hypothesis in hypotheses:
            says_more = any(word in hypothesis.text for word in unseen)
            claim = re.split(r", (?:on sale|price|with free|photo|and more|and a \w+ \w+ outside)", hypothesis.text)[0]
            is_true = true_of(scene, parse(claim))
            label = "contradiction" if not is_true else "neutral" if says_more else "entailment"
            assert hypothesis.label == label, (scene, hypothesis)
            beside[label, says_more] += 1
    assert min(beside.values()) > 0.1 * sum(beside.values())
    assert set(beside) == {("entailment", False), ("neutral", True), ("contradiction", False), ("contradiction", True)}


def test_a_phrase_means_one_box_and_no_distractor_covers_it(scenes: list[Scene]) -> None:
    for sample, (scene,) in made("grounding-train", scenes) + made("grounding-test", scenes):
        regions, proposals = regions_of(sample.meta, 32, 32), proposals_of(sample.meta, 32, 32)
        boxes = {region[:4] for region in regions}
        for region in regions:
            thing = one(scene, words_of(region.text)[1:])
            assert region.left <= thing.x * 32 <= region.left + region.width
            assert region.top <= thing.y * 32 <= region.top + region.height
        given = [proposal[:4] for proposal in proposals]
        assert len(given) == len(boxes) + 3
        assert boxes <= set(given)
        for box in set(given) - boxes:
            for other in boxes:
                pixels, others = (
                    {(x, y) for x in range(int(l), int(l + w)) for y in range(int(t), int(t + h))}
                    for l, t, w, h in (box, other)  # noqa: E741
                )
                assert len(pixels & others) / len(pixels | others) < 0.4


def test_a_dialog_s_answers_are_true_of_the_thing_that_was_named_last(scenes: list[Scene]) -> None:
    switches = 0
    for sample, (scene,) in made("dialog-train", scenes) + made("dialog-test", scenes):
        dialog = dialog_of(sample.meta)
        assert dialog is not None
        assert len(dialog.rounds) == 3
        first = topic = one(scene, words_of(dialog.caption)[-2:])
        for told in dialog.rounds:
            switches += topic is not first and "it" in words_of(told.question)
            answer, named = answer_of(scene, told.question, topic)
            assert named is not None
            topic = named
            assert told.answer == answer, (scene, dialog)
            assert len(set(told.options)) == len(told.options) == 10
            assert told.gt_index is not None
            assert told.options[told.gt_index] == answer
        (dense,) = [told for told in dialog.rounds if told.relevance is not None]
        for option, relevance in zip(dense.options, dense.relevance or (), strict=True):
            assert relevance == (1 if option == dense.answer else 0) or (option, relevance) in (
                *((word, 0.6) for word, meaning in MEANING.items() if meaning == dense.answer),
                ({"0": "none", "1": "one", "2": "two", "3": "three"}.get(dense.answer or ""), 0.6),
            )
    assert switches > 5


def test_held_out_appearances_are_shown_by_every_picture_of_a_test_split_and_by_no_other(scenes: list[Scene]) -> None:
    for split in SPLITS:
        for sample, painted in made(split, scenes, 20):
            for scene in painted:
                assert 1 <= len(scene.things) <= 3
                assert len({thing.pair for thing in scene.things}) == len(scene.things)
                assert bool(HELD_OUT & {thing.appearance for thing in scene.things}) == split.endswith("-test")
            texts = re.findall(r"(?:(large|big|small|little) (solid|plain|striped) )(\w+) (\w+)", str(sample.meta))
            named = {
                (MEANING.get(c, c), MEANING.get(s, s), MEANING.get(a, a), MEANING.get(b, b)) for a, b, c, s in texts
            }
            assert split.endswith("-test") or not HELD_OUT & named


def test_a_picture_of_one_thing_has_a_class(scenes: list[Scene], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"task_test": 3})
    (tar,) = world.write(config, SEED, tmp_path, "classification-test")
    classes = read_classes(str(tar))
    assert len(classes.names) == 30
    assert classes.prompts(0)[1] == "a picture of a red circle"
    for sample, (scene,) in made("classification-test", scenes, 20):
        (thing,) = scene.things
        number = class_of(sample.meta, {}, classes)
        assert number is not None
        assert classes.names[number] == f"{thing.colour} {thing.shape}"


@pytest.mark.parametrize("split", SPLITS)
def test_shards_of_a_task_are_written_and_read_back(split: str, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"task_train": 6, "task_test": 6, "shard_size": 4})
    paths = world.write(config, SEED, tmp_path, split)
    first = [path.read_bytes() for path in paths]
    read = [item for path in paths for item in shards.read(str(path), extras=True)]
    expected = [world.sample(config, SEED, split, i) for i in reversed(range(world.count(config, split)))][::-1]
    assert [(item.key, item.meta, item.image, item.extras) for item in read if isinstance(item, Sample)] == [
        (sample.key, sample.meta, sample.image, sample.extras) for sample in expected
    ]
    assert [path.read_bytes() for path in world.write(config, SEED, tmp_path, split)] == first
    assert world.sample(config, SEED + 1, split, 0).image != expected[0].image


def test_a_task_has_pictures_of_its_own() -> None:
    uids: list[Any] = [world.sample(CONFIG, SEED, split, i).uid for split in (*SPLITS, *world.SPLITS) for i in (0, 1)]
    assert len(set(uids)) == len(uids)
    with pytest.raises(DataError, match="Did you mean 'vqa-train'"):
        world.sample(CONFIG, SEED, "vqa-tran", 0)
