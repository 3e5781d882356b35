"""Writing texts token by token, with the image context made once and the self-attention cached.

The random draws of a text come from (seed, round, uid, candidate), never from a generator that a batch shares, so a
caption does not depend on its neighbours, on the worker or on a retry. Texts that have ended leave the
batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation.sampling import nucleus, penalise
from capfilt.models import Model
from capfilt.models.layers.bert import Head
from capfilt.models.layers.image_context import DecoderCache, ImageContext


def uniforms(seed: int, round_: int, uid: str, candidate: int, steps: int) -> np.ndarray:
    """The draws of one text, float64 [steps] in [0, 1): a pure function of its arguments."""
    name = f"{seed}|{round_}|{uid}|{candidate}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=key)).random(steps)


MIN_ROWS = 4
"""Rows that a batch has at least: matrix libraries multiply fewer by other kernels, with other rounding."""

POLL_STEPS = 8
"""Every so many steps it is read from an accelerator whether texts have ended: reading makes it wait."""


@dataclass
class RunningTexts:
    """The texts that are being written: the context of their images, their cache, and the row of the answer of each.

    Rows of one image are adjacent, equally many for each image.
    """

    image: ImageContext
    cache: DecoderCache
    place_R: Tensor
    ended_R: Tensor

    def shrink(self) -> Tensor | None:
        """Let ended texts go, if that makes the batch smaller by a quarter; the rows that stay, None for all.

        An image keeps as many rows as the one with the most unfinished texts needs, and goes with its last.
        """
        rows, images = len(self.place_R), self.image.rows
        live = (~self.ended_R).view(images, -1)
        count = live.sum(dim=1)
        staying = count.nonzero().squeeze(1)
        most = int(count.max())
        if not MIN_ROWS <= len(staying) * most <= 0.75 * rows:
            return None
        first = live[staying].byte().argsort(dim=1, descending=True, stable=True)[:, :most]
        kept = (staying[:, None] * live.shape[1] + first.sort(dim=1).values).flatten()
        if len(staying) < images:
            self.image = self.image.select(staying)
        self.cache.keep(kept)
        self.place_R, self.ended_R = self.place_R[kept], self.ended_R[kept]
        return kept


def copies(rows: int) -> int:
    """How many copies of a batch of `rows` rows have MIN_ROWS rows or more together."""
    return -(-MIN_ROWS // rows)


@dataclass
class FiniteLogits:
    """Watches a captioner's logits: from NaN or infinity nothing can be drawn, though any code returns some token."""

    fine: Tensor

    @classmethod
    def on(cls, device: torch.device) -> FiniteLogits:
        """No logits were watched yet."""
        return cls(torch.ones((), dtype=torch.bool, device=device))

    def watch(self, logits_RV: Tensor) -> Tensor:
        """Take note of the logits of a step, and return them. An accelerator is not made to wait: there they are made
        finite until `check`, for a NaN would lead to an index that ends the process."""
        low, high = torch.aminmax(logits_RV)  # one pass, and NaN comes through
        self.fine = self.fine & low.isfinite() & high.isfinite()
        if logits_RV.device.type != "cpu":
            return logits_RV.nan_to_num_()
        self.check()
        return logits_RV

    def check(self) -> None:
        """Raise ModelError where logits were not finite."""
        if not bool(self.fine):
            raise ModelError(
                "the captioner's logits are NaN or infinite; allowed are numbers. Check the checkpoint, or compute "
                "in fp32 (precision=fp32) where it was trained so"
            )


def is_poll_step(device: torch.device, step: int) -> bool:
    """Whether it is read, after this step, which texts have ended."""
    return device.type == "cpu" or step % POLL_STEPS == POLL_STEPS - 1


def prompt_rows(prompt: list[int] | Tensor, rows: int, device: torch.device) -> Tensor:
    """The prompt of each row [R, P]: the same for all, or of [I, P] each image's for its R / I adjacent rows."""
    ids = torch.as_tensor(prompt, device=device)
    return ids.expand(rows, -1) if ids.ndim == 1 else ids.repeat_interleave(rows // len(ids), dim=0)


@torch.inference_mode()
def generate(
    model: Model,
    image: ImageContext,
    prompt: list[int] | Tensor,
    end: int,
    config: DecodeConfig,
    draws_RS: Tensor,
    head: Head | None = None,
    keeps_rows: bool = False,
) -> list[list[int]]:
    """Continue the prompt for R rows; rows of one image are adjacent. Returns each row's new tokens, without `end`.

    `image` has R / candidates rows, the prompt (`prompt_rows`) begins with [DEC], `draws_RS` has one number per row and
    step. `keeps_rows`: texts that have ended stay, so that the batch has the same shapes whatever is written.
    """
    rows, device = draws_RS.shape[0], draws_RS.device
    prompt_RP = prompt_rows(prompt, rows, device)
    length = prompt_RP.shape[1]
    steps = config.max_length - length
    if 0 < rows < MIN_ROWS:
        times = copies(rows)
        more, draws = image.repeat(times), draws_RS.repeat(times, 1)
        return generate(model, more, prompt_RP.repeat(times, 1), end, config, draws, head, keeps_rows)[:rows]
    written = torch.full((rows, steps), end, dtype=torch.long, device=device)
    batch = RunningTexts(
        image,
        model.cache(rows, config.max_length, image),
        torch.arange(rows, device=device),
        torch.zeros(rows, dtype=torch.bool, device=device),
    )
    newest, finite = prompt_RP, FiniteLogits.on(device)
    for step in range(steps):
        logits = finite.watch(model.decode_step(newest, batch.image, batch.cache, head).float())
        if length + step < config.min_length:
            logits[:, end] = -torch.inf
        if config.repetition_penalty != 1.0:
            before = torch.cat([prompt_RP[batch.place_R], written[batch.place_R, :step]], dim=1)
            logits = penalise(logits, before, config.repetition_penalty)
        token = next_token(logits, config, draws_RS[batch.place_R, step]).where(~batch.ended_R, end)
        written[batch.place_R, step] = token
        batch.ended_R |= token == end
        newest = token[:, None]
        if step < steps - 1 and is_poll_step(device, step):
            finite.check()
            if bool(batch.ended_R.all()):
                break
            kept = None if keeps_rows else batch.shrink()
            newest = newest if kept is None else newest[kept]
    finite.check()
    return [row[: row.index(end)] if end in row else row for row in written.tolist()]


def next_token(logits_RV: Tensor, config: DecodeConfig, draw_R: Tensor) -> Tensor:
    """The next token of each row, [R]: the likeliest, or by inverting the distribution at `draw`."""
    if config.method == "greedy":
        return logits_RV.argmax(dim=1)
    return nucleus(logits_RV, draw_R, config.top_p, config.top_k, config.temperature)
