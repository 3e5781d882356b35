"""CLIP's tokenizer: byte pairs of lower-cased words, between <|startoftext|> and <|endoftext|>.

A text never yields a special id, as everywhere here: "<|endoftext|>" written in a web caption is ordinary characters,
where OpenAI's code would end the text there. OpenAI also runs ftfy, which mends broken encodings; transformers does
not, and neither does this.
"""

from __future__ import annotations

import gzip
import html
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from capfilt.data.text.tokenizer import MAX_CHARACTERS, Tokenizer
from capfilt.data.text.tokenizer_files import finished, made
from capfilt.errors import TextError
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.documents import MODEL_BYTES, read_model_object
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, storage_path

FULL, VOCABULARY, MERGES, ORIGINAL = "tokenizer.json", "vocab.json", "merges.txt", "bpe_simple_vocab_16e6.txt.gz"
"""Where transformers has it (the first, or the second with the third), and OpenAI's code."""
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
"""What the last piece of a word ends with."""
ENTRIES = 49408
"""Of OpenAI's vocabulary; its file has more merges than are used."""
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""The words of a text (OpenAI)."""
ALLOWED = f"a folder with CLIP's {FULL}, or {VOCABULARY} and {MERGES}, or {ORIGINAL}, or such a file"

Merges = Sequence[tuple[str, str]]


class ByteBpeTokenizer(Tokenizer):
    """Byte-level BPE as CLIP has it. Its texts are padded with 0, which counts for nothing: a text is read left to
    right, and used from its end."""

    known_as, marks_beside = "CLIP", ""

    def __init__(self, engine: Engine) -> None:
        """`engine`: a byte-level BPE of the `tokenizers` library. TextError where the two special tokens are missing,
        or others come behind them."""
        ids = engine.get_vocab()
        if sorted(ids.values()) != list(range(len(ids))) or ids.get(END) != len(ids) - 1 or START not in ids:
            raise TextError(f"the vocabulary must have {START}, and {END} as the last of its consecutive ids")
        self._engine = finished(engine, decoders.ByteLevel())
        self.vocab = tuple(sorted(ids, key=ids.__getitem__))
        self.pad, self.cls, self.sep = 0, ids[START], ids[END]
        self._special = frozenset({self.cls, self.sep})
        tree = json.loads(engine.to_str())
        self._merges = tuple(tuple(m.split(" ") if isinstance(m, str) else m) for m in tree["model"]["merges"])
        usual = json.loads(build({}, []).to_str())
        self._plain = all(_without_specials(tree[part]) == usual[part] for part in ("normalizer", "pre_tokenizer"))

    @classmethod
    def load(cls, source: str | StoragePath) -> ByteBpeTokenizer:
        """Load "world" (made for the embedded world), or what lies in a folder, in a file, or beside a checkpoint.
        TextError for none at `source`, or one that is no tokenizer of CLIP."""
        if source == "world":
            from capfilt.data.synthetic import world  # here, not above: only this one vocabulary needs the corpus

            return cls(build(*of_words(token for token in world.vocabulary() if token.isalpha())))
        try:
            where = storage_path(source)
            path = local_copy(where.parent if where.name.endswith((".pt", ".pth", ".bin", ".safetensors")) else where)
            return cls(read(path))
        except OSError as error:
            raise TextError(f"no byte BPE at '{source}' ({error}); allowed are 'world', {ALLOWED}") from error
        except (ValueError, TypeError, KeyError, TextError) as error:
            raise TextError(f"the tokenizer at '{source}' cannot be used: {error}. Allowed are {ALLOWED}") from error

    def save(self, folder: StoragePath | str) -> StoragePath:
        """Write `folder`/vocab.json and merges.txt, and return the first's path; beside it a tokenizer.json where words
        are cut otherwise than OpenAI does."""
        path = storage_path(folder) / VOCABULARY
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {token: index for index, token in enumerate(self.vocab)})
        with atomic(path.with_name(MERGES)) as file:
            file.write("".join(f"{line}\n" for line in ("#version: 0.2", *map(" ".join, self._merges))).encode())
        if self.rules:
            with atomic(path.with_name(FULL)) as file:
                file.write(self.rules.encode())
        return path

    @property
    def rules(self) -> str:
        """How words are cut, as a `tokenizer.json`; "" where they are cut as OpenAI does."""
        return "" if self._plain else str(self._engine.to_str())

    @property
    def settings(self) -> dict[str, Any]:
        ends = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        return {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **ends}

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.vocab, self._merges, self.rules)

    def clean(self, text: str, max_words: int = MAX_CHARACTERS) -> str:
        """A text as CLIP was trained to read it: character references resolved, spaces collapsed, lower case."""
        plain = html.unescape(html.unescape(text[:MAX_CHARACTERS]))
        return " ".join(plain.lower().split()[:max_words])

    def spelled_out(self, text: str) -> tuple[int, int]:
        """How many characters of a cleaned text are tokens of a character or less, and how many it has, without spaces.
        Words of one character count as spelled out; of a vocabulary that knows a language's words they are few."""
        tokens = [self.vocab[index].removesuffix(WORD_END) for index in self._pieces(text)]
        return sum(len(token) == 1 for token in tokens), sum(map(len, tokens))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        finished(self._engine, decoders.ByteLevel())

    def decoder_prompt(self, prompt: str, max_length: int) -> list[int]:
        return [self.cls, *self._pieces(prompt)][:max_length]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn one row of ids into text: specials dropped, words apart."""
        kept = [int(index) for index in ids if int(index) not in self._special and int(index) < len(self.vocab)]
        return str(self._engine.decode(kept)).replace(WORD_END, " ").strip()


def build(vocab: dict[str, int], merges: Merges) -> Engine:
    """The engine that cuts texts as OpenAI does, with transformers' normalizer."""
    engine = Engine(models.BPE(vocab, list(merges), end_of_word_suffix=WORD_END))
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    engine.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return engine


