"""Writing texts token by token, with the image context made once and the self-attention cached.

The random draws of a text come from (seed, round, uid, candidate), never from a generator that a batch shares, so a
caption does not depend on its neighbours, on the worker or on a retry. Texts that have ended leave the
batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation.fused import FusedSteps, runner_for
from capfilt.inference.generation.runner import MIN_ROWS, StepRunner
from capfilt.inference.generation.sampling import nucleus, penalise
from capfilt.models import Model
from capfilt.models.layers.bert import Head
from capfilt.models.layers.image_context import ImageContext


def uniforms(seed: int, round_: int, uid: str, candidate: int, steps: int) -> np.ndarray:
    """The draws of one text, float64 [steps] in [0, 1): a pure function of its arguments."""
    name = f"{seed}|{round_}|{uid}|{candidate}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=key)).random(steps)


POLL_STEPS = 8
"""Every so many steps it is read from an accelerator whether texts have ended: reading makes it wait."""


@dataclass
class FiniteLogits:
    """Watches a captioner's logits: from NaN or infinity nothing can be drawn, though any code returns some token.

    An accelerator is not made to wait. What is not finite in bf16 or fp32 stays so: it lies in the cache, or in weights
    that every step multiplies by. So only steps that are looked at anyway need be watched; of a chat model, which may
    overflow in fp16 behind its cache, all are.
    """

    spread: Tensor
    """The largest difference of two logits of a step that was watched; NaN or infinite once a logit was."""

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype = torch.float32) -> FiniteLogits:
        """No logits were watched yet; they are in this format."""
        return cls(torch.zeros((), dtype=dtype, device=device))

    def held(self, runner: StepRunner) -> FiniteLogits:
        """The same where the steps of a runner look for it."""
        return FiniteLogits(runner.hold("spread", self.spread))

    def watch(self, logits_RV: Tensor) -> None:
        """Take note of the logits of a step; on a CPU, `check` them."""
        low, high = torch.aminmax(logits_RV)  # one pass, and NaN comes through
        torch.maximum(self.spread, high - low, out=self.spread)
        if logits_RV.device.type == "cpu":
            self.check()

    @property
    def fine(self) -> Tensor:
        """Whether all were finite."""
        return self.spread < torch.inf

    def check(self) -> None:
        """Raise ModelError where logits were not finite."""
        if not bool(self.fine):
            raise ModelError(
                "the captioner's logits are NaN or infinite; allowed are numbers. Check the checkpoint, or compute "
                "in fp32 (precision=fp32) where it was trained so"
            )

    def read(self, flags_K: Tensor) -> Tensor:
        """Flags as a CPU has them, after a `check`: an accelerator is made to wait for both at once."""
        every: Tensor = torch.cat([flags_K, self.fine[None]]).cpu()
        if not bool(every[-1]):
            self.check()
        return every[:-1]


def is_poll_step(device: torch.device, step: int) -> bool:
    """Whether it is read, after this step, which texts have ended."""
    return device.type == "cpu" or step % POLL_STEPS == POLL_STEPS - 1


def prompt_rows(prompt: list[int] | Tensor, rows: int, device: torch.device) -> Tensor:
    """The prompt of each row [R, P]: the same for all, or of [I, P] each image's for its R / I adjacent rows."""
    ids = torch.as_tensor(prompt).to(device, non_blocking=True)
    return ids.expand(rows, -1) if ids.ndim == 1 else ids.repeat_interleave(rows // len(ids), 0, output_size=rows)


def filled_up(images: int, wanted: int, device: torch.device) -> Tensor | None:
    """The numbers of images that make a batch as large as wanted, beginning anew after the last; None: it is."""
    return None if images == wanted else torch.arange(wanted, device=device) % images


def rows_of(images_K: Tensor, width: int) -> Tensor:
    """The numbers of the rows of these images, each of which has `width` adjacent ones."""
    return (images_K[:, None] * width + torch.arange(width, device=images_K.device)).flatten()


def choose_staying(writing_IG: Tensor, runner: StepRunner) -> tuple[Tensor, Tensor] | None:
    """The rows and the images that stay while some texts are still written; None: all.

    Rows leave if that makes the batch smaller by a quarter. An image keeps as many as the one with the most unfinished
    texts needs, and goes with its last; a runner of few sizes keeps some that have ended.
    """
    images, width = writing_IG.shape
    count_I = writing_IG.sum(dim=1)
    most = runner.size(int(count_I.max()), width)
    number = runner.size(int(count_I.count_nonzero()), images)
    if not MIN_ROWS <= number * most <= 0.75 * images * width:
        return None
    staying = (count_I > 0).byte().argsort(descending=True, stable=True)[:number].sort().values
    first = writing_IG[staying].byte().argsort(dim=1, descending=True, stable=True)[:, :most]
    return (staying[:, None] * width + first.sort(dim=1).values).flatten(), staying


class Rows(NamedTuple):
    """What there is of each text that is being written."""

    prompt_RP: Tensor
    draws_RS: Tensor
    place_R: Tensor
    """Its row of the answer."""
    spare_R: Tensor
    """Whether it only fills up the batch."""
    reach_R1: Tensor
    """`DecodeConfig.top_p`, float64."""
    written_RS: Tensor
    """Its tokens; those after the first that ends it are of no account."""

    def held(self, runner: StepRunner, rows: Tensor | None = None) -> Rows:
        """Some rows, or all, where the steps of a runner look for them."""
        of_rows = {name: x if rows is None else x[rows] for name, x in self._asdict().items()}
        return Rows(*(runner.hold(name, x) for name, x in of_rows.items()))


@dataclass
class RunningTexts:
    """The texts that are being written. Rows of one image are adjacent, equally many for each image."""

    runner: StepRunner
    config: DecodeConfig
    end: int
    rows: Rows
    finite: FiniteLogits

    @classmethod
    def begin(
        cls,
        runner: StepRunner,
        image: ImageContext,
        prompt_RP: Tensor,
        draws_RS: Tensor,
        config: DecodeConfig,
        end: int,
    ) -> RunningTexts:
        """Before the first step. Where a runner wants more images than there are, the first ones come again, spare."""
        rows, device = len(draws_RS), draws_RS.device
        width, (length, steps) = rows // image.rows, (prompt_RP.shape[1], config.max_length - prompt_RP.shape[1])
        if (more := filled_up(image.rows, runner.first_size(image.rows, width), device)) is not None:
            image, again = image.select(more), rows_of(more, width)
            prompt_RP, draws_RS = prompt_RP[again], draws_RS[again]
        runner.begin(image, len(draws_RS), config.max_length, (config, end, length))
        place_R = torch.arange(len(draws_RS), device=device)
        written_RS = torch.full((len(draws_RS), steps), end, device=device)
        reach_R1 = torch.full((len(draws_RS), 1), config.top_p, dtype=torch.double, device=device)
        every = Rows(prompt_RP, draws_RS, place_R, place_R >= rows, reach_R1, written_RS)
        return cls(runner, config, end, every.held(runner), FiniteLogits.on(device).held(runner))

    def advance(self, step: int) -> None:
        """Write the token of a step into each text, ended or not. All that changes, changes in place."""
        config, (prompt_RP, draws_RS, _, _, reach_R1, written_RS) = self.config, self.rows
        length, steps = prompt_RP.shape[1], written_RS.shape[1]
        newest, start = (written_RS[:, step - 1 : step], length + step - 1) if step else (prompt_RP, 0)
        without = self.end if length + step < config.min_length else None
        logits = self.runner.logits(newest, start, without).float()
        if step == steps - 1 or is_poll_step(logits.device, step):
            self.finite.watch(logits)
        if config.repetition_penalty != 1.0:
            logits = penalise(logits, torch.cat([prompt_RP, written_RS[:, :step]], dim=1), config.repetition_penalty)
        next_token(logits, config, draws_RS[:, step], reach_R1, out_R=written_RS[:, step])

    def shrink(self, step: int, answer_RS: Tensor, keeps_rows: bool = False) -> bool:
        """After a step, let ended texts go if that is worth it. Whether any is still written."""
        has_ended_R = (self.rows.written_RS[:, : step + 1] == self.end).any(dim=1)
        ended_R = self.finite.read(has_ended_R | self.rows.spare_R)
        writing_IG = ~ended_R.view(self.runner.images, -1)
        if not keeps_rows and (staying := choose_staying(writing_IG, self.runner)) is not None:
            self.save(answer_RS)
            rows, images = (numbers.to(answer_RS.device, non_blocking=True) for numbers in staying)
            self.runner.keep(rows, images, self.rows.prompt_RP.shape[1] + step)
            self.rows = self.rows.held(self.runner, rows)
        return not bool(ended_R.all())

    def save(self, answer_RS: Tensor) -> None:
        """Write down what is written so far."""
        answer_RS[self.rows.place_R] = self.rows.written_RS


@torch.inference_mode()
def generate(
    model: Model,
    image: ImageContext,
    prompt: list[int] | Tensor,
    end: int,
    config: DecodeConfig,
    draws_RS: Tensor,
    head: Head | None = None,
    fused: FusedSteps | None = None,
    keeps_rows: bool = False,
) -> list[list[int]]:
    """Continue the prompt for R rows; rows of one image are adjacent. Returns each row's new tokens, without `end`.

    `image` has R / candidates rows, the prompt (`prompt_rows`) begins with [DEC], `draws_RS` has one number per row and
    step. `head` computes logits, or `fused` whole steps, in place of the model. `keeps_rows`: texts that have ended
    stay, so that the batch has the same shapes whatever is written.
    """
    rows, device = draws_RS.shape[0], draws_RS.device
    if not rows:
        return []
    with runner_for(model, image, head, fused) as runner:
        texts = RunningTexts.begin(runner, image, prompt_rows(prompt, rows, device), draws_RS, config, end)
        answer = torch.full_like(texts.rows.written_RS, end)
        for step in range(last := answer.shape[1]):
            runner.run(step, texts.advance)
            if step < last - 1 and is_poll_step(device, step) and not texts.shrink(step, answer, keeps_rows):
                break
        texts.finite.check()
        texts.save(answer)
        written = answer[:rows].tolist()
    return [row[: row.index(end)] if end in row else row for row in written]


def next_token(
    logits_RV: Tensor,
    config: DecodeConfig,
    draw_R: Tensor,
    reach_R1: Tensor | None = None,
    out_R: Tensor | None = None,
) -> Tensor:
    """The next token of each row, [R]: the likeliest, or by inverting the distribution at `draw` (`nucleus`)."""
    if config.method == "greedy":
        return torch.argmax(logits_RV, dim=1, out=out_R)
    return nucleus(logits_RV, draw_R, config.top_p, config.top_k, config.temperature, reach_R1, out_R)
