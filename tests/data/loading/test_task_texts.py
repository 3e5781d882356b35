"""What downstream tasks learn of the texts about pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from capfilt.data import shards
from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.order import Span
from capfilt.data.loading.task_rows import TaskLoader, TaskReader, TaskRow
from capfilt.data.loading.task_texts import count_answers, count_texts, texts_of
from capfilt.data.sample import Sample
from capfilt.data.text.language_tokenizer import tokenizer_of


def test_answers_are_counted_as_vqa_compares_them() -> None:
    answers = ["Two", "2", "2.", "three", "the", "?"]
    meta = {"questions": [{"id": 1, "question": "how many?", "answers": answers}, {"id": 2, "question": "where?"}]}
    (row,) = texts_of("questions", meta)
    assert row.answers == (("2", 3), ("3", 1))


def test_the_answers_that_questions_have_most(tmp_path: Path) -> None:
    given = [["Red", "red.", "blue"], ["red"], ["two", "2"], ["2"], ["blue"], [], ["the"]]
    rows = [{"id": number, "question": "what?", "answers": answers} for number, answers in enumerate(given)]
    url = tmp_path / "00000.tar"
    shards.write(
        url, [Sample("0", b"x", "png", "", {"questions": rows}), Sample("1", b"x", "png", "", {"questions": "no"})]
    )
    assert count_answers([str(url)], 2) == ("2", "red")
    assert count_answers([str(url)], 1) == ("2", "red", "blue")


def test_rows_are_counted_by_their_kind() -> None:
    rounds = [{"question": "is it red?", "options": ["yes", "no"], "gt_index": 1}, {"question": "where?"}]
    assert count_texts({"dialog": {"id": 1, "caption": "a ring", "rounds": rounds}}) == {"rounds": 1}
    assert count_texts({"dialog": "no dialog"}) == {}


@pytest.mark.parametrize("swap", [False, True])
def test_pictures_change_places_and_words_with_them(swap: bool, tmp_path: Path) -> None:
    told = "A dog is on the left, a Cat on the Right; leftover"
    other = "A dog is on the right, a Cat on the left; leftover"
    meta = {"statements": [{"id": "a", "text": told, "label": True}]}
    url = tmp_path / "00000.tar"
    shards.write(url, [Sample(str(n), b"one %d" % n, "png", "", meta, {"right.png": b"right"}) for n in range(40)])
    reader = TaskReader("statements", LoaderConfig(swap=swap), 0, {str(url): 40})
    rows = list(reader._rows(Span(str(url), 0, 40, 0), 0))
    for number, row in enumerate(rows):
        both = (b"one %d" % number, b"right", told), (b"right", b"one %d" % number, other)
        assert (row.image, row.right, row.text) in both[: 1 + swap]
    moved = [row.text == other for row in rows]
    assert (10 < sum(moved) < 30) == swap
    again = [row.text == other for row in reader._rows(Span(str(url), 0, 40, 0), 1)]
    assert (moved != again) == swap, "drawn anew in each epoch"


def test_a_picture_of_sides_is_not_mirrored(task_shards: Path) -> None:
    config = LoaderConfig(batch_size=4, lanes=2, careful_flip=True, augment={"flip": True})
    tokenizer = tokenizer_of("world", "wordpiece")
    loader = TaskLoader("questions", [Source(shards=str(task_shards))], config, tokenizer, 32, 0)
    asked = TaskRow("s", "u", b"", "where is it", (("top Left", 7),), None)
    assert not loader._changes(asked).flip
    assert loader._changes(replace(asked, answers=(("top", 7),))).flip
    assert not loader._changes(replace(asked, answers=(), text="what is right of it")).flip
