"""Captioner and filter at work on pictures: every text written and scored, nothing encoded, projected or read twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capfilt.data.sample import is_text
from capfilt.inference.captioners.local import Captioner
from capfilt.inference.filters.fusion import Filter
from capfilt.inference.oom_backoff import OomBackoff
from capfilt.inference.timer import StageTimer, timed
from capfilt.models import Model
from capfilt.models.layers.image_context import ImageContext


@dataclass(frozen=True)
class Text:
    """One text of one image, and what the filter thinks of it."""

    source: str
    """web | synthetic"""
    candidate: int
    """0.. per source"""
    text: str
    itm: float | None
    itc: float | None
    """None where there is nothing to read (`sample.is_text`): such a text is not scored."""
    whole: bool
    """Whether the filter read all of it; a longer one is judged by its beginning."""


class Annotator:
    """Two roles on one device."""

    def __init__(self, captioner: Captioner, judge: Filter, clock: StageTimer | None = None):
        self.captioner, self.judge, self.clock = captioner, judge, clock
        self.shared_vision = same_vision(captioner.model, judge.model)
        self.shared_keys = self.shared_vision and same_keys(captioner.model, judge.model)
        self.pieces = OomBackoff()

    @torch.inference_mode()
    def annotate(
        self,
        pixels_B3SS: Tensor,
        uids: Sequence[str],
        web: Sequence[Sequence[str]],
        seed: int,
        round_: int,
        for_filter_B3SS: Tensor | None = None,
    ) -> list[list[Text]]:
        """The texts of each image: those that came with it, then those that are written.

        `for_filter_B3SS` are the same pictures as the filter reads them, where it normalises otherwise.

        Out of memory is not the end: the batch goes on in halves. RunError when a single image does not fit.
        """

        def some(start: int, stop: int) -> list[list[Text]]:
            part = slice(start, stop)
            other = None if for_filter_B3SS is None else for_filter_B3SS[part]
            return self._annotate(pixels_B3SS[part], other, uids[part], web[part], seed, round_)

        return self.pieces.run(some, len(uids))

    def _annotate(
        self,
        pixels_B3SS: Tensor,
        for_filter_B3SS: Tensor | None,
        uids: Sequence[str],
        web: Sequence[Sequence[str]],
        seed: int,
        round_: int,
    ) -> list[list[Text]]:
        same = for_filter_B3SS is None
        with timed(self.clock, "vision"):
            tokens = self.captioner.model.encode_image(pixels_B3SS)
            for_filter = pixels_B3SS if for_filter_B3SS is None else for_filter_B3SS
            seen = tokens if self.shared_vision and same else self.judge.model.encode_image(for_filter)
        with timed(self.clock, "caption"):
            keys = self.captioner.keys(tokens)
            written = self.captioner.write_beside(keys, uids, seed, round_)
        with timed(self.clock, "score"):
            texts = [[*came, *own] for came, own in zip(web, written, strict=True)]
            scores = self._score(seen, texts, keys if self.shared_keys and same else None)
            whole = {text: self.judge.reads_all(text) for text in {text for own in texts for text in own}}
        return [
            [
                Text(
                    "web" if i < len(came) else "synthetic",
                    i if i < len(came) else i - len(came),
                    text,
                    *score,
                    whole[text],
                )
                for i, (text, score) in enumerate(zip(own, scored, strict=True))
            ]
            for came, own, scored in zip(web, texts, scores, strict=True)
        ]

    def _score(
        self, tokens_BND: Tensor, texts: Sequence[Sequence[str]], keys: ImageContext | None
    ) -> list[list[tuple[float | None, float | None]]]:
        """The scores of each text, none for what is no text."""
        real = [[text for text in own if is_text(text)] for own in texts]
        scored = (iter(own) for own in self.judge.score(tokens_BND, real, keys))
        return [
            [next(scores) if is_text(text) else (None, None) for text in own]
            for own, scores in zip(texts, scored, strict=True)
        ]


def same_vision(a: Model, b: Model) -> bool:
    """Whether two models look through the very same eyes, so that an image need be encoded once only."""
    one, two = a.vision_modules, b.vision_modules
    return len(one) == len(two) and all(_same(x, y) for x, y in zip(one, two, strict=True))


def same_keys(writer: Model, judge: Model) -> bool:
    """Whether a decoder and an encoder project image tokens alike, as those of one model that shares them do."""
    one, two = writer.image_context_modules("decoder"), judge.image_context_modules("encoder")
    if one is None or two is None:
        return False
    return len(one) == len(two) and all(_same(a, b) for a, b in zip(one, two, strict=True))


def _same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
