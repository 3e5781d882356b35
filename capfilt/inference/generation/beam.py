"""Beam search: for each image the likeliest texts it finds, token for token those of transformers' `generate`.

A text's score is the sum of its log-probabilities divided by a power of its length. What counts as length has changed
since BLIP's figures were made: `DecodeConfig.accounting` chooses, and `Lengths` says what each rule counts. Nothing is
drawn: there is no seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation.decode import MIN_ROWS, FiniteLogits, copies, is_poll_step, prompt_rows
from capfilt.inference.generation.sampling import penalise
from capfilt.models import Model
from capfilt.models.layers.bert import Head
from capfilt.models.layers.image_context import DecoderCache, ImageContext
from capfilt.models.layers.precision import at_least_fp32

NO_SCORE = -1e9


class Beam(NamedTuple):
    """A text that beam search has written."""

    ids: list[int]
    """Its tokens, without the prompt and the end."""
    score: float
    """The sum of its log-probabilities divided by its length to the power `length_penalty`: `sequences_scores` of
    transformers' `generate`. Other accounting, other numbers."""


@dataclass(frozen=True)
class Lengths:
    """What divides the score of a text, and when an image's search ends.

    new_tokens, transformers since 2023: the tokens written count, the end among them. A search ends when the best text
    that goes on could not get in if it ended at its present length.

    original, transformers 4.15 as BLIP's code calls it (`BeamSearchScorer`): the prompt counts with [DEC], the end does
    not. A search ends when the best of all candidates of a step, ended ones too, could not get in. At `max_length` the
    texts that go on get in as texts that have not ended, one token longer. Scores are compared in float64, as Python's
    numbers.
    """

    prompt: int
    """Tokens of the prompt, [DEC] included."""
    penalty: float
    original: bool

    @classmethod
    def of(cls, config: DecodeConfig, prompt: int) -> Lengths:
        """The rule that a config names, for a prompt of so many tokens."""
        return cls(prompt, config.length_penalty, config.accounting == "original")

    def scores(self, sums: Tensor, step: int) -> Tensor:
        """Scores of texts that end with the token of a step, of which the first is 0."""
        length, sums = (self.prompt + step, sums.double()) if self.original else (step + 1, sums)
        divisor: float = length**self.penalty
        return sums / divisor


@dataclass
class Finished:
    """The best ended texts of each image, best first; empty places have the score NO_SCORE."""

    texts_IWS: Tensor
    scores_IW: Tensor
    open_I: Tensor
    """Whether a text that goes on could still get in."""

    def add(self, texts_ICS: Tensor, scores_IC: Tensor) -> None:
        """Take in candidates that are better, but none with the score NO_SCORE, and none of closed images."""
        scores_IC = scores_IC.where(self.open_I[:, None], NO_SCORE)
        places = self.scores_IW.shape[1]
        self.scores_IW, best = torch.cat([self.scores_IW, scores_IC], dim=1).topk(places, dim=1)
        self.texts_IWS = take(torch.cat([self.texts_IWS, texts_ICS], dim=1), best)

    def close(self, hope_I: Tensor) -> None:
        """Close images whose every place is taken by a text at least as good as the hope of the best that goes on."""
        self.open_I &= hope_I > self.scores_IW.min(dim=1).values


@dataclass
class Answer:
    """The finished texts of all images and their scores."""

    texts_IWS: Tensor
    scores_IW: Tensor

    def take(self, search: Search) -> None:
        """Write down what the images of a search have finished."""
        self.texts_IWS[search.place_I] = search.finished.texts_IWS
        self.scores_IW[search.place_I] = search.finished.scores_IW


@dataclass
class Search:
    """The images whose texts are still growing, and where each belongs in the answer."""

    image: ImageContext
    cache: DecoderCache
    place_I: Tensor
    written_IWS: Tensor
    scores_IW: Tensor
    finished: Finished

    def drop_finished(self, answer: Answer) -> None:
        """Write down the texts of closed images and let these go, if that makes the batch smaller by a quarter."""
        staying = self.finished.open_I.nonzero().squeeze(1)
        width = self.scores_IW.shape[1]
        if len(staying) > 0.75 * len(self.place_I) or len(staying) * width < MIN_ROWS:
            return
        answer.take(self)
        self.place_I, self.written_IWS, self.scores_IW = (
            part[staying] for part in (self.place_I, self.written_IWS, self.scores_IW)
        )
        self.image = self.image.select(staying)
        self.cache.keep((staying[:, None] * width + torch.arange(width, device=staying.device)).flatten())
        self.finished = Finished(
            self.finished.texts_IWS[staying], self.finished.scores_IW[staying], self.finished.open_I[staying]
        )


def beam_search(
    model: Model,
    image: ImageContext,
    prompt: list[int] | Tensor,
    end: int,
    config: DecodeConfig,
    texts: int = 1,
    head: Head | None = None,
) -> list[list[int]]:
    """The tokens of `scored_beams`."""
    return [beam.ids for beam in scored_beams(model, image, prompt, end, config, texts, head)]


