"""Texts in the tokens of a language model of transformers, with the interface of `Tokenizer`.

As BLIP-2's second stage trained: for OPT a text begins with its own first token and ends with a line break, which is
also where a text that is written ends; for T5 it has an end and no beginning. What is too long is cut as LAVIS'
tokenizers cut it: of OPT the line break goes, which is a part of the text there, of T5 the end stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from capfilt.data.text.bert_tokenizers import BertTokenizer, ClosedBertTokenizer, OpenBertTokenizer
from capfilt.data.text.byte_bpe import ByteBpeTokenizer
from capfilt.data.text.tokenizer import MAX_CHARACTERS, Tokenizer, padded, tighten
from capfilt.errors import TextError
from capfilt.storage.atomic import staging_folder
from capfilt.storage.local_copies import local_copy
from capfilt.storage.paths import StoragePath, storage_path

Kind = Literal["opt", "t5"]
TokenizerKind = Literal["wordpiece", "bert", "open-bert", "closed-bert", "byte-bpe", "opt", "t5"]
"""How a model reads texts: as BLIP, as BERT, as BERT without [SEP] (ALBEF, X-VLM) and with
it of the same texts (X-VLM's captioner), as CLIP, or in the tokens of its
language model."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class LanguageTokenizer(Tokenizer):
    """The tokenizer of a language model."""

    def __init__(self, engine: Any, kind: Kind) -> None:
        """`engine`: a tokenizer of transformers. TextError where it lacks the tokens that a text of this kind of model
        begins, ends or is padded with."""
        self._tokens, self.kind = engine, kind
        self.vocab = tuple(engine.convert_ids_to_tokens(list(range(len(engine)))))
        end = engine("\n", add_special_tokens=False).input_ids[-1:] if kind == "opt" else [engine.eos_token_id]
        begin = engine.bos_token_id if kind == "opt" else engine.pad_token_id
        if None in (engine.pad_token_id, begin, *end) or not end:
            raise TextError(f"the tokenizer has no padding, beginning or end; a tokenizer of {kind} has all three")
        self.pad, self.cls, self.sep = int(engine.pad_token_id), int(begin), int(end[0])
        self._special = frozenset({*engine.all_special_ids, self.sep})

    @classmethod
    def load(cls, source: str | StoragePath, kind: Kind = "opt") -> LanguageTokenizer:
        """Load the tokenizer in a folder of transformers, beside a .pth, or under a name on the hub. TextError
        where nothing of the kind is at `source`."""
        allowed = "allowed are a folder of transformers and a name on the Hugging Face hub, OWNER/NAME"
        try:
            where = storage_path(source)
            source = local_copy(where.parent if where.name.endswith(".pth") else source)
        except OSError as error:
            raise TextError(f"no tokenizer of a language model at '{source}' ({error}); {allowed}") from None
        if not source.is_dir() and not _HUB_NAME.fullmatch(str(source)):
            raise TextError(f"no tokenizer of a language model at '{source}'; {allowed}")
        from transformers import AutoTokenizer  # here, not above: it takes seconds, and BLIP has no use for it

        try:
            return cls(AutoTokenizer.from_pretrained(str(source)), kind)
        except (OSError, ValueError, KeyError) as error:
            why = " ".join(str(error).split()).partition(". ")[0][:160]
            raise TextError(
                f"no tokenizer of a language model at '{source}' ({why}); {allowed}. Without a network: fetch all files"
                " of the language model elsewhere and give their folder."
            ) from None

    def save(self, folder: StoragePath | str) -> StoragePath:
        with staging_folder(storage_path(folder)) as here:
            self._tokens.save_pretrained(str(here))
        return storage_path(folder)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts, padded on the right to the longest of them.

        Returns: ids and mask, int64 [B, T], T <= `max_length`; what is too long is cut, of OPT its end with it, of T5
        before its end.
        """
        pieces = [self._pieces(text.strip()) for text in texts]
        if self.kind == "opt":
            rows = [[self.cls, *row, self.sep][:max_length] for row in pieces]
        else:
            rows = [[*row[: max(max_length - 1, 0)], self.sep] for row in pieces]
        return padded(rows, self.pad)

    def decoder_prompt(self, prompt: str, max_length: int) -> list[int]:
        """The ids that a generated text begins with; of T5 without the prompt, which its encoder reads."""
        if self.kind == "t5":
            return [self.cls]
        return [self.cls, *self._pieces(prompt.strip())][:max_length]

    def encoder_prompt(self, prompt: str) -> list[int]:
        """The ids of a prompt that a T5's encoder reads beside the image, without its end token; of OPT none."""
        return self._pieces(prompt.strip()) if self.kind == "t5" else []

    def decode(self, ids: Iterable[int]) -> str:
        """Turn one row of ids into text: specials and the end dropped, no space left before punctuation (`tighten`)."""
        kept = [int(index) for index in ids if int(index) not in self._special]
        return tighten(str(self._tokens.decode(kept, clean_up_tokenization_spaces=False))).strip()

    def _pieces(self, text: str) -> list[int]:
        return list(self._tokens(text[:MAX_CHARACTERS], add_special_tokens=False).input_ids)


_KINDS: dict[str, type[Tokenizer]] = {
    "wordpiece": Tokenizer,
    "bert": BertTokenizer,
    "open-bert": OpenBertTokenizer,
    "closed-bert": ClosedBertTokenizer,
    "byte-bpe": ByteBpeTokenizer,
}


def tokenizer_of(source: str | StoragePath, kind: TokenizerKind | None) -> Tokenizer:
    """The tokenizer of a model, by the kind that its architecture names; None: BLIP's."""
    if kind == "opt" or kind == "t5":
        return LanguageTokenizer.load(source, kind)
    return _KINDS[kind or "wordpiece"].load(source)
