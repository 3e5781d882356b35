from __future__ import annotations

from pathlib import Path

import pytest

from capfilt.data.sample import Sample
from capfilt.data.shards import write
from capfilt.data.text import fit
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ShardError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = Tokenizer([*SPECIAL, "a", "dog", *"bcdo", "##s", *(f"##{letter}" for letter in "abcdo"), "猫"])


@pytest.mark.parametrize(
    ("text", "spelled", "total"),
    [
        ("a dog", 0, 4),  # a word of one letter is not spelled
        ("dogs", 0, 4),  # nor is a word with an ending of one letter
        ("cab", 3, 3),
        ("a cab", 3, 4),
        ("xyz dog", 3, 6),  # no token at all
        ("猫 鳥", 1, 2),
        ("", 0, 0),
        ("\ud800 dog", 0, 3),  # BERT leaves out what no text has
    ],
)
def test_what_is_spelled_out(text: str, spelled: int, total: int) -> None:
    assert LETTERS.spelled_out(text) == (spelled, total)


def test_a_tokenizer_that_fits_is_not_warned_of() -> None:
    assert [*fit.warnings("v", LETTERS, ["a dog"] * 9 + ["cab"], "data.web", {"x.max_length": 4})] == []
    assert [*fit.warnings("v", LETTERS, ["", "!"], "data.web", {"x.max_length": 4})] == []


def test_a_tokenizer_that_spells_is_warned_of_and_its_lengths_are_not() -> None:
    (warning,) = fit.warnings("v", LETTERS, ["cab", "a dog"], "data.web", {"x.max_length": 4})
    assert warning.startswith(
        "the tokenizer 'v' spells out 43% of the characters of data.web letter by letter (2 texts)"
    )
    assert "they are not in its language" in warning


def test_lengths_that_cut_are_named_together() -> None:
    texts = ["a dog", "a dog a dog", "dog a dog"]
    (warning,) = fit.warnings(
        "v", LETTERS, texts, "data.web", {"a.max_length": 4, "b.max_length": 5, "c.max_length": 9}
    )
    assert warning == (
        "67% of the texts of data.web would be cut by a.max_length 4, b.max_length 5; 95 % have 5 tokens at most."
    )


def test_texts_are_read_until_there_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "SAMPLE", 3)
    captions = [{"text": "a dog", "source": "human"}, {"text": "a cab", "source": "human"}]
    write(
        tmp_path / "0.tar", [Sample(str(n), b"\xff\xd8\xff", "jpg", "a dog", {"captions": captions}) for n in range(2)]
    )
    assert fit.sample_texts([str(tmp_path / "0.tar"), str(tmp_path / "absent.tar")]) == ["a dog", "a cab", "a dog"]
    monkeypatch.setattr(fit, "SAMPLE", 9)
    with pytest.raises(ShardError):
        fit.sample_texts([str(tmp_path / "0.tar"), str(tmp_path / "absent.tar")])
