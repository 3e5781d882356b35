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
from capfilt.inference.generation.decode import FiniteLogits, choose_staying, filled_up, is_poll_step, prompt_rows
from capfilt.inference.generation.fused import FusedSteps, runner_for
from capfilt.inference.generation.runner import StepRunner
from capfilt.inference.generation.sampling import penalise
from capfilt.models import Model
from capfilt.models.layers.bert import Head
from capfilt.models.layers.image_context import ImageContext

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


class Finished(NamedTuple):
    """The best ended texts of each image, best first; empty places have the score NO_SCORE."""

    texts_IWS: Tensor
    scores_IW: Tensor
    open_I: Tensor
    """Whether a text that goes on could still get in."""

    def add(self, texts_ICS: Tensor, scores_IC: Tensor) -> Finished:
        """With candidates that are better, but none with the score NO_SCORE, and none of closed images."""
        scores_IC = scores_IC.where(self.open_I[:, None], NO_SCORE)
        places = self.scores_IW.shape[1]
        scores_IW, best = torch.cat([self.scores_IW, scores_IC], dim=1).topk(places, dim=1)
        return Finished(take(torch.cat([self.texts_IWS, texts_ICS], dim=1), best), scores_IW, self.open_I)

    def close(self, hope_I: Tensor) -> Finished:
        """Without images whose every place is taken by a text at least as good as the hope of the best that goes on."""
        return self._replace(open_I=self.open_I & (hope_I > self.scores_IW.min(dim=1).values))


class Images(NamedTuple):
    """What there is of each image whose texts are still growing."""

    place_I: Tensor
    """Its row of the answer."""
    prompt_IP: Tensor
    written_IWS: Tensor
    scores_IW: Tensor
    finished: Finished

    def held(self, runner: StepRunner, images: Tensor | None = None) -> Images:
        """Some images, or all, where the steps of a runner look for them."""

        def held(name: str, x: Tensor) -> Tensor:
            return runner.hold(f"beam {name}", x if images is None else x[images])

        own = [*self._asdict().items()][:-1]
        of_finished = (held(f"finished {name}", x) for name, x in self.finished._asdict().items())
        return Images(**{name: held(name, x) for name, x in own}, finished=Finished(*of_finished))


