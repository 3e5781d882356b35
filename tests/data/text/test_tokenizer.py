from __future__ import annotations

import pickle
import re
import unicodedata

import numpy as np
import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capfilt.data.text.tokenizer import MAX_CHARACTERS, Tokenizer, clean_caption
from capfilt.errors import TextError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PUNCTUATION = list("[](){}<>.,;:!?'\"-_/\\#&*+=@%~$^`|")
WORDS = ["dog", "cat", "un", "##believ", "##able", "cafe", "the", "犬", "猫", "😀", "straße", "mask", "sep"]
VOCAB = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS), *PUNCTUATION]

TRICKY = st.sampled_from(
    [
        "Café",
        "cafe\u0301",
        "犬猫",
        "😀",
        "👩‍👩‍👧",
        "\x00",
        "\x07",
        "\u200b",
        "\ufeff",
        "\ufffd",
        "\xa0",
        "\n\t",
        "[SEP]",
        "[MASK]",
        "##s",
        "Straße",
        "İ",
        "ﬁ",
        "A" * 101,
        "don't",
        "...",
        "—",
        "\u2028",
        "क्षि",
        "한국",
        "e\u0301\u0300",
    ]
)
TEXTS = st.lists(TRICKY | st.sampled_from(WORDS) | st.text(st.characters(codec="utf-8"), max_size=12), max_size=8).map(
    " ".join
) | st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.fixture(scope="module")
def pair():
    return Tokenizer(VOCAB), reference(VOCAB)


def reference(vocab):
    """transformers' BERT with BLIP's marks, told not to obey special tokens spelled out in a text."""
    words = {token: index for index, token in enumerate(vocab)}
    bert = transformers.BertTokenizer(vocab=words)
    bert.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return bert


def assert_parity(pair, texts, max_length):
    ours, bert = pair
    theirs = bert(
        texts,
        padding="longest",
        truncation=True,
        max_length=max_length,
        split_special_tokens=True,
        return_tensors="np",
    )
    ids, mask = ours.encode(texts, max_length)
    assert ids.dtype == mask.dtype == np.int64
    assert np.array_equal(ids, theirs["input_ids"])
    assert np.array_equal(mask, theirs["attention_mask"])
    for row in ids:
        said = bert.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=True)
        assert ours.decode(row) == without_cjk_spaces(said)


def without_cjk_spaces(text):
    """BERT's decoding without the spaces that stand between two Chinese or Japanese characters."""
    kept = []
    for place, letter in enumerate(text):
        around = text[max(0, place - 1) : place] + text[place + 1 : place + 2]
        if letter != " " or len(around) < 2 or not all(unspaced(other) for other in around):
            kept.append(letter)
    return "".join(kept)


def unspaced(letter):
    name = unicodedata.name(letter, "")
    return any(word in name for word in ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "FULLWIDTH", "HALFWIDTH"))


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), max_length=st.integers(2, 40))
@example(texts=["the dogs [SEP] unbelievable, cat. 犬猫", ""], max_length=12)
def test_parity_with_transformers(pair, texts, max_length):
    assert_parity(pair, texts, max_length)


def test_parity_on_berts_vocabulary(shared_dir):
    path = shared_dir / "vocab" / "bert-base-uncased.txt"
    if not path.is_file():
        pytest.skip("no BERT vocabulary in the folder of reference material")
    ours = Tokenizer.load(path)
    assert (len(ours), ours.dec, ours.enc) == (30524, 30522, 30523)
    assert (ours.pad, ours.unk, ours.cls, ours.sep, ours.mask) == (0, 100, 101, 102, 103)
    both = ours, reference(ours.vocab[:30522])

    @settings(max_examples=200, deadline=None)
    @given(texts=st.lists(TEXTS, min_size=1, max_size=3), max_length=st.integers(2, 40))
    def check(texts, max_length):
        assert_parity(both, texts, max_length)

    check()


def test_ids_are_padded_to_the_longest_and_cut_before_sep(pair):
    ours, _ = pair
    ids, mask = ours.encode(["the dog", "the cat cat cat cat"], 5)
    word = ours.vocab.index
    assert ids.tolist() == [
        [ours.cls, word("the"), word("dog"), ours.sep, ours.pad],
        [ours.cls, word("the"), word("cat"), word("cat"), ours.sep],
    ]
    assert mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert ours.encode([], 5)[0].shape == (0, 0)
    with pytest.raises(TextError, match="max_length 1"):
        ours.encode(["a"], 1)


@given(text=st.lists(st.sampled_from([*SPECIAL, "[DEC]", "[ENC]", "a", " "]), max_size=6).map("".join))
def test_a_text_never_yields_a_special_id(text):
    ours = Tokenizer(VOCAB)
    ids = ours.encode([text], 64)[0][0, 1:-1]
    assert not {ours.pad, ours.cls, ours.sep, ours.mask, ours.dec, ours.enc} & set(ids.tolist())


