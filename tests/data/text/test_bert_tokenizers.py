"""The tokenizers of ViLT and VLMo, and of ALBEF and X-VLM, beside BERT's of transformers."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from capfilt.data.text.bert_tokenizers import BertTokenizer, OpenBertTokenizer
from capfilt.data.text.language_tokenizer import tokenizer_of

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "on", "red", "person", "t", "shirt", "'", ".")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return tmp_path


def test_the_vocabulary_stays_as_it_is(folder: Path) -> None:
    assert len(tokenizer_of(folder, "bert")) == len(WORDS)
    assert len(tokenizer_of(folder, "wordpiece")) == len(WORDS) + 2


def test_ids_are_those_of_transformers(folder: Path) -> None:
    from transformers import BertTokenizer as Theirs

    texts = ["A dog's red t-shirt.", "dogs on a dog"]
    theirs = Theirs(str(folder / "vocab.txt"))(texts, padding=True)
    ids, mask = BertTokenizer.load(folder).encode(texts, 40)
    assert ids.tolist() == theirs["input_ids"]
    assert mask.tolist() == theirs["attention_mask"]


def test_an_open_text_has_no_end_and_its_room(folder: Path) -> None:
    tokenizer = OpenBertTokenizer.load(folder)
    ids, mask = tokenizer.encode(["dogs on red", "a"], 4)
    assert [[WORDS[i] for i in row] for row in ids] == [["[CLS]", "dog", "##s", "on"], ["[CLS]", "a", "[PAD]", "[PAD]"]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert tokenizer.continued.nonzero()[0].tolist() == [WORDS.index("##s")]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Man's T-shirt: red/blue!", "a mans t shirt red blue"),
        ("<person> and  <PERSON>\n", "person and person"),
        ("...", ""),
        (" ".join("w" * 50), " ".join("w" * 30)),
    ],
)
def test_captions_are_cleaned_as_albef_does(text: str, cleaned: str, folder: Path) -> None:
    assert OpenBertTokenizer.load(folder).clean(text) == cleaned


def test_captions_of_bert_keep_all_but_spaces(folder: Path) -> None:
    assert BertTokenizer.load(folder).clean(" A man's\x00T-shirt. \n") == "A man's T-shirt."


def test_both_survive_a_pickle_and_a_save(folder: Path, tmp_path: Path) -> None:
    for kind in (BertTokenizer, OpenBertTokenizer):
        tokenizer = kind.load(folder)
        tokenizer.save(tmp_path / kind.__name__)
        for again in (pickle.loads(pickle.dumps(tokenizer)), kind.load(tmp_path / kind.__name__)):
            assert (again.encode(["a dog"], 9)[0] == tokenizer.encode(["a dog"], 9)[0]).all()