@dataclass
class Search:
    """The search for the texts of a batch of images, `config.beams` rows for each."""

    runner: StepRunner
    config: DecodeConfig
    end: int
    lengths: Lengths
    images: Images
    finite: FiniteLogits

    @classmethod
    def begin(
        cls, runner: StepRunner, image: ImageContext, prompt_IP: Tensor, config: DecodeConfig, end: int
    ) -> Search:
        """Before the first step. Where a runner wants more images than there are, the first ones come again, closed."""
        width, count, device, length = config.beams, image.rows, image.device, prompt_IP.shape[1]
        if (more := filled_up(count, runner.first_size(count, width), device)) is not None:
            image, prompt_IP = image.select(more), prompt_IP[more]
        images = image.rows
        runner.begin(image, images * width, config.max_length, (config, end, length))
        written_IWS = torch.full((images, width, config.max_length - length), end, device=device)
        exact = torch.float64 if image.tensors[0].dtype == torch.float64 else torch.float32
        scores_IW = torch.full((images, width), NO_SCORE, dtype=exact, device=device)
        scores_IW[:, 0] = 0  # all beams begin alike: let one of them go on
        kept = torch.float64 if config.accounting == "original" else exact
        place_I = torch.arange(images, device=device)
        finished = Finished(written_IWS, torch.full_like(scores_IW, NO_SCORE, dtype=kept), place_I < count)
        every = Images(place_I, prompt_IP, written_IWS, scores_IW, finished).held(runner)
        finite = FiniteLogits.on(device, exact).held(runner)
        return cls(runner, config, end, Lengths.of(config, length), every, finite)

    def advance(self, step: int) -> None:
        """Let all texts grow by a token, the likeliest ones going on."""
        config, (_, prompt_IP, written_IWS, _, _), width = self.config, self.images, self.config.beams
        length = prompt_IP.shape[1]
        prompt_RP = prompt_IP.repeat_interleave(width, dim=0, output_size=len(prompt_IP) * width)
        newest, start = (written_IWS[:, :, step - 1].reshape(-1, 1), length + step - 1) if step else (prompt_RP, 0)
        logits = self.runner.logits(newest, start)
        if step == written_IWS.shape[2] - 1 or is_poll_step(logits.device, step):
            self.finite.watch(logits)
        logits = logits.log_softmax(dim=1)
        if config.repetition_penalty != 1.0:
            so_far = torch.cat([prompt_RP, written_IWS[:, :, :step].flatten(0, 1)], dim=1)
            logits = penalise(logits, so_far, config.repetition_penalty)
        if length + step < config.min_length:
            logits[:, self.end] = -torch.inf
        self.images, beam_IW = self._extended(logits, step)
        self.images = self.images.held(self.runner)
        if step < written_IWS.shape[2] - 1:
            first_I = torch.arange(len(beam_IW), device=beam_IW.device)[:, None] * width
            self.runner.reorder((first_I + beam_IW).flatten(), length + step)

    def _extended(self, logits: Tensor, step: int) -> tuple[Images, Tensor]:
        """Each image's beams a token longer, and ended ones among the finished; which beam each came of [I, W]."""
        _, _, written_IWS, scores_IW, finished = self.images
        images, width = scores_IW.shape
        last = step == written_IWS.shape[2] - 1
        # A beam can end in one way only: among twice as many candidates there are enough that go on.
        sums_IWV = scores_IW[:, :, None] + logits.view(images, width, -1)
        sums_IC, index_IC = sums_IWV.flatten(1).topk(2 * width, dim=1)
        beam_IC, token_IC = index_IC // logits.shape[1], index_IC % logits.shape[1]
        candidates = take(written_IWS, beam_IC)
        candidates[:, :, step] = token_IC
        cut = last and not self.lengths.original
        ended = torch.ones_like(token_IC, dtype=torch.bool) if cut else token_IC == self.end
        entering = ended & (torch.arange(2 * width, device=ended.device) < width)
        finished = finished.add(candidates, self.lengths.scores(sums_IC, step).where(entering, NO_SCORE))
        scores_IW, going = sums_IC.where(~ended, NO_SCORE).topk(width, dim=1)
        written_IWS = take(candidates, going)
        if self.lengths.original:
            finished = finished.close(self.lengths.scores(sums_IC[:, 0], step))
            if last:
                finished = finished.add(written_IWS, self.lengths.scores(scores_IW, step + 1))
        elif not last:
            finished = finished.close(self.lengths.scores(scores_IW[:, 0], step))
        images_now = self.images._replace(written_IWS=written_IWS, scores_IW=scores_IW, finished=finished)
        return images_now, beam_IC.gather(1, going)

    def shrink(self, step: int, answer: tuple[Tensor, Tensor], keeps_rows: bool = False) -> bool:
        """After a step, let closed images go if that makes the batch smaller by a quarter. Whether any is open."""
        open_I = self.finite.read(self.images.finished.open_I)
        writing_IW = open_I[:, None].expand(-1, self.config.beams)
        if not keeps_rows and (staying := choose_staying(writing_IW, self.runner)) is not None:
            self.save(answer)
            rows, images = (numbers.to(answer[0].device, non_blocking=True) for numbers in staying)
            self.runner.keep(rows, images, self.lengths.prompt + step)
            self.images = self.images.held(self.runner, images)
        return bool(open_I.any())

    def save(self, answer: tuple[Tensor, Tensor]) -> None:
        """Write down what is finished so far: texts [I, W, S] and scores [I, W]."""
        for whole, part in zip(answer, self.images.finished, strict=False):
            whole[self.images.place_I] = part


def beam_search(
    model: Model,
    image: ImageContext,
    prompt: list[int] | Tensor,
    end: int,
    config: DecodeConfig,
    texts: int = 1,
    head: Head | None = None,
    fused: FusedSteps | None = None,
) -> list[list[int]]:
    """The tokens of `scored_beams`."""
    return [beam.ids for beam in scored_beams(model, image, prompt, end, config, texts, head, fused)]


@torch.inference_mode()
def scored_beams(
    model: Model,
    image: ImageContext,
    prompt: list[int] | Tensor,
    end: int,
    config: DecodeConfig,
    texts: int = 1,
    head: Head | None = None,
    fused: FusedSteps | None = None,
    keeps_rows: bool = False,
) -> list[Beam]:
    """Continue the prompt; the `texts` best of each image (at most `config.beams`), best first, images in their order.

    Images do not influence one another: a text is the same in any batch. An image whose texts have all ended leaves it,
    unless the batch `keeps_rows` for the sake of its shapes.
    """
    count, device = image.rows, image.device
    if not count:
        return []
    with runner_for(model, image, head, fused) as runner:
        search = Search.begin(runner, image, prompt_rows(prompt, count, device), config, end)
        answer = (torch.full_like(search.images.written_IWS, end), search.images.finished.scores_IW.clone())
        for step in range(last := answer[0].shape[2]):
            runner.run(step, search.advance)
            # Reading from an accelerator whether all are closed makes it wait: only now and then.
            if step < last - 1 and is_poll_step(device, step) and not search.shrink(step, answer, keeps_rows):
                break
        search.finite.check()
        search.save(answer)
        written, scores = (part[:count, :texts].flatten(0, 1).tolist() for part in answer)
    return [
        Beam(row[: row.index(end)] if end in row else row, score) for row, score in zip(written, scores, strict=True)
    ]


def take(texts_IWS: Tensor, index_IK: Tensor) -> Tensor:
    """The texts of each image at these places, [I, K, S]."""
    return texts_IWS.gather(1, index_IK[:, :, None].expand(-1, -1, texts_IWS.shape[2]))
