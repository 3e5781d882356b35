"""Rounds of dialogs as token ids."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.data.tasks import Dialog, DialogRound
from capfilt.data.text.dialog_texts import RoundText, encode_candidates, turns_of
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import TextError

WORLD = Tokenizer.load("world")
DIALOG = Dialog(
    7,
    "a red circle",
    (DialogRound("is it large?", "no"), DialogRound("is it striped?"), DialogRound("a blue ring?", "no")),
)


def test_turns_are_what_was_said_before_the_candidate() -> None:
    assert turns_of(DIALOG, 0) == ("a red circle", "is it large?")
    assert turns_of(DIALOG, 2) == ("a red circle", "is it large? no", "is it striped?", "a blue ring?")


def words(row: list[int]) -> str:
    return " ".join(WORLD.vocab[id_] for id_ in row)


def test_the_layout() -> None:
    rounds = [RoundText(("A red circle.", "is a ring?"), ("no", "a blue ring")), RoundText(("a",), ("no",))]
    made = encode_candidates(WORLD, rounds, 32)
    texts = [words(row[mask == 1].tolist()) for row, mask in zip(made.ids_NT, made.mask_NT, strict=True)]
    assert texts[0].startswith("[CLS] a red circle [SEP] is a ring")
    assert texts[0].endswith("no [SEP]")
    assert texts[1].endswith("a blue ring [SEP]")
    assert texts[2] == "[CLS] a no [SEP]"
    assert [words(row[answer].tolist()) for row, answer in zip(made.ids_NT, made.answer_NT, strict=True)] == [
        "no [SEP]",
        "a blue ring [SEP]",
        "no [SEP]",
    ]


TEXT = st.lists(st.sampled_from(["red", "a", "circle", "ring"]), min_size=1, max_size=9).map(" ".join)


@given(st.lists(TEXT, min_size=1, max_size=5), st.lists(TEXT, min_size=1, max_size=4), st.integers(8, 40))
def test_the_beginning_goes_where_there_is_no_room(turns: list[str], candidates: list[str], length: int) -> None:
    made = encode_candidates(WORLD, [RoundText(tuple(turns), tuple(candidates))], length)
    whole = encode_candidates(WORLD, [RoundText(tuple(turns), tuple(candidates))], 400)
    assert made.ids_NT.shape[1] <= length
    befores = set()
    for row, candidate in enumerate(candidates):
        text = made.ids_NT[row][made.mask_NT[row] == 1].tolist()
        answer = made.ids_NT[row][made.answer_NT[row]].tolist()
        assert text[0] == WORLD.cls
        assert text[len(text) - len(answer) :] == answer
        assert words(answer) == " ".join([*candidate.split()[: length // 2], "[SEP]"])
        before = text[1 : len(text) - len(answer)]
        all_before = whole.ids_NT[row][(whole.mask_NT[row] == 1) & ~whole.answer_NT[row]].tolist()[1:]
        assert before == all_before[len(all_before) - len(before) :]
        assert before, "something of the question is left"
        befores.add(tuple(before))
    assert len(befores) == 1


def test_nothing_and_too_little() -> None:
    assert encode_candidates(WORLD, [], 32).ids_NT.shape == (0, 0)
    assert encode_candidates(WORLD, [RoundText(("a",), ())], 32).ids_NT.shape == (0, 0)
    with pytest.raises(TextError, match="max_length is 7"):
        encode_candidates(WORLD, [], 7)
