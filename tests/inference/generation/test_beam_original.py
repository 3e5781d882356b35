"""Beam search by the accounting of BLIP's own code against a slow, plain port of what that code runs.

That is `BeamSearchScorer` of transformers 4.15: here one image at a time, Python lists, every text read anew.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation.beam import beam_search, scored_beams
from capfilt.models import Blip, Blip2
from capfilt.models.layers.image_context import ImageContext

END = 3
NextToken = Callable[[list[list[int]]], Tensor]
"""Token sequences of one length -> the log-probabilities of what comes next, a row for each."""


class Hypotheses:
    """The best ended texts of one image: `BeamHypotheses`."""

    def __init__(self, beams: int, penalty: float):
        self.beams, self.penalty = beams, penalty
        self.kept: list[tuple[float, list[int]]] = []
        self.worst = 1e9

    def add(self, tokens: list[int], total: float) -> None:
        """`tokens` has the prompt and not the end."""
        score = total / len(tokens) ** self.penalty
        if len(self.kept) < self.beams or score > self.worst:
            self.kept.append((score, tokens))
            if len(self.kept) > self.beams:
                self.kept.remove(min(self.kept, key=lambda one: one[0]))
            self.worst = min(score for score, _ in self.kept)

    def is_done(self, best_total: float, length: int) -> bool:
        """Whether nothing better can come."""
        return len(self.kept) == self.beams and self.worst >= best_total / length**self.penalty


def old_beam_search(log_probs: NextToken, prompt: list[int], config: DecodeConfig) -> list[tuple[list[int], float]]:
    """The texts of one image, best first: tokens after the prompt, and their scores."""
    width = config.beams
    open_ = [list(prompt) for _ in range(width)]
    totals = [0.0] + [-1e9] * (width - 1)
    ended, done = Hypotheses(width, config.length_penalty), False
    while len(open_[0]) < config.max_length and not done:
        length = len(open_[0])
        rows = log_probs(open_)
        for row, tokens in zip(rows, open_, strict=True):
            for token in set(tokens):
                row[token] *= config.repetition_penalty  # logarithms are below 0
        if length < config.min_length:
            rows[:, END] = -torch.inf
        every = (rows + torch.tensor(totals, dtype=rows.dtype)[:, None]).flatten()
        best, index = every.topk(2 * width)
        going = list[tuple[list[int], float]]()
        for rank, (total, place) in enumerate(zip(best.tolist(), index.tolist(), strict=True)):
            beam, token = divmod(place, rows.shape[1])
            if token == END:
                if rank < width:
                    ended.add(open_[beam], total)
            elif len(going) < width:
                going.append(([*open_[beam], token], total))
        done = ended.is_done(best[0].item(), length)
        open_, totals = [tokens for tokens, _ in going], [total for _, total in going]
    if not done:
        for tokens, total in zip(open_, totals, strict=True):
            ended.add(tokens, total)
    kept = sorted(ended.kept, key=lambda one: -one[0])
    return [(tokens[len(prompt) :], score) for score, tokens in kept]


@torch.no_grad()
def read_anew(model: Blip | Blip2, image: ImageContext) -> NextToken:
    """What comes next by a whole pass over every text, without a cache."""

    def log_probs(texts: list[list[int]]) -> Tensor:
        with torch.no_grad():
            return model.decode(torch.tensor(texts), None, image.repeat(len(texts)))[:, -1].log_softmax(dim=-1)

    return log_probs


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture(scope="module")
def model(small_blip: Callable[..., Blip]) -> Blip:
    """A captioner whose texts end at many lengths."""
    return small_blip(vocab_size=40, roles=("decoder",))


@torch.no_grad()
def context(model: Blip | Blip2, pixels: Tensor) -> ImageContext:
    return model.image_context(model.encode_image(pixels), "decoder")


CASES = {
    "no prompt": ([38], {}),
    "a prompt": ([38, 7, 8, 9], {}),
    "one beam": ([38, 7, 8, 9], {"beams": 1}),
    "five beams, soon cut": ([38, 7], {"beams": 5, "max_length": 12}),
    "long texts gain": ([38, 7, 8, 9], {"length_penalty": 1.2}),
    "sums alone": ([38, 7, 8, 9], {"length_penalty": 0.0}),
    "short texts gain": ([38, 7, 8, 9], {"length_penalty": -1.0}),
    "no word twice": ([38, 7, 8], {"repetition_penalty": 1.5, "beams": 4}),
    "hardly a limit below": ([38, 7, 8, 9], {"min_length": 1, "beams": 2}),
}


def config(**options: object) -> DecodeConfig:
    settings = {"method": "beam", "min_length": 6, "max_length": 24, "accounting": "original"}
    return DecodeConfig.model_validate(settings | options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_texts_and_scores_are_those_of_the_old_algorithm(model: Blip, pixels: Tensor, case: str) -> None:
    prompt, options = CASES[case]
    settings = config(**options)
    width = settings.beams
    got = scored_beams(model, context(model, pixels), prompt, END, settings, texts=width)
    for i in range(len(pixels)):
        slow = old_beam_search(read_anew(model, context(model, pixels[i : i + 1])), prompt, settings)
        mine = got[i * width : (i + 1) * width]
        assert [beam.ids for beam in mine] == [tokens for tokens, _ in slow]
        assert [beam.score for beam in mine] == pytest.approx([score for _, score in slow], rel=1e-4)
    assert len({len(beam.ids) for beam in got}) > 1, "texts that all end alike prove little"


def test_the_first_stage_of_blip2_too(small_blip2: Callable[..., Blip2], pixels: Tensor) -> None:
    model, settings = small_blip2(vocab_size=30, seed=1), config(max_length=12)
    got = scored_beams(model, context(model, pixels), [29], END, settings)
    for i, beam in enumerate(got):
        tokens, score = old_beam_search(read_anew(model, context(model, pixels[i : i + 1])), [29], settings)[0]
        assert beam.ids == tokens
        assert beam.score == pytest.approx(score, rel=1e-4)


def test_a_prompt_that_counts_makes_other_texts(model: Blip, pixels: Tensor) -> None:
    """Without the prompt in the length, a long text's sum is divided by relatively more."""
    image, prompt = context(model, pixels), [38, 7, 8, 9]
    old = beam_search(model, image, prompt, END, config())
    new = beam_search(model, image, prompt, END, config(accounting="new_tokens"))
    assert old != new
    assert sum(map(len, old)) < sum(map(len, new))


