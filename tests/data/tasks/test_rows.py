"""Rows of the tasks: what a json may say of them, and what is said of one that cannot be used."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.tasks import (
    ClassList,
    Dialog,
    DialogRound,
    FailedRow,
    Hypothesis,
    Question,
    Statement,
    class_of,
    dialog_of,
    hypotheses_of,
    questions_of,
    read_classes,
    right_picture,
    statements_of,
)
from capfilt.errors import DataError

QUESTION = {"id": 1, "question": "What is it?", "answers": ["a dog"] * 9 + [""], "answer_type": "other"}
STATEMENT = {"id": "dev-0-1-0", "text": "Both are dogs.", "label": False, "group": "dev-0-0"}
HYPOTHESIS = {"id": "1#0", "text": "A dog sleeps.", "label": "neutral"}
ROUND = {"question": "is it red?", "answer": "no", "options": ["yes", "no"], "gt_index": 1, "relevance": [0, 1]}
DIALOG = {"id": 3, "caption": "a bus", "rounds": [ROUND, {"question": "and now?"}]}


def test_rows_are_read_as_they_are() -> None:
    assert questions_of({"questions": [QUESTION, {"id": "2", "question": "Why?"}]}) == [
        Question(1, "What is it?", (*["a dog"] * 9, ""), None, "other"),
        Question("2", "Why?"),
    ]
    assert statements_of({"statements": [STATEMENT]}) == [Statement("dev-0-1-0", "Both are dogs.", False, "dev-0-0")]
    assert hypotheses_of({"hypotheses": [HYPOTHESIS]}) == [Hypothesis("1#0", "A dog sleeps.", "neutral")]
    rounds = (DialogRound("is it red?", "no", ("yes", "no"), 1, (0.0, 1.0)), DialogRound("and now?"))
    assert dialog_of({"dialog": DIALOG}) == Dialog(3, "a bus", rounds)
    assert questions_of({}) == statements_of({}) == hypotheses_of({}) == []
    assert dialog_of({}) is None


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"questions": {}}, r"questions is dict; it is a list of objects"),
        ({"questions": [3]}, r"questions\[0\]: it is int; it is an object"),
        ({"questions": [QUESTION, {**QUESTION, "id": "1"}]}, r"questions\[1\]: its id comes twice"),
        ({"questions": [{**QUESTION, "id": True}]}, "id is True; it is a whole number or a text"),
        ({"questions": [{**QUESTION, "question": "?"}]}, r"question is '\?'; it is a text with something to read"),
        ({"questions": [{**QUESTION, "answers": "dog"}]}, "answers is no list of texts"),
        ({"questions": [{**QUESTION, "answers": [1]}]}, "answers is no list of texts"),
        ({"questions": [{**QUESTION, "question_type": 1}]}, "question_type is 1; it is a text"),
        ({"statements": [{**STATEMENT, "label": "True"}]}, "label is 'True'; it is true or false"),
        ({"hypotheses": [{**HYPOTHESIS, "label": "Neutral"}]}, "is one of .* Did you mean 'neutral'?"),
        ({"hypotheses": [{**HYPOTHESIS, "label": ["neutral"]}]}, "is one of entailment, neutral, contradiction"),
        ({"dialog": []}, "dialog: it is no object"),
        ({"dialog": {**DIALOG, "caption": None}}, "dialog: caption is None"),
        ({"dialog": {**DIALOG, "rounds": [ROUND, {}]}}, "dialog: round 1: question is None"),
        ({"dialog": {**DIALOG, "rounds": [{**ROUND, "gt_index": 2}]}}, "round 0: gt_index is 2; .* of the 2 options"),
        ({"dialog": {**DIALOG, "rounds": [{**ROUND, "gt_index": True}]}}, "gt_index is True"),
        ({"dialog": {**DIALOG, "rounds": [{**ROUND, "relevance": [1]}]}}, "relevance has 1 numbers for 2 options"),
        ({"dialog": {**DIALOG, "rounds": [{**ROUND, "relevance": [1, 2]}]}}, "no list of numbers from 0 to 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said(meta: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        [read(meta) for read in (questions_of, statements_of, hypotheses_of, dialog_of)]


def test_one_bad_row_takes_no_other_with_it() -> None:
    failed: list[FailedRow] = []
    read = questions_of({"questions": [QUESTION, {**QUESTION, "id": 2, "question": " "}, None]}, failed)
    assert [row.id for row in read] == [1]
    assert [row.id for row in failed] == [2, "questions[2]"]


def test_a_round_whose_candidates_fail_stays_as_history() -> None:
    failed: list[FailedRow] = []
    dialog = dialog_of({"dialog": {**DIALOG, "rounds": [{**ROUND, "relevance": [1.0]}, ROUND]}}, failed)
    assert dialog is not None
    assert dialog.rounds[0] == DialogRound("is it red?", "no")
    assert dialog.rounds[1].options == ("yes", "no")
    assert [row.id for row in failed] == ["3:0"]
    assert dialog_of({"dialog": {**DIALOG, "rounds": [{}]}}, failed) is None
    assert failed[1] == FailedRow(3, "round 0: question is None; it is a text with something to read")


def test_a_pair_comes_through_a_shard(tmp_path: Path) -> None:
    pair = Sample("0", b"left", "png", "", {"statements": [STATEMENT]}, {"right.jpg": b"right"})
    shards.write(tmp_path / "0.tar", [pair, Sample("1", b"left", "png", "")])
    first, second = shards.read(str(tmp_path / "0.tar"), extras=True)
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    assert (first.image, right_picture(first.extras)) == (b"left", b"right")
    with pytest.raises(DataError, match=r"there is no right picture; a pair is KEY.jpg"):
        right_picture(second.extras)
    with pytest.raises(DataError, match=r"several right pictures \(right.jpg, right.png\)"):
        right_picture({"right.jpg": b"", "right.png": b""})


def test_pictures_without_any_text_have_rows_and_classes_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("0.jpg", b"left"), ("0.json", b'{"class": "cat"}'), ("0.right.webp", b"right"),
                           ("1.cls", b"1"), ("1.webp", b"one")):  # fmt: skip
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    samples = [one for one in shards.read(str(tmp_path / "0.tar"), extras=True) if isinstance(one, Sample)]
    assert right_picture(samples[0].extras) == b"right"
    assert [class_of(one.meta, one.extras, ClassList(("cat", "dog"))) for one in samples] == [0, 1]


def test_classes_lie_beside_the_shards_or_above(tmp_path: Path) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    shard = str(folder / "0.tar")
    with pytest.raises(DataError, match=r"no classes.txt or classnames.txt beside .*0.tar or in the folder above"):
        read_classes(shard)
    (tmp_path / "classnames.txt").write_text("cat\ndog \n\n")
    assert read_classes(shard) == ClassList(("cat", "dog"), ("a photo of a {}.",))
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\nthe {c}")
    assert read_classes(shard).prompts(1) == ["a dog.", "the dog"]
    (folder / "classes.txt").write_text("bird\nfish\nowl")
    (folder / "templates.txt").write_text("a drawing of a {}\n")
    assert read_classes(shard) == ClassList(("bird", "fish", "owl"), ("a drawing of a {}",))


@pytest.mark.parametrize(
    ("classes", "templates", "said"),
    [
        ("cat\n", "a {}", "has 1 classes; two or more"),
        ("cat\n\ndog", "a {}", "line 2 is empty"),
        ("cat\ndog", "a {}\nplain", r"line 2: 'plain' has not one \{\}"),
        ("cat\ndog", "", "templates.txt is empty"),
        ("cat\ndog\xff", "a {}", "cannot be read as lines of UTF-8"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_used(tmp_path: Path, classes: str, templates: str, said: str) -> None:
    (tmp_path / "classes.txt").write_text(classes, "latin-1")
    (tmp_path / "templates.txt").write_text(templates)
    with pytest.raises(DataError, match=said):
        read_classes(str(tmp_path / "0.tar"))


def test_the_class_of_a_sample() -> None:
    classes = ClassList(("cat", "dog", "crane", "crane"))
    assert class_of({"class": "dog"}, {}, classes) == class_of({}, {"cls": b"1\n"}, classes) == 1
    assert class_of({}, {}, classes) is None
    for meta, extras, said in (
        ({"class": "Dog"}, {}, "class 'Dog' is none of the 4 classes. Did you mean 'dog'?"),
        ({"class": 1}, {}, "class 1 is none of the 4 classes"),
        ({"class": "crane"}, {}, "stands 2 times"),
        ({}, {"cls": b"4"}, "cls is b'4'; it is the number of one of the 4 classes"),
        ({}, {"cls": b"-1"}, "cls is b'-1'"),
    ):
        with pytest.raises(DataError, match=said):
            class_of(meta, extras, classes)
