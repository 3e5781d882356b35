"""Text to ids and back: BERT's WordPiece with BLIP's marks `[DEC]` and `[ENC]`; and the cleaning of captions.

A text never yields a special id: "[SEP]" written in a web caption is five ordinary characters here, where
transformers' BERT tokenizer would obey it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers

from capfilt.errors import TextError, did_you_mean
from capfilt.reports.copies import at_hand
from capfilt.reports.ledger import atomic
from capfilt.reports.places import Place, place

MAX_CHARACTERS = 10_000
"""Texts are cut here before anything else; no caption is this long, and hostile ones are much longer."""

_NEEDED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MARKS = ("[DEC]", "[ENC]")
# What transformers tightens after decoding, in its order; the captions of BLIP's paper went through it.
_LOOSE = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Tokenizer:
    """WordPiece over a vocabulary in BERT's form; marks it lacks are appended (BERT: 30522 and 30523)."""

    def __init__(self, vocab: Sequence[str]) -> None:
        """Args:
            vocab: one token per id.

        Raises:
            TextError: a special token is missing, or a token comes twice.
        """
        ids = {token: index for index, token in enumerate(vocab)}
        if len(ids) != len(vocab):
            twice = next(token for index, token in enumerate(vocab) if ids[token] != index)
            raise TextError(f"the vocabulary holds '{twice}' twice; every token stands for one id")
        if missing := [token for token in _NEEDED if token not in ids]:
            raise TextError(f"the vocabulary lacks {', '.join(missing)}; BERT's form needs {', '.join(_NEEDED)}")
        for mark in _MARKS:
            ids.setdefault(mark, len(ids))
        self.vocab = tuple(ids)
        self.pad, self.unk, self.cls, self.sep, self.mask = (ids[token] for token in _NEEDED)
        self.dec, self.enc = (ids[mark] for mark in _MARKS)
        self._special = frozenset(ids[token] for token in (*_NEEDED, *_MARKS))
        self._engine = Engine(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self._engine.normalizer = normalizers.BertNormalizer()
        self._engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._engine.decoder = decoders.WordPiece(prefix="##", cleanup=True)

    @classmethod
    def load(cls, source: str | Place) -> Tokenizer:
        """Load "world" (the built-in corpus), or the vocab.txt or tokenizer.json in a folder, beside a .pth, or itself;
        on a store, too.

        Raises:
            TextError: nothing of the kind at `source`.
        """
        if source == "world":
            from capfilt.data import world  # here, not above: only this one vocabulary needs the corpus

            return cls(world.vocabulary())
        try:
            where = place(source)
            path = at_hand(where.parent if where.name.endswith(".pth") else where)
            if path.is_dir():
                path = next((path / name for name in ("vocab.txt", "tokenizer.json") if (path / name).is_file()), path)
            text = path.read_text(encoding="utf-8")
            return cls(_entries(json.loads(text)) if path.suffix == ".json" else text.removesuffix("\n").split("\n"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            hint = did_you_mean(str(source), ["world"])
            allowed = "allowed are 'world', a folder with BERT's vocab.txt or tokenizer.json, such a file"
            raise TextError(f"no vocabulary at '{source}'; {allowed}.{hint}") from error

    def save(self, folder: Place | str) -> Place:
        """Write `folder`/vocab.txt, the marks included; return its path."""
        path = place(folder) / "vocab.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write("".join(f"{token}\n" for token in self.vocab).encode("utf-8"))
        return path

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts as `[CLS] ... [SEP]`, padded to the longest of them.

        Returns: ids and mask, int64 [B, T], T <= `max_length`; what is too long is cut before its [SEP].

        Raises:
            TextError: `max_length` leaves no room for [CLS] and [SEP].
        """
        if max_length < 2:
            raise TextError(f"max_length {max_length}; at least 2 is needed, for [CLS] and [SEP]")
        rows = [[self.cls, *self._pieces(text)[: max_length - 2], self.sep] for text in texts]
        length = max(map(len, rows), default=0)
        ids = np.full((len(rows), length), self.pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return ids, mask

    def question(self, prompt: str) -> list[int]:
        """What of a prompt is read by an encoder beside the image: nothing, the text begins with it."""
        return []

    def opening(self, prompt: str, max_length: int) -> list[int]:
        """What a text that is written begins with: [DEC], and the prompt without an end."""
        ids, mask = self.encode([prompt], max_length)
        return [self.dec, *ids[0, 1 : int(mask.sum()) - 1].tolist()]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn one row of ids into text: specials dropped, pieces joined, `don ' t .` made `don't.`"""
        kept = [int(index) for index in ids if int(index) not in self._special]
        text: str = self._engine.decode(kept, skip_special_tokens=False)
        for loose in _LOOSE:
            text = text.replace(loose, loose.strip())
        return text

    def _pieces(self, text: str) -> list[int]:
        # One by one: encode_batch starts threads of its own, which do not survive a fork into a loader's
        # worker.
        readable = _SURROGATE.sub("\ufffd", text[:MAX_CHARACTERS])
        return list(self._engine.encode(readable, add_special_tokens=False).ids)


def _entries(tokenizer: dict[str, Any]) -> list[str]:
    """The tokens of a `tokenizer.json` by their ids; transformers since 5 saves nothing else."""
    ids = tokenizer["model"]["vocab"] | {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    if tokenizer["model"]["type"] != "WordPiece" or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("not a WordPiece vocabulary without gaps")
    return sorted(ids, key=ids.__getitem__)


def clean_caption(text: str, max_words: int = 30) -> str:
    """Clean a caption as BLIP does: lower case, `.!"()*#:;~` become spaces, spaces collapse, `max_words`
    words stay.

    Commas, apostrophes, question marks and hyphens stay too. Control characters count as spaces. Never
    raises.
    """
    spaced = _CONTROL.sub(" ", _PUNCTUATION.sub(" ", text[:MAX_CHARACTERS].lower()))
    return " ".join(spaced.split()[:max_words])