def test_decode_drops_specials_and_joins_pieces(pair):
    ours, _ = pair
    word = ours.vocab.index
    ids = [
        ours.dec,
        word("un"),
        word("##believ"),
        word("##able"),
        word("dog"),
        word("##s"),
        word("."),
        ours.sep,
        ours.pad,
    ]
    assert ours.decode(np.array(ids)) == ours.decode(ids) == "unbelievable dogs."
    assert ours.decode([]) == ""


def test_hostile_texts_are_survived(pair):
    ours, _ = pair
    assert ours.encode(["\ud800 dog \udfff"], 9)[0].tolist() == ours.encode(["dog"], 9)[0].tolist()
    assert ours.encode(["dog " * 4_000_000], 9)[0].shape == (1, 9)


def test_saved_loaded_and_pickled_it_is_the_same(pair, tmp_path):
    ours, _ = pair
    assert ours.save(tmp_path / "new").name == "vocab.txt"
    assert ours.vocab[-2:] == ("[DEC]", "[ENC]")
    for other in (
        Tokenizer.load(tmp_path / "new"),
        Tokenizer.load(tmp_path / "new/vocab.txt"),
        pickle.loads(pickle.dumps(ours)),
    ):
        assert (other.vocab, other.dec, other.enc) == (ours.vocab, ours.dec, ours.enc)
        assert other.encode(["unbelievable"], 9)[0].tolist() == ours.encode(["unbelievable"], 9)[0].tolist()


def test_the_world_has_a_vocabulary():
    ours = Tokenizer.load("world")
    assert len(ours) == len(set(ours.vocab))
    ids, _ = ours.encode(["a red circle"], 16)
    assert ours.decode(ids[0]) == "a red circle"


@pytest.mark.parametrize(
    ("vocab", "message"),
    [(VOCAB[1:], r"lacks \[PAD\]"), ([*VOCAB, "dog"], "'dog' twice"), ([], "lacks"), (["a"], r"\[MASK\]")],
)
def test_a_vocabulary_that_cannot_work_is_refused(vocab, message):
    with pytest.raises(TextError, match=message):
        Tokenizer(vocab)


def test_a_missing_vocabulary_names_what_is_allowed(tmp_path):
    with pytest.raises(TextError, match=r"no vocabulary at 'wrld'; allowed are 'world', .* Did you mean 'world'"):
        Tokenizer.load("wrld")
    with pytest.raises(TextError, match="no vocabulary"):
        Tokenizer.load(tmp_path)


def blips(text, max_words=30):
    """BLIP's own cleaning, written from its description."""
    text = re.sub(r"\s{2,}", " ", re.sub(r"[.!\"()*#:;~]", " ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


@given(text=st.text(st.sampled_from("aB .!\"()*#:;~,'?-"), max_size=80), max_words=st.integers(1, 40))
def test_captions_are_cleaned_as_blip_does(text, max_words):
    assert clean_caption(text, max_words) == blips(text, max_words)


@given(text=st.text(st.characters() | st.characters(categories=["Cc", "Cs", "Zs"]), max_size=200))
def test_cleaning_any_text_gives_at_most_30_clean_words(text):
    cleaned = clean_caption(text)
    words = cleaned.split(" ") if cleaned else []
    assert len(words) <= 30
    assert all(words)
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in cleaned)
    assert clean_caption(cleaned) == cleaned


def test_cleaning_by_example():
    assert (
        clean_caption('A  "Dog" (brown)\x00: it\'s, OK? well-known!!\n#tag') == "a dog brown it's, ok? well-known tag"
    )
    assert len(clean_caption("x" * 50_000)) == MAX_CHARACTERS


def test_what_transformers_5_saves_is_the_same_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), bos_token="[DEC]", extra_special_tokens=["[ENC]"])
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.txt").exists()
    assert Tokenizer.load(tmp_path / "saved").vocab == Tokenizer(VOCAB).vocab == (*VOCAB, "[DEC]", "[ENC]")
    assert Tokenizer.load(tmp_path / "saved" / "tokenizer.json").vocab == Tokenizer(VOCAB).vocab


def test_the_vocabulary_of_a_pth_lies_beside_it(tmp_path):
    Tokenizer(VOCAB).save(tmp_path)
    assert Tokenizer.load(tmp_path / "model.pth").vocab == Tokenizer(VOCAB).vocab
    with pytest.raises(TextError, match="no vocabulary at"):
        Tokenizer.load(tmp_path / "elsewhere" / "model.pth")


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "BPE", "vocab": {}}, "added_tokens": []}', "{}"])
def test_another_tokenizer_json_is_refused(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(
        TextError, match=r"the tokenizer at .* cannot be used: .* BERT's vocab\.txt and tokenizer\.json"
    ):
        Tokenizer.load(tmp_path)
