"""Beam search: for each image the likeliest texts it finds, token for token those of transformers' `generate`.

A text's score is the sum of its log-probabilities divided by its length, the prompt not counted. (The transformers of
2021, with which BLIP's paper was made, counted the prompt too.) Nothing is drawn: there is no seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation.decode import MIN_ROWS, FiniteLogits, copies, is_poll_step
from capfilt.inference.generation.sampling import penalise
from capfilt.models import Model
from capfilt.models.layers.bert import Head
from capfilt.models.layers.image_context import DecoderCache, ImageContext

NO_SCORE = -1e9


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
class Search:
    """The images whose texts are still growing, and where each belongs in the answer."""

    image: ImageContext
    cache: DecoderCache
    place_I: Tensor
    written_IWS: Tensor
    scores_IW: Tensor
    finished: Finished

    def drop_finished(self, answer_IWS: Tensor) -> None:
        """Write down the texts of closed images and let these go, if that makes the batch smaller by a quarter."""
        staying = self.finished.open_I.nonzero().squeeze(1)
        width = self.scores_IW.shape[1]
        if len(staying) > 0.75 * len(self.place_I) or len(staying) * width < MIN_ROWS:
            return
        answer_IWS[self.place_I] = self.finished.texts_IWS
        self.place_I, self.written_IWS, self.scores_IW = (
            part[staying] for part in (self.place_I, self.written_IWS, self.scores_IW)
        )
        self.image = self.image.select(staying)
        self.cache.keep((staying[:, None] * width + torch.arange(width, device=staying.device)).flatten())
        self.finished = Finished(
            self.finished.texts_IWS[staying], self.finished.scores_IW[staying], self.finished.open_I[staying]
        )


@torch.inference_mode()
def beam_search(
    model: Model,
    image: ImageContext,
    prompt_P: list[int],
    end: int,
    config: DecodeConfig,
    texts: int = 1,
    head: Head | None = None,
) -> list[list[int]]:
    """Continue the prompt; the `texts` best of each image (at most `config.beams`), best first, without `end`.

    Images do not influence one another: a text is the same in any batch. An image whose texts have all ended leaves it.
    """
    width, steps, device = config.beams, config.max_length - len(prompt_P), image.device
    if 0 < image.rows * width < MIN_ROWS:
        more = image.repeat(copies(image.rows * width))
        return beam_search(model, more, prompt_P, end, config, texts, head)[: image.rows * texts]
    state = _begin(model, image, config, steps, end)
    answer_IWS = state.written_IWS.clone()
    prompt = newest = torch.tensor(prompt_P, device=device).expand(len(answer_IWS) * width, -1)
    finite = FiniteLogits.on(device)
    for step in range(steps):
        logits = finite.watch(model.decode_step(newest, state.image, state.cache, head).float()).log_softmax(dim=1)
        if config.repetition_penalty != 1.0:
            so_far = torch.cat([prompt[: len(logits)], state.written_IWS[:, :, :step].flatten(0, 1)], dim=1)
            logits = penalise(logits, so_far, config.repetition_penalty)
        if len(prompt_P) + step < config.min_length:
            logits[:, end] = -torch.inf
        beam_IW = _extend(state, logits, step, end, config.length_penalty)
        if step == steps - 1:
            break
        if is_poll_step(device, step):
            finite.check()
        # Reading from an accelerator whether all are closed makes it wait: only now and then.
        if is_poll_step(device, step) and not bool(state.finished.open_I.any()):
            break
        state.cache.keep((torch.arange(len(beam_IW), device=device)[:, None] * width + beam_IW).flatten())
        if is_poll_step(device, step):
            state.drop_finished(answer_IWS)
        newest = state.written_IWS[:, :, step].flatten()[:, None]
    finite.check()
    answer_IWS[state.place_I] = state.finished.texts_IWS
    written = answer_IWS[:, :texts].flatten(0, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in written]


def _begin(model: Model, image: ImageContext, config: DecodeConfig, steps: int, end: int) -> Search:
    images, width, device = image.rows, config.beams, image.device
    written_IWS = torch.full((images, width, steps), end, dtype=torch.long, device=device)
    scores_IW = torch.full((images, width), NO_SCORE, device=device)
    scores_IW[:, 0] = 0  # all beams begin alike: let one of them go on
    finished = Finished(
        written_IWS.clone(),
        torch.full_like(scores_IW, NO_SCORE),
        torch.ones(images, dtype=torch.bool, device=device),
    )
    cache = model.cache(images * width, config.max_length, image)
    return Search(image, cache, torch.arange(images, device=device), written_IWS, scores_IW, finished)


def _extend(state: Search, logits: Tensor, step: int, end: int, length_penalty: float) -> Tensor:
    """Let each image's beams grow by a token, and ended ones in among the finished; which beam each came of [I, W]."""
    images, width = state.scores_IW.shape
    last = step == state.written_IWS.shape[2] - 1
    # A beam can end in one way only: among twice as many candidates there are enough that go on.
    sums_IWV = state.scores_IW[:, :, None] + logits.view(images, width, -1)
    sums_IC, index_IC = sums_IWV.flatten(1).topk(2 * width, dim=1)
    beam_IC, token_IC = index_IC // logits.shape[1], index_IC % logits.shape[1]
    candidates = take(state.written_IWS, beam_IC)
    candidates[:, :, step] = token_IC
    ended = torch.ones_like(token_IC, dtype=torch.bool) if last else token_IC == end
    entering = ended & (torch.arange(2 * width, device=ended.device) < width)
    state.finished.add(candidates, (sums_IC / (step + 1) ** length_penalty).where(entering, NO_SCORE))
    state.scores_IW, going = sums_IC.where(~ended, NO_SCORE).topk(width, dim=1)
    if not last:
        state.finished.close(state.scores_IW[:, 0] / (step + 1) ** length_penalty)
    state.written_IWS = take(candidates, going)
    return beam_IC.gather(1, going)


def take(texts_IWS: Tensor, index_IK: Tensor) -> Tensor:
    """The texts of each image at these places, [I, K, S]."""
    return texts_IWS.gather(1, index_IK[:, :, None].expand(-1, -1, texts_IWS.shape[2]))