def test_by_sums_alone_both_accountings_agree(model: Blip, pixels: Tensor) -> None:
    image, prompt = context(model, pixels), [38, 7, 8, 9]
    old = scored_beams(model, image, prompt, END, config(length_penalty=0.0), texts=3)
    new = scored_beams(model, image, prompt, END, config(length_penalty=0.0, accounting="new_tokens"), texts=3)
    assert [beam.ids for beam in old] == [beam.ids for beam in new]
    assert [beam.score for beam in old] == pytest.approx([beam.score for beam in new], rel=1e-6)


@pytest.mark.parametrize("accounting", ["original", "new_tokens"])
def test_scores_do_not_depend_on_the_batch_and_fall(model: Blip, pixels: Tensor, accounting: str) -> None:
    settings, prompt = config(accounting=accounting, beams=4), [38, 7]
    together = scored_beams(model, context(model, pixels), prompt, END, settings, texts=4)
    alone = [
        beam
        for i in range(len(pixels))
        for beam in scored_beams(model, context(model, pixels[i : i + 1]), prompt, END, settings, texts=4)
    ]
    assert [beam.ids for beam in together] == [beam.ids for beam in alone]
    assert [beam.score for beam in together] == pytest.approx([beam.score for beam in alone], rel=1e-5)
    for i in range(0, len(together), 4):
        scores = [beam.score for beam in together[i : i + 4]]
        assert scores == sorted(scores, reverse=True)
        assert all(score < 0 for score in scores)


def test_a_model_in_float64_has_its_scores_in_float64(small_blip: Callable[..., Blip], pixels: Tensor) -> None:
    exact, settings, prompt = small_blip(vocab_size=40, roles=("decoder",)).double(), config(), [38, 7, 8, 9]
    got = scored_beams(exact, context(exact, pixels.double()), prompt, END, settings)
    for i, beam in enumerate(got):
        image = context(exact, pixels[i : i + 1].double())
        tokens, score = old_beam_search(read_anew(exact, image), prompt, settings)[0]
        assert beam.ids == tokens
        assert beam.score == pytest.approx(score, rel=1e-12)
