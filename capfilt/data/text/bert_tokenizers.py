"""BERT's WordPiece as ViLT and VLMo use it, and as ALBEF and X-VLM do: the vocabulary as it is, without BLIP's marks.

ALBEF and X-VLM never end a text with [SEP]: their copies of BERT's tokenizer add [CLS] alone.
"""

from __future__ import annotations

import re

from capfilt.data.text.tokenizer import MAX_CHARACTERS, MAX_WORDS, Tokenizer

_SPACES = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")


class BertTokenizer(Tokenizer):
    """`[CLS] ... [SEP]`; texts come as they are."""

    marks = ()

    def clean(self, text: str, max_words: int = MAX_CHARACTERS) -> str:
        """A text with its spaces collapsed, `max_words` words of it."""
        return " ".join(_SPACES.sub(" ", text[:MAX_CHARACTERS]).split()[:max_words])


class OpenBertTokenizer(BertTokenizer):
    """`[CLS] ...` without an end, of texts cleaned as ALBEF and X-VLM do."""

    closed = False

    def clean(self, text: str, max_words: int = MAX_WORDS) -> str:
        """A caption as `pre_caption` of ALBEF leaves it: lower case, punctuation dropped, - and / become spaces."""
        text = _DROPPED.sub("", text[:MAX_CHARACTERS].lower())
        return super().clean(text.replace("-", " ").replace("/", " ").replace("<person>", "person"), max_words)


class ClosedBertTokenizer(OpenBertTokenizer):
    """`[CLS] ... [SEP]` of the same texts: X-VLM's captioner ends with it."""

    closed = True

    def decoder_prompt(self, prompt: str, max_length: int) -> list[int]:
        ids, mask = self.encode([prompt], max_length)
        return [int(index) for index in ids[0, : int(mask.sum()) - 1]]