def read(path: Path) -> Engine:
    """The engine that a folder or a file describes.

    Raises:
        OSError: nothing of the kind there.
        ValueError: what is no tokenizer of CLIP, in one line.
    """
    if path.is_dir():
        path = next((path / name for name in (FULL, VOCABULARY, ORIGINAL) if (path / name).is_file()), path / FULL)
    if path.name.endswith(".gz"):
        lines = _lines(path)
        merges = [tuple(line.split()) for line in lines[1 : ENTRIES - 512 - 2 + 1]]
        return build(entries(merges), _pairs(merges, path))
    tree = read_model_object(path, 4 * MODEL_BYTES)
    if path.name != FULL:
        merges = [tuple(line.split()) for line in _lines(path.with_name(MERGES)) if not line.startswith("#version")]
        return made(lambda: build(tree, _pairs([pair for pair in merges if pair], path)))
    model = tree.get("model")
    model = model if isinstance(model, dict) else {}
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != WORD_END:
        raise ValueError(f"{FULL} is of the kind {model.get('type')}; CLIP's is a BPE whose words end with {WORD_END}")
    return made(lambda: Engine.from_str(json.dumps(tree)))


def entries(merges: Iterable[Sequence[str]]) -> dict[str, int]:
    """OpenAI's numbering: all bytes, all bytes at a word's end, what each merge makes, and the two special tokens."""
    alphabet = _alphabet()
    tokens = [*alphabet, *(letter + WORD_END for letter in alphabet), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(tokens)}


def of_words(words: Iterable[str]) -> tuple[dict[str, int], Merges]:
    """A vocabulary that can spell everything and has each of these words as one token.

    A word that the merges before it leave in several pieces gets merges that join them from the left. They come last,
    so that no word before it is cut otherwise for them.
    """
    rank: dict[tuple[str, str], int] = {}
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + WORD_END]
        while pairs := [pair for pair in itertools.pairwise(pieces) if pair in rank]:
            pieces = _joined(pieces, min(pairs, key=rank.__getitem__))
        while len(pieces) > 1:
            rank[pieces[0], pieces[1]] = len(rank)
            pieces = _joined(pieces, (pieces[0], pieces[1]))
    return entries(rank), list(rank)


def _joined(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Pieces with each occurrence of a pair made one."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def _alphabet() -> list[str]:
    """The characters that stand for the 256 bytes, in OpenAI's order: printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]


def _lines(path: Path) -> list[str]:
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        data = file.read(MODEL_BYTES + 1)
    if len(data) > MODEL_BYTES:
        raise ValueError(f"{path.name} is larger than {MODEL_BYTES} bytes")
    return data.decode("utf-8").splitlines()


def _pairs(merges: Sequence[Sequence[str]], path: Path) -> list[tuple[str, str]]:
    if any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path.name} holds lines that are no merge of two pieces")
    return [(first, second) for first, second in merges]


def _without_specials(rule: Any) -> Any:
    """A rule without the special tokens that transformers' files also name as words."""
    return json.loads(json.dumps(rule).replace(r"<\\|startoftext\\|>|<\\|endoftext\\|>|", ""))
