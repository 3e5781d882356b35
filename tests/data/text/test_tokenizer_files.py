"""Tokenizers as their folders describe them: the same ids as transformers gives, in many languages."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import TextError

TEXTS = [
    "A woman on a Bench, isn't it? 22.05",
    "schöne Kühe und schon Kuhe",
    "Une élève où ça, DÉJÀ",
    "벤치에 앉은 여자",
    "ベンチに座っている女性。",
    "一只狗坐在长椅上，很可爱",
    "लाल गाड़ी",
    "женщина на скамейке",
    "một người phụ nữ",
    "İstanbul'da bir kedi",
    "Η γάτα ΣΤΟ σπίτι",
    "قطة على كرسيّ",
    "חתול על כיסא",
    "แมวอยู่บนเก้าอี้",
    "ឆ្មានៅលើកៅអី ແມວ",
    "cafe\u0301 👩\u200d👩\u200d👧 [SEP] [MASK] \x07 T恤",
]
SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
RULES = [
    {"do_lower_case": False, "strip_accents": False},
    {"do_lower_case": False},
    {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    {"do_lower_case": True},
]


@pytest.fixture(scope="module")
def vocab() -> list[str]:
    """Some words, and the characters of all texts, in both cases, as multilingual BERTs have them."""
    both = [form for text in TEXTS for form in (text, text.lower(), text.upper())]
    letters = sorted({letter for text in both for letter in text if not letter.isspace()})
    words = ["schöne", "schon", "Kühe", "벤치에", "여자", "गाड़ी", "женщина", "người", "Bench", "DÉJÀ", "一只狗", "แมว"]
    return [*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters)]


def same(ours: Tokenizer, theirs: Any) -> None:
    for text in TEXTS:
        wanted = theirs(text, split_special_tokens=True).input_ids
        assert ours.encode([text], 64)[0][0].tolist() == wanted[:63] + wanted[-1:] * (len(wanted) > 63), text


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_a_folder_is_obeyed_in_many_languages(vocab: list[str], rules: dict[str, Any], tmp_path: Path) -> None:
    theirs = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}, **rules)
    theirs.save_pretrained(tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (tmp_path / "parts" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **rules}))
    for ours in (Tokenizer.load(tmp_path / "whole"), Tokenizer.load(tmp_path / "parts")):
        same(ours, theirs)
        assert ours.lower_case is rules["do_lower_case"]
        assert ours.vocab == (*vocab, "[DEC]", "[ENC]")
        assert ours.clean("A Red (Car).") == ("a red car" if rules["do_lower_case"] else "A Red Car")
        again = ours.save(tmp_path / "saved" / str(len(list(tmp_path.iterdir())))).parent
        for other in (Tokenizer.load(again), pickle.loads(pickle.dumps(ours))):
            same(other, theirs)
            assert (other.vocab, other.dec, other.enc, other.rules) == (ours.vocab, ours.dec, ours.enc, ours.rules)
        # The usual rules need no more than the vocabulary, which is what folders always held.
        assert (again / "tokenizer.json").exists() is (rules != {"do_lower_case": True})


def test_capitals_survive_from_the_text_to_the_caption(vocab: list[str], tmp_path: Path) -> None:
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}, do_lower_case=False).save_pretrained(
        tmp_path
    )
    ours = Tokenizer.load(tmp_path)
    for text in ("schöne Kühe", "벤치에 여자", "Bench, DÉJÀ", "一只狗坐在长椅上，很可爱", "ベンチに座っている女性。"):
        assert ours.decode(ours.encode([text], 64)[0][0]) == text


def test_added_tokens_are_words_and_special_ones_never_are(vocab: list[str], tmp_path: Path) -> None:
    theirs = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}, do_lower_case=False)
    theirs.add_tokens(["T恤", "👩\u200d👩\u200d👧"])
    theirs.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]", "<image>"]})
    theirs.save_pretrained(tmp_path / "whole")
    ours = Tokenizer.load(tmp_path / "whole")
    same(ours, theirs)
    assert (ours.dec, ours.enc, len(ours)) == (len(vocab) + 2, len(vocab) + 3, len(vocab) + 5)
    ids = ours.encode(["T恤 [DEC] <image>"], 30)[0][0].tolist()
    assert len(vocab) in ids
    assert not {ours.dec, ours.enc, len(vocab) + 4} & set(ids)
    assert ours.decode([len(vocab), len(vocab) + 4, ours.enc]) == "T恤"
    # The same in the files of older versions.
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    (parts / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    (parts / "added_tokens.json").write_text(json.dumps({"T恤": len(vocab), "👩\u200d👩\u200d👧": len(vocab) + 1}))
    same(Tokenizer.load(parts), theirs)


def test_other_names_of_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("<pad>\n<unk>\n<s>\n</s>\n<mask>\ndog\n")
    said = {"pad_token": "<pad>", "unk_token": {"content": "<unk>"}, "cls_token": "<s>", "sep_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({**said, "mask_token": "<mask>"}))
    ours = Tokenizer.load(tmp_path)
    assert (ours.pad, ours.unk, ours.cls, ours.sep, ours.mask, ours.dec) == (0, 1, 2, 3, 4, 6)
    assert ours.encode(["a dog"], 9)[0].tolist() == [[2, 1, 5, 3]]
    ours.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").encode(["a dog"], 9)[0].tolist() == [[2, 1, 5, 3]]


def written(name: str, content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "vocab.txt").write_text("\n".join([*SPECIAL, "dog"]) + "\n")
        (folder / name).write_text(content)

    return write


def bert(**changes: Any) -> str:
    ids = {word: i for i, word in enumerate([*SPECIAL, "dog"])}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": ids}
    model |= {"max_input_chars_per_word": 100}
    return json.dumps({"model": model | changes.pop("model", {}), "added_tokens": [], **changes})


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (written("tokenizer_config.json", '{"tokenizer_class": "BertJapaneseTokenizer"}'), "BertJapaneseTokenizer"),
        (written("tokenizer_config.json", '{"tokenizer_class": "XLMRobertaTokenizer"}'), "XLMRobertaTokenizer"),
        (written("tokenizer_config.json", '{"never_split": ["dog"]}'), "never_split"),
        (written("tokenizer_config.json", '{"do_lower_case": "no"}'), "do_lower_case is neither true nor false"),
        (written("tokenizer_config.json", "[" * 100_000), "nested too deeply"),
        (written("tokenizer_config.json", "7"), "holds a int"),
        (written("tokenizer_config.json", '{"cls_token": 5}'), "cls_token is 5"),
        (written("tokenizer_config.json", '{"cls_token": "<s>"}'), "lacks <s>"),
        (
            written("tokenizer_config.json", '{"added_tokens_decoder": {"99": {"content": "cat"}}}'),
            "should have the id 99",
        ),
        (written("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": "dog"}}}'), "the ids 6 and 1"),
        (written("added_tokens.json", '{"cat": "x"}'), "invalid literal"),
        (written("tokenizer.json", bert(model={"type": "BPE"})), "of the kind BPE"),
        (written("tokenizer.json", bert(model={"continuing_subword_prefix": "@@"})), "'@@'"),
        (written("tokenizer.json", bert(model={"vocab": {"[PAD]": 0}})), "lacks"),
        (written("tokenizer.json", bert(model={"vocab": {word: 3 * i for i, word in enumerate(SPECIAL)}})), "left out"),
        (written("tokenizer.json", bert(normalizer={"type": "Nothing"})), "no tokenizer can be made of it"),
        (written("tokenizer.json", "{"), "cannot be used"),
    ],
)
def test_what_cannot_be_obeyed_is_one_line(break_it: Callable[[Path], None], why: str, tmp_path: Path) -> None:
    break_it(tmp_path)
    with pytest.raises(TextError, match=r"the tokenizer at '.*' cannot be used: ") as told:
        Tokenizer.load(tmp_path)
    assert why in str(told.value)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 600


def test_a_normalizer_that_says_the_contrary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        bert(normalizer={"type": "Lowercase"}, pre_tokenizer={"type": "BertPreTokenizer"})
    )
    assert Tokenizer.load(tmp_path).lower_case
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(TextError, match=r"do_lower_case false and the normalizer of tokenizer\.json the contrary"):
        Tokenizer.load(tmp_path)
