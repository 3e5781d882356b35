"""CLIP's tokenizer: as transformers cuts texts, from each of the layouts in which vocabularies lie."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capfilt.data.synthetic import world
from capfilt.data.text.byte_bpe import ByteBpeTokenizer, build, entries
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.errors import TextError

MERGES = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("<", "|"), ("'", "s</w>"), ("d", "o")]
ODD = [
    "<|endoftext|>",
    "<|startoftext|>",
    "&amp;",
    "it's",
    "O'RE",
    "naïve",
    "你好",
    "🎉",
    "\x00",
    "\u2028",
    "  \t",
    "12",
    "İ",
]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> ByteBpeTokenizer:
    return ByteBpeTokenizer(build(entries(MERGES), MERGES))


@pytest.fixture(scope="module")
def theirs(ours: ByteBpeTokenizer, tmp_path_factory: pytest.TempPathFactory) -> transformers.CLIPTokenizer:
    """transformers' tokenizer of the folder that ours writes."""
    return transformers.CLIPTokenizer.from_pretrained(ours.save(tmp_path_factory.mktemp("bpe")).parent)


@settings(max_examples=60)
@given(st.lists(st.sampled_from(ODD) | st.text(max_size=8), max_size=6).map("".join))
@example("A cat, of the cat's  dogs!")
def test_texts_are_cut_as_transformers_does(ours: ByteBpeTokenizer, theirs: object, text: str) -> None:
    if not any(special in text.lower() for special in ("<|endoftext|>", "<|startoftext|>")):
        ids, mask = ours.encode([text], 1000)
        assert ids[0].tolist() == theirs(text).input_ids  # type: ignore[operator]
        assert mask.all()
    cleaned = ours.clean(text)
    assert cleaned == ours.clean(cleaned) or "&" in text
    assert "  " not in cleaned


def test_a_special_token_in_a_text_is_characters(ours: ByteBpeTokenizer, theirs: transformers.CLIPTokenizer) -> None:
    text = "a cat <|endoftext|> a dog"
    assert theirs(text).input_ids.count(ours.sep) == 2
    ids = ours.encode([text], 100)[0][0].tolist()
    assert (ids.count(ours.sep), ids[-1], ids[0]) == (1, ours.sep, ours.cls)


def test_a_long_text_is_cut_before_its_end_and_short_ones_are_padded_with_0(ours: ByteBpeTokenizer) -> None:
    ids, mask = ours.encode(["cat " * 200, "cat"], 77)
    cat = entries(MERGES)["cat</w>"]
    assert ids[0].tolist() == [ours.cls, *[cat] * 75, ours.sep]
    assert ids[1].tolist() == [ours.cls, cat, ours.sep, *[0] * 74]
    assert mask.sum(axis=1).tolist() == [77, 3]


def test_cleaning_resolves_references_twice_and_keeps_marks(ours: ByteBpeTokenizer) -> None:
    assert ours.clean(" A &amp;lt; B;\n(c) Dog's! ") == "a < b; (c) dog's!"
    assert ours.clean("one two three", 2) == "one two"
    assert ours.decode(ours.encode(["a cat, of"], 20)[0][0]) == "a cat , of"


class TestFiles:
    def test_each_layout_is_the_same(
        self, ours: ByteBpeTokenizer, theirs: transformers.CLIPTokenizer, tmp_path: Path
    ) -> None:
        original = tmp_path / "original"
        original.mkdir()
        lines = ["#version: 0.2", *map(" ".join, MERGES)]
        (original / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        theirs.save_pretrained(tmp_path / "full")
        ours.save(tmp_path / "pair")
        assert (tmp_path / "full/tokenizer.json").is_file()
        assert not (tmp_path / "pair/tokenizer.json").exists()
        for place in ("original", "full", "pair", "pair/vocab.json", "original/bpe_simple_vocab_16e6.txt.gz"):
            assert ByteBpeTokenizer.load(tmp_path / place).identity == ours.identity, place
        (tmp_path / "pair/model.pt").touch()
        assert tokenizer_of(tmp_path / "pair/model.pt", "byte-bpe").identity == ours.identity

    def test_other_rules_are_obeyed_and_kept(self, theirs: transformers.CLIPTokenizer, tmp_path: Path) -> None:
        theirs.save_pretrained(tmp_path)
        tree = json.loads((tmp_path / "tokenizer.json").read_text())
        tree["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"String": "cat"}, "content": "of"})
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
        obeying = ByteBpeTokenizer.load(tmp_path)
        obeying.save(tmp_path / "again")
        again = ByteBpeTokenizer.load(tmp_path / "again")
        assert again.identity == obeying.identity
        for one in (obeying, again, pickle.loads(pickle.dumps(again))):
            assert one.encode(["cat <|endoftext|>"], 9)[0][0, 1] == entries(MERGES)["of</w>"]
            assert one.encode(["cat <|endoftext|>"], 99)[0][0].tolist().count(one.sep) == 1

    @pytest.mark.parametrize(
        ("name", "content", "why"),
        [
            ("tokenizer.json", '{"model": {"type": "WordPiece"}}', "kind WordPiece"),
            ("tokenizer.json", '{"model": {"type": "BPE", "end_of_word_suffix": ""}}', "whose words end with </w>"),
            (
                "tokenizer.json",
                '{"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": 3}}',
                "no tokenizer can",
            ),
            ("vocab.json", '{"a": 0, "b": 2}', r"merges\.txt"),
            ("vocab.txt", "a", "no byte BPE at"),
            ("bpe_simple_vocab_16e6.txt.gz", "no gzip", "allowed are|Allowed are"),
        ],
    )
    def test_what_is_no_tokenizer_of_clip_is_one_line(self, name: str, content: str, why: str, tmp_path: Path) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(TextError, match=why) as refused:
            ByteBpeTokenizer.load(tmp_path)
        assert "\n" not in str(refused.value)

    def test_tokens_behind_the_end_are_refused(self, tmp_path: Path) -> None:
        vocab = entries(MERGES)
        with pytest.raises(TextError, match="as the last of its consecutive ids"):
            ByteBpeTokenizer(build({**vocab, "<extra>": len(vocab)}, MERGES))


def test_the_world_has_its_words_as_tokens() -> None:
    tokenizer = ByteBpeTokenizer.load("world")
    words = [word for word in world.vocabulary() if word.isalpha()]
    assert len(words) > 100
    assert all(len(tokenizer.encode([word], 9)[0][0]) == 3 for word in words)
    assert len(tokenizer) < 1000
    assert tokenizer.decode(tokenizer.encode(["zebras in q!"], 40)[0][0]) == "zebras in q !"
