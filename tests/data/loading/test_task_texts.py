"""What downstream tasks learn of the texts about pictures."""

from __future__ import annotations

from pathlib import Path

from capfilt.data import shards
from capfilt.data.loading.task_texts import count_answers, count_texts, texts_of
from capfilt.data.sample import Sample


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
