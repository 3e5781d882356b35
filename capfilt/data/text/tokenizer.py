"""Text to ids and back: BERT's WordPiece with BLIP's marks `[DEC]` and `[ENC]`; and the cleaning of captions.

A text never yields a special id: "[SEP]" written in a web caption is five ordinary characters here, where
transformers' BERT tokenizer would obey it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer as Engine

from capfilt.data.text import tokenizer_files
from capfilt.errors import TextError, did_you_mean
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, storage_path

MAX_CHARACTERS = 10_000
"""Texts are cut here before anything else; no caption is this long, and hostile ones are much longer."""

MAX_WORDS = 30
"""Words of a caption that BLIP keeps."""

# What transformers tightens after decoding, in its order; the captions of BLIP's paper went through it.
_LOOSE = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
# Chinese and Japanese have no spaces between words; BERT puts one around every Chinese character.
_UNSPACED = "\u3000-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff01-\uff9f\U00020000-\U0003ffff"
_BETWEEN_UNSPACED = re.compile(f"(?<=[{_UNSPACED}]) +(?=[{_UNSPACED}])")
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Tokenizer:
    """WordPiece over a vocabulary in BERT's form; marks it lacks are appended (BERT: 30522 and 30523)."""

    lower_case = True
    """Whether its texts lose their capitals."""
    known_as, marks_beside = "BERT", " and two"
    """Whose vocabularies it reads, and how many entries a model has beside such a one; for messages."""
    marks: ClassVar[tuple[str, ...]] = ("[DEC]", "[ENC]")
    """What BLIP's decoder and image-grounded encoder begin a text with; appended where the vocabulary lacks them."""
    closed: ClassVar[bool] = True
    """Whether a text ends with [SEP]."""
    _plain = True

    def __init__(self, vocab: Sequence[str] | Engine, names: Mapping[str, str] = tokenizer_files.NAMES) -> None:
        """Args:
            vocab: one token per id, cut as `bert-base-uncased` does; or an engine of `tokenizer_files`, which cuts as
                its files say.
            names: the special tokens "pad", "unk", "cls", "sep", "mask".

        Raises:
            TextError: a special token is missing, a token comes twice, or an id is no token's.
        """
        try:
            ids = vocab.get_vocab() if isinstance(vocab, Engine) else tokenizer_files.numbered(vocab)
        except ValueError as error:
            raise TextError(str(error)) from None
        if missing := [token for token in names.values() if token not in ids]:
            raise TextError(f"the vocabulary lacks {', '.join(missing)}; BERT's form needs {', '.join(names.values())}")
        if sorted(ids.values()) != list(range(len(ids))):
            raise TextError(
                f"the vocabulary has {len(ids)} tokens and ids up to {max(ids.values())}; none may be left out"
            )
        marks = [mark for mark in self.marks if mark not in ids]
        ids |= {mark: len(ids) + place for place, mark in enumerate(marks)}
        self._names = dict(names)
        self.vocab = tuple(sorted(ids, key=ids.__getitem__))
        self.pad, self.unk, self.cls, self.sep, self.mask = (ids[names[role]] for role in tokenizer_files.NAMES)
        if self.marks:
            self.dec, self.enc = (ids[mark] for mark in self.marks)
        if isinstance(vocab, Engine):
            self._engine = vocab
            self._engine.add_special_tokens([*names.values(), *self.marks])
        else:
            self._engine = tokenizer_files.wordpiece(ids)
        added = self._engine.get_added_tokens_decoder()
        special = {index for index, token in added.items() if token.special}
        self._special = frozenset(special) | {ids[token] for token in (*names.values(), *self.marks)}
        self._plain = tokenizer_files.is_plain(self._engine, self._names, (*names.values(), *self.marks))
        self.lower_case = tokenizer_files.lower_cases(self._engine)

    @classmethod
    def load(cls, source: str | StoragePath) -> Tokenizer:
        """Load "world" (the built-in vocabulary), or a tokenizer.json or vocab.txt by its path, its folder, or a .pth
        beside it, on a store too. The configuration files beside it count.

        Raises:
            TextError: none at `source`, or one with settings that are not supported.
        """
        if source == "world":
            from capfilt.data.synthetic import world  # here, not above: only this one vocabulary needs the corpus

            return cls(world.vocabulary())
        try:
            where = storage_path(source)
            path = local_copy(where.parent if where.name.endswith((".pth", ".pt", ".ckpt", ".th", ".bin")) else where)
            return cls(*tokenizer_files.read(path))
        except OSError as error:
            hint = did_you_mean(str(source), ["world"])
            allowed = "allowed are 'world', a folder with BERT's vocab.txt or tokenizer.json, such a file"
            raise TextError(f"no vocabulary at '{source}'; {allowed}.{hint}") from error
        except (ValueError, TypeError, TextError) as error:
            raise TextError(
                f"the tokenizer at '{source}' cannot be used: {error}. Allowed are BERT's vocab.txt and tokenizer.json"
            ) from error

    def save(self, folder: StoragePath | str) -> StoragePath:
        """Write `folder`/vocab.txt, the marks included, and return its path; beside it a tokenizer.json where texts are
        not cut as `bert-base-uncased` does."""
        path = storage_path(folder) / tokenizer_files.VOCABULARY
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            file.write("".join(f"{token}\n" for token in self.vocab).encode("utf-8"))
        if self.rules:
            with atomic(path.with_name(tokenizer_files.FULL)) as file:
                file.write(self.rules.encode("utf-8"))
        if self._names != tokenizer_files.NAMES:
            names = {f"{role}_token": token for role, token in self._names.items()}
            write_json(path.with_name(tokenizer_files.SPECIAL), names)
        return path

    @property
    def rules(self) -> str:
        """How texts are cut, as a `tokenizer.json`; "" of a tokenizer that cuts as `bert-base-uncased` does."""
        if self._plain:
            return ""
        tree = json.loads(self._engine.to_str())
        ends = {end: (self._names[end], id_) for end, id_ in (("cls", self.cls), ("sep", self.sep))}
        return json.dumps(
            tree | {"post_processor": {"type": "BertProcessing", **ends}}, ensure_ascii=False, sort_keys=True
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Its `tokenizer_config.json` as transformers has it."""
        if self._plain:
            return {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
        names = {f"{role}_token": token for role, token in self._names.items()}
        return {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": self.lower_case, **names}

    @property
    def identity(self) -> tuple[object, ...]:
        """What makes two tokenizers the same: their tokens, and their rules where these are not the usual ones."""
        return (self.vocab, self.rules) if self.rules else self.vocab

    @property
    def continued(self) -> np.ndarray:
        """For each id whether it goes on a word, as "##ing" does; bool [V]."""
        return np.array([token.startswith("##") for token in self.vocab])

    def clean(self, text: str, max_words: int = MAX_WORDS) -> str:
        """A caption as its model was trained to read it: BLIP's cleaning, which keeps capitals where the tokenizer
        does."""
        return clean_caption(text, max_words, self.lower_case)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_engine" in state:  # a pickle of the library loses what is not in a tokenizer.json
            tokenizer_files.finished(self._engine)

    def __len__(self) -> int:
        return len(self.vocab)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts as `[CLS] ... [SEP]` (without [SEP] unless `closed`), padded to the longest of them.

        Returns: ids and mask, int64 [B, T], T <= `max_length`; what is too long is cut before its [SEP].

        Raises:
            TextError: `max_length` leaves no room for [CLS] and [SEP].
        """
        return self._encode(texts, max_length, self.closed)

    def encode_answers(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """`encode` of texts that a decoder learns to write: they end with [SEP], `closed` or not."""
        return self._encode(texts, max_length, True)

    def _encode(self, texts: Sequence[str], max_length: int, closed: bool) -> tuple[np.ndarray, np.ndarray]:
        if max_length < 2:
            raise TextError(f"max_length {max_length}; at least 2 is needed, for [CLS] and [SEP]")
        end = [self.sep] if closed else []
        rows = [[self.cls, *self._pieces(text)[: max_length - 1 - len(end)], *end] for text in texts]
        return padded(rows, self.pad)

    def spelled_out(self, text: str) -> tuple[int, int]:
        """The characters of a text in words that are unknown or cut into single characters, and all of them; spaces do
        not count. A vocabulary of another language or another domain spells most words out."""
        encoded = self._engine.encode(_SURROGATE.sub("\ufffd", text[:MAX_CHARACTERS]), add_special_tokens=False)
        words: dict[int | None, list[int]] = {}  # the lengths of the pieces of each
        unknown = {word for id_, word in zip(encoded.ids, encoded.word_ids, strict=True) if id_ == self.unk}
        for word, (start, end) in zip(encoded.word_ids, encoded.offsets, strict=True):
            words.setdefault(word, []).append(end - start)
        spelled = (sum(pieces) for word, pieces in words.items() if word in unknown or (max(pieces) == 1 < len(pieces)))
        return sum(spelled), sum(map(sum, words.values()))

    def encoder_prompt(self, prompt: str) -> list[int]:
        """The ids of a prompt that an encoder reads beside the image: none, the text begins with it."""
        return []

    def decoder_prompt(self, prompt: str, max_length: int) -> list[int]:
        """The ids that a generated text begins with: [DEC], and the prompt without an end."""
        ids, mask = self.encode([prompt], max_length)
        return [self.dec, *ids[0, 1 : int(mask.sum()) - 1].tolist()]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn one row of ids into text: specials dropped, pieces joined, `don ' t .` made `don't.`"""
        tokens = [
            self.vocab[index] for index in map(int, ids) if index not in self._special and index < len(self.vocab)
        ]
        text: str = self._engine.decoder.decode(tokens)
        return _BETWEEN_UNSPACED.sub("", tighten(text))

    def _pieces(self, text: str) -> list[int]:
        # One by one: encode_batch starts threads of its own, which do not survive a fork into a loader's
        # worker.
        readable = _SURROGATE.sub("\ufffd", text[:MAX_CHARACTERS])
        return list(self._engine.encode(readable, add_special_tokens=False).ids)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids, padded on the right to the longest: ids and mask, int64 [B, T]."""
    ids = np.full((len(rows), max(map(len, rows), default=0)), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return ids, mask


def tighten(text: str) -> str:
    """A decoded text without the spaces before punctuation and inside contractions that its tokens leave: what
    transformers does by default up to its version 4 (`clean_up_tokenization_spaces`), with which the originals ran."""
    for loose in _LOOSE:
        text = text.replace(loose, loose.strip())
    return text


def clean_caption(text: str, max_words: int = MAX_WORDS, lower_case: bool = True) -> str:
    """Clean a caption as BLIP does: lower case (where `lower_case`), `.!"()*#:;~` become spaces, spaces collapse,
    `max_words` words stay.

    Commas, apostrophes, question marks and hyphens stay too. Control characters count as spaces. Never
    raises.
    """
    text = text[:MAX_CHARACTERS].lower() if lower_case else text[:MAX_CHARACTERS]
    spaced = _CONTROL.sub(" ", _PUNCTUATION.sub(" ", text))
    return " ".join(spaced.split()[:max_words])
