from __future__ import annotations

from pathlib import Path

import pytest

from capfilt.data.text.language_tokenizer import Kind, LanguageTokenizer, tokenizer_of
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import TextError

TEXTS = ["a red square above a blue circle", "the green star", "two circles, one red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer as OPT has one, saved by transformers."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS * 10, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False)
    path = tmp_path_factory.mktemp("language")
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(path)
    return path


def test_a_text_of_opt_begins_with_its_mark_and_ends_with_a_line_break(folder: Path) -> None:
    tokenizer = LanguageTokenizer.load(folder, "opt")
    ids, mask = tokenizer.encode(TEXTS, 32)
    newline = tokenizer._tokens("\n").input_ids[-1]
    assert tokenizer.sep == newline
    for row, seen, text in zip(ids, mask, TEXTS, strict=True):
        length = int(seen.sum())
        assert seen.tolist() == [1] * length + [0] * (len(seen) - length)
        assert row[0] == tokenizer.cls == 2
        assert row[length - 1] == newline
        assert set(row[length:]) <= {tokenizer.pad}
        assert tokenizer.decode(row) == text
    assert len({int(seen.sum()) for seen in mask}) > 1


def test_what_is_cut_has_no_end_of_opt(folder: Path) -> None:
    tokenizer = LanguageTokenizer.load(folder, "opt")
    whole = tokenizer.encode(TEXTS[:1], 64)[0][0].tolist()
    cut = tokenizer.encode(TEXTS[:1], 4)[0][0].tolist()
    assert cut == whole[:4]
    assert tokenizer.sep not in cut


def test_what_is_cut_ends_of_t5(folder: Path) -> None:
    """As transformers' tokenizers cut: an answer that is too long is learned to end where it was cut."""
    tokenizer = LanguageTokenizer.load(folder, "t5")
    whole = tokenizer.encode(TEXTS, 64)[0][0].tolist()
    ids, mask = tokenizer.encode(TEXTS, 4)
    assert ids[0].tolist() == [*whole[:3], tokenizer.sep]
    assert mask.sum(axis=1).max() == 4
    assert all(row[int(seen.sum()) - 1] == tokenizer.sep for row, seen in zip(ids, mask, strict=True))
    exact = int(tokenizer.encode(TEXTS[:1], 64)[1].sum())
    assert tokenizer.encode(TEXTS[:1], exact)[0][0].tolist() == whole[:exact]


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_written_text_has_no_loose_punctuation(folder: Path, kind: Kind) -> None:
    tokenizer = LanguageTokenizer.load(folder, kind)
    written = tokenizer._tokens("is it red ? no , it isn 't . it 's green !", add_special_tokens=False).input_ids
    assert tokenizer.decode(written) == "is it red? no, it isn 't. it's green!"


def test_a_space_at_the_end_of_the_prompt_is_no_token(folder: Path) -> None:
    """With it the public code leaves the first word of the caption out of the loss too."""
    tokenizer = LanguageTokenizer.load(folder)
    opening = tokenizer.decoder_prompt("a red ", 32)
    whole = tokenizer.encode(["a red square"], 32)[0][0].tolist()
    assert opening == tokenizer.decoder_prompt("a red", 32) == whole[: len(opening)]
    assert tokenizer.encode(["a red "], 32)[0].shape[1] - 1 == len(opening)
    assert tokenizer.decoder_prompt("", 32) == [tokenizer.cls]


def test_t5_has_an_end_and_no_beginning(folder: Path) -> None:
    tokenizer = LanguageTokenizer.load(folder, "t5")
    row = tokenizer.encode(TEXTS[1:2], 32)[0][0].tolist()
    assert row[-1] == tokenizer.sep == 2
    assert tokenizer.decode(row) == TEXTS[1]
    assert tokenizer.decoder_prompt("", 32) == [tokenizer.pad]
    assert tokenizer.decoder_prompt("a red", 32) == [tokenizer.pad], "a prompt is the encoder's"
    assert [*tokenizer.encoder_prompt("a red "), tokenizer.sep] == tokenizer.encode(["a red"], 32)[0][0].tolist()
    assert tokenizer.encoder_prompt("") == LanguageTokenizer.load(folder, "opt").encoder_prompt("a red") == []


def test_it_is_saved_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    tokenizer = LanguageTokenizer.load(folder)
    tokenizer.save(tmp_path)
    again = tokenizer_of(tmp_path, "opt")
    assert isinstance(again, LanguageTokenizer)
    assert again.vocab == tokenizer.vocab
    assert len(again) == len(tokenizer) == len(set(tokenizer.vocab))
    assert (again.encode(TEXTS, 32)[0] == tokenizer.encode(TEXTS, 32)[0]).all()
    assert type(tokenizer_of("world", None)) is Tokenizer


def test_what_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no tokenizer of a language model at"):
        LanguageTokenizer.load(tmp_path)


def test_wordpiece_begins_with_dec() -> None:
    tokenizer = Tokenizer.load("world")
    ids = tokenizer.encode(["a red"], 32)[0][0].tolist()
    assert tokenizer.decoder_prompt("a red", 32) == [tokenizer.dec, *ids[1:-1]]
    assert tokenizer.decoder_prompt("", 32) == [tokenizer.dec]
