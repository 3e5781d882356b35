"""Beam search: for each image the likeliest texts it finds, token for token those of transformers' `generate`.

A text's score is the sum of its log-probabilities divided by its length, the prompt not counted. (The transformers of
2021, with which BLIP's paper was made, counted the prompt too.) Nothing is drawn: there is no seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capfilt.engine.decode import DecodeConfig, penalise
from capfilt.models.blip import Blip
from capfilt.models.layers import KeysValues
from capfilt.models.text import Cache

NEVER = -1e9


@dataclass
class Finished:
    """The best ended texts of each image, best first; empty places have the score NEVER."""

    texts_IWS: Tensor
    scores_IW: Tensor
    open_I: Tensor
    """Whether a text that goes on could still get in."""

    def add(self, texts_ICS: Tensor, scores_IC: Tensor) -> None:
        """Let candidates in where they are better; those with the score NEVER, and those of closed images, are not."""
        scores_IC = scores_IC.where(self.open_I[:, None], NEVER)
        places = self.scores_IW.shape[1]
        self.scores_IW, best = torch.cat([self.scores_IW, scores_IC], dim=1).topk(places, dim=1)
        self.texts_IWS = take(torch.cat([self.texts_IWS, texts_ICS], dim=1), best)

    def close(self, hope_I: Tensor) -> None:
        """Close images whose every place is taken by a text at least as good as the hope of the best that goes on."""
        self.open_I &= hope_I > self.scores_IW.min(dim=1).values


@torch.inference_mode()
def beam_search(
    model: Blip, image: list[KeysValues], prompt_P: list[int], end: int, config: DecodeConfig, texts: int = 1
) -> list[list[int]]:
    """Continue the prompt; the `texts` best of each image (at most `config.beams`), best first, without `end`.

    Images do not influence one another: a text is the same in any batch.
    """
    images, width, steps = image[0][0].shape[0], config.beams, config.max_length - len(prompt_P)
    device = image[0][0].device
    written_IWS = torch.full((images, width, steps), end, dtype=torch.long, device=device)
    scores_IW = torch.full((images, width), NEVER, device=device)
    scores_IW[:, 0] = 0  # all beams begin alike: let one of them go on
    finished = Finished(
        written_IWS.clone(),
        torch.full_like(scores_IW, NEVER),
        torch.ones(images, dtype=torch.bool, device=device),
    )
    cache = Cache(model.config.text, images * width, config.max_length, image[0][0])
    prompt = torch.tensor(prompt_P, device=device).expand(images * width, -1)
    newest, first_of_image = prompt, torch.arange(images, device=device)[:, None] * width
    for step in range(steps):
        logits = model.decode_step(newest, image, cache).float().log_softmax(dim=1)
        if config.repetition_penalty != 1.0:
            so_far = torch.cat([prompt, written_IWS[:, :, :step].flatten(0, 1)], dim=1)
            logits = penalise(logits, so_far, config.repetition_penalty)
        if len(prompt_P) + step < config.min_length:
            logits[:, end] = -torch.inf
        # A beam can end in one way only: among twice as many candidates there are enough that go on.
        sums_IWV = scores_IW[:, :, None] + logits.view(images, width, -1)
        sums_IC, index_IC = sums_IWV.flatten(1).topk(2 * width, dim=1)
        beam_IC, token_IC = index_IC // logits.shape[1], index_IC % logits.shape[1]
        candidates = take(written_IWS, beam_IC)
        candidates[:, :, step] = token_IC
        ended = token_IC == end
        if step == steps - 1:
            ended = torch.ones_like(ended)
        entering = ended & (torch.arange(2 * width, device=device) < width)
        finished.add(candidates, (sums_IC / (step + 1) ** config.length_penalty).where(entering, NEVER))
        if step == steps - 1:
            break
        scores_IW, going = sums_IC.where(~ended, NEVER).topk(width, dim=1)
        finished.close(scores_IW[:, 0] / (step + 1) ** config.length_penalty)
        # Asking an accelerator whether all are closed makes it wait: ask now and then only.
        if (device.type == "cpu" or step % 8 == 7) and not bool(finished.open_I.any()):
            break
        written_IWS = take(candidates, going)
        cache.keep((first_of_image + beam_IC.gather(1, going)).flatten())
        newest = written_IWS[:, :, step].flatten()[:, None]
    rows = finished.texts_IWS[:, :texts].flatten(0, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def take(texts_IWS: Tensor, index_IK: Tensor) -> Tensor:
    """The texts of each image at these places, [I, K, S]."""
    return texts_IWS.gather(1, index_IK[:, :, None].expand(-1, -1, texts_IWS.shape[2]))
