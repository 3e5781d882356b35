"""Captioner and filter at work on images: every text written and scored, nothing encoded, projected or read twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from capfilt.data.sample import Sample, is_text
from capfilt.inference.batches import Images, NotYetCopied
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.embedder import unit_vectors
from capfilt.inference.filters.dual_encoder import DualEncoderFilter
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.interface import Captioner, Filter, Scores
from capfilt.inference.local_model import same_modules
from capfilt.inference.oom_backoff import OomBackoff, WholeBatches
from capfilt.inference.timer import StageTimer, timed
from capfilt.models import Model


@dataclass(frozen=True)
class Text:
    """One text of one image with its scores."""

    source: str
    """web | synthetic"""
    candidate: int
    """0.. per source"""
    text: str
    itm: float | None
    itc: float | None
    """None where the filter does not give it, and where there is nothing to read (`sample.is_text`): such a text is not
    scored."""
    whole: bool
    """Whether the filter read all of it; a longer one is scored by its beginning."""
    prompt: str = ""
    """Of a synthetic one, the prompt that it answers (`Caption.prompt`)."""
    remark: str = ""
    """Of a synthetic one, what became of it while it was written (`Caption.remark`)."""


class Annotator:
    """Two roles on one device."""

    def __init__(self, captioner: Captioner, filter_: Filter, timer: StageTimer | None = None, fixed_batches: int = 0):
        """`fixed_batches`: all batches have so many pictures, the last one filled up, and all that is made of them has
        one shape (`AnnotateConfig.deterministic`); 0: what each has."""
        self.captioner, self.filter, self.timer = captioner, filter_, timer
        self.shared_vision, self.shared_context = share(captioner, filter_)
        self.oom_backoff = WholeBatches(fixed_batches) if fixed_batches else OomBackoff()
        self.fixed_batches = fixed_batches
        if fixed_batches:
            assert isinstance(captioner, LocalCaptioner), "recipes with others are refused"
            assert isinstance(filter_, DualEncoderFilter), "a filter in this process"
            captioner.keeps_rows, filter_.fixed_rows = True, fixed_batches
        self.vectors: list[np.ndarray] | None = None
        """The filter's vector of every image so far, float16 [D]; None where they are not kept."""

    @torch.inference_mode()
    def annotate(
        self, images: Images | NotYetCopied, samples: Sequence[Sample], web: Sequence[Sequence[str]]
    ) -> list[list[Text]]:
        """The texts of each image: those that came with it (`web`), then those that are written.

        Out of memory is not the end: the batch goes on in halves. RunError when a single image does not fit, or a
        batch of a fixed size.
        """

        def part(start: int, stop: int) -> list[list[Text]]:
            rows = [*range(start, stop), *[stop - 1] * (self.fixed_batches - (stop - start))]
            with timed(self.timer, "copy"):
                batch = images.part(rows if self.fixed_batches else slice(start, stop))
            texts = [*web[start:stop], *[[] for _ in rows[stop - start :]]]
            return self._annotate(batch, [samples[i] for i in rows], texts, stop - start)

        return self.oom_backoff.run(part, len(samples))

    def _annotate(
        self, images: Images, samples: Sequence[Sample], web: Sequence[Sequence[str]], count: int
    ) -> list[list[Text]]:
        """The texts of the first `count` images; the others fill up the batch."""
        with timed(self.timer, "vision"):
            self.captioner.prepare(images)
            self.filter.prepare(images)
        with timed(self.timer, "caption"):
            written = self.captioner.caption(images, samples)
        with timed(self.timer, "score"):
            texts = [[*came, *(new.text for new in captions)] for came, captions in zip(web, written, strict=True)]
            scores = score_texts(lambda real: self.filter.score(images, real), texts)
            whole = {text: self.filter.reads_all(text) for text in {text for of_image in texts for text in of_image}}
        if self.vectors is not None:
            assert isinstance(self.filter, DualEncoderFilter), "a filter in this process has vectors"
            self.vectors += [*unit_vectors(self.filter.projection(images)).astype(np.float16)[:count]]
        return [
            [
                Text("web", n, text, *of_text, whole[text])
                if n < len(came)
                else Text("synthetic", n - len(came), text, *of_text, whole[text], *captions[n - len(came)][1:])
                for n, (text, of_text) in enumerate(zip(of_image, of_texts, strict=True))
            ]
            for came, captions, of_image, of_texts in zip(web, written, texts, scores, strict=True)
        ][:count]


def score_texts(
    score: Callable[[list[list[str]]], Scores], texts: Sequence[Sequence[str]]
) -> list[list[tuple[float | None, float | None]]]:
    """(itm, itc) of each image's texts, as `score` gives them; None for a score that is not given, and for what is no
    text, which is not scored."""
    scores = score([[text for text in of_image if is_text(text)] for of_image in texts])

    def value(name: str, image: int, number: int) -> float | None:
        values = scores.get(name)
        return None if values is None else values[image][number]

    filled: list[list[tuple[float | None, float | None]]] = []
    for i, of_image in enumerate(texts):
        numbers = itertools.count()  # of those that were scored
        filled.append(
            [
                (value("itm", i, n := next(numbers)), value("itc", i, n)) if is_text(text) else (None, None)
                for text in of_image
            ]
        )
    return filled


def share(captioner: Captioner, filter_: Filter) -> tuple[bool, bool]:
    """Let two models in this process compute once what is the same for both of the same pictures: the image tokens, and
    the image context. Returns which of the two is."""
    if not isinstance(captioner, LocalCaptioner) or not isinstance(filter_, DualEncoderFilter):
        return False, False
    if not filter_.local.share_vision(captioner.local):
        return False, False
    if not isinstance(filter_, FusionFilter) or not same_context(captioner.model, filter_.model):
        return True, False
    filter_.context_name, captioner.shares_context = captioner.context_name, True
    return True, True


def same_context(captioner: Model, filter_: Model) -> bool:
    """Whether a decoder and an encoder make the same context of the same image tokens, as those of one model that
    shares its cross-attention do."""
    return same_modules(captioner.image_context_modules("decoder"), filter_.image_context_modules("encoder"))