@torch.inference_mode()
def scored_beams(
    model: Model,
    image: ImageContext,
    prompt: list[int] | Tensor,
    end: int,
    config: DecodeConfig,
    texts: int = 1,
    head: Head | None = None,
    keeps_rows: bool = False,
) -> list[Beam]:
    """Continue the prompt; the `texts` best of each image (at most `config.beams`), best first, images in their order.

    Images do not influence one another: a text is the same in any batch. An image whose texts have all ended leaves it,
    unless the batch `keeps_rows` for the sake of its shapes.
    """
    width, device = config.beams, image.device
    prompt_RP = prompt_rows(prompt, image.rows * width, device)
    length = prompt_RP.shape[1]
    steps = config.max_length - length
    if 0 < image.rows * width < MIN_ROWS:
        times = copies(image.rows * width)
        more, prompts_IP = image.repeat(times), prompt_RP[::width].repeat(times, 1)
        return scored_beams(model, more, prompts_IP, end, config, texts, head, keeps_rows)[: image.rows * texts]
    lengths = Lengths.of(config, length)
    state = _begin(model, image, config, steps, end)
    answer = Answer(state.written_IWS.clone(), state.finished.scores_IW.clone())
    newest = prompt_RP
    finite = FiniteLogits.on(device)
    for step in range(steps):
        logits = finite.watch(at_least_fp32(model.decode_step(newest, state.image, state.cache, head)))
        logits = logits.log_softmax(dim=1)
        if config.repetition_penalty != 1.0:
            before = prompt_RP[::width][state.place_I].repeat_interleave(width, dim=0)
            so_far = torch.cat([before, state.written_IWS[:, :, :step].flatten(0, 1)], dim=1)
            logits = penalise(logits, so_far, config.repetition_penalty)
        if length + step < config.min_length:
            logits[:, end] = -torch.inf
        beam_IW = _extend(state, logits, step, end, lengths)
        if step == steps - 1:
            break
        if is_poll_step(device, step):
            finite.check()
        # Reading from an accelerator whether all are closed makes it wait: only now and then.
        if is_poll_step(device, step) and not bool(state.finished.open_I.any()):
            break
        state.cache.keep((torch.arange(len(beam_IW), device=device)[:, None] * width + beam_IW).flatten())
        if is_poll_step(device, step) and not keeps_rows:
            state.drop_finished(answer)
        newest = state.written_IWS[:, :, step].flatten()[:, None]
    finite.check()
    answer.take(state)
    written = answer.texts_IWS[:, :texts].flatten(0, 1).tolist()
    scores = answer.scores_IW[:, :texts].flatten().tolist()
    return [
        Beam(row[: row.index(end)] if end in row else row, score) for row, score in zip(written, scores, strict=True)
    ]


def _begin(model: Model, image: ImageContext, config: DecodeConfig, steps: int, end: int) -> Search:
    images, width, device = image.rows, config.beams, image.device
    written_IWS = torch.full((images, width, steps), end, dtype=torch.long, device=device)
    exact = torch.float64 if image.tensors[0].dtype == torch.float64 else torch.float32
    scores_IW = torch.full((images, width), NO_SCORE, dtype=exact, device=device)
    scores_IW[:, 0] = 0  # all beams begin alike: let one of them go on
    kept = torch.float64 if config.accounting == "original" else exact
    finished = Finished(
        written_IWS.clone(),
        torch.full_like(scores_IW, NO_SCORE, dtype=kept),
        torch.ones(images, dtype=torch.bool, device=device),
    )
    cache = model.cache(images * width, config.max_length, image)
    return Search(image, cache, torch.arange(images, device=device), written_IWS, scores_IW, finished)


def _extend(state: Search, logits: Tensor, step: int, end: int, lengths: Lengths) -> Tensor:
    """Let each image's beams grow by a token, and ended ones in among the finished; which beam each came of [I, W]."""
    images, width = state.scores_IW.shape
    last = step == state.written_IWS.shape[2] - 1
    # A beam can end in one way only: among twice as many candidates there are enough that go on.
    sums_IWV = state.scores_IW[:, :, None] + logits.view(images, width, -1)
    sums_IC, index_IC = sums_IWV.flatten(1).topk(2 * width, dim=1)
    beam_IC, token_IC = index_IC // logits.shape[1], index_IC % logits.shape[1]
    candidates = take(state.written_IWS, beam_IC)
    candidates[:, :, step] = token_IC
    cut = last and not lengths.original
    ended = torch.ones_like(token_IC, dtype=torch.bool) if cut else token_IC == end
    entering = ended & (torch.arange(2 * width, device=ended.device) < width)
    state.finished.add(candidates, lengths.scores(sums_IC, step).where(entering, NO_SCORE))
    state.scores_IW, going = sums_IC.where(~ended, NO_SCORE).topk(width, dim=1)
    state.written_IWS = take(candidates, going)
    if lengths.original:
        state.finished.close(lengths.scores(sums_IC[:, 0], step))
        if last:
            state.finished.add(state.written_IWS, lengths.scores(state.scores_IW, step + 1))
    elif not last:
        state.finished.close(lengths.scores(state.scores_IW[:, 0], step))
    return beam_IC.gather(1, going)


def take(texts_IWS: Tensor, index_IK: Tensor) -> Tensor:
    """The texts of each image at these places, [I, K, S]."""
    return texts_IWS.gather(1, index_IK[:, :, None].expand(-1, -1, texts_IWS.shape[2]))
