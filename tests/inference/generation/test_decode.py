from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from capfilt.inference.config import DecodeConfig
from capfilt.inference.generation import decode
from capfilt.inference.generation.beam import beam_search
from capfilt.inference.generation.decode import generate, next_token, uniforms
from capfilt.models import Blip, Blip2

MakeBlip = Callable[..., Blip]
SEP = 3


def chance(observed: list[int], expected: list[float]) -> float:
    """The p-value of Pearson's chi-square test."""
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = torch.tensor((len(observed) - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.double)))


def slow_nucleus(logits: list[float], config: DecodeConfig) -> dict[int, float]:
    """The tokens that may be drawn, likeliest first, with their probabilities."""
    weights = [math.exp(x / config.temperature - max(logits) / config.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: config.top_k or len(logits)]
    total = sum(weights[i] for i in order)
    nucleus, reached = {}, 0.0
    for i in order:
        if reached >= config.top_p:
            break
        nucleus[i] = weights[i] / total
        reached += nucleus[i]
    return {i: p / reached for i, p in nucleus.items()}


def slow_text(model: Blip, tokens: Tensor, prompt: list[int], config: DecodeConfig, draws: np.ndarray) -> list[int]:
    """One text of one image, the whole decoder again for every token."""
    ids = list(prompt)
    for draw in draws[: config.max_length - len(prompt)]:
        keys = model.image_context(tokens[None], "decoder")
        logits = model.decode(torch.tensor([ids]), None, keys)[0, -1].tolist()
        for seen in set(ids):  # the prompt and [DEC] count
            logits[seen] *= 1 / config.repetition_penalty if logits[seen] > 0 else config.repetition_penalty
        if len(ids) < config.min_length:
            logits[SEP] = -math.inf
        if config.method == "greedy":
            token = max(range(len(logits)), key=logits.__getitem__)
        else:
            nucleus = slow_nucleus(logits, config)
            upto = list(itertools.accumulate(nucleus.values()))
            token = list(nucleus)[next((i for i, u in enumerate(upto) if draw < u), len(upto) - 1)]
        if token == SEP:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model(small_blip: MakeBlip) -> Blip:
    model = small_blip(roles=("decoder",))
    with torch.no_grad():
        model.text.head.bias[SEP] += 3  # texts of many lengths
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(12, 5, 24, generator=torch.Generator().manual_seed(4))


class TestGenerate:
    @pytest.mark.parametrize(
        "config",
        [
            DecodeConfig(method="greedy", min_length=3, max_length=14),
            DecodeConfig(min_length=3, max_length=14),
            DecodeConfig(min_length=6, max_length=14, top_p=0.5, temperature=1.7),
            DecodeConfig(min_length=3, max_length=14, top_k=7, repetition_penalty=1.4),
            DecodeConfig(method="greedy", min_length=9, max_length=14, repetition_penalty=2.0),
        ],
        ids=["greedy", "nucleus", "narrow", "top-k", "penalty"],
    )
    @pytest.mark.parametrize("words", [0, 2])
    def test_is_the_naive_loop_token_for_token(
        self, model: Blip, images: Tensor, config: DecodeConfig, words: int
    ) -> None:
        candidates, prompt = 2, [model.config.text.dec, 40, 41][: 1 + words]
        rows = len(images) * candidates
        draws = np.random.default_rng(0).random((rows, config.max_length - len(prompt)))
        actual = generate(model, model.image_context(images, "decoder"), prompt, SEP, config, torch.from_numpy(draws))
        wanted = [slow_text(model, images[i // candidates], prompt, config, draws[i]) for i in range(rows)]
        assert actual == wanted
        if config.method == "nucleus":
            assert len({len(text) for text in actual}) > 2

    @pytest.mark.parametrize(("eager", "length"), [(50, 4), (-50, 6)])
    def test_lengths_count_the_prompt_and_dec(self, model: Blip, images: Tensor, eager: float, length: int) -> None:
        """A model that always wants to end writes up to min_length, one that never does up to max_length."""
        model = copy.deepcopy(model)
        with torch.no_grad():
            model.text.head.bias[SEP] += eager
        prompt = [model.config.text.dec, 40, 41, 42]
        draws = torch.from_numpy(np.random.default_rng(0).random((12, 6)))
        config = DecodeConfig(min_length=8, max_length=10)
        texts = generate(model, model.image_context(images, "decoder"), prompt, SEP, config, draws)
        assert [len(text) for text in texts] == [length] * 12
        assert all(SEP not in text for text in texts)

    def test_texts_do_not_know_their_neighbours(self, model: Blip, images: Tensor) -> None:
        config = DecodeConfig(min_length=3, max_length=14)
        draws = torch.from_numpy(np.random.default_rng(0).random((12, 13)))
        keys = model.image_context(images, "decoder")
        together = generate(model, keys, [model.config.text.dec], SEP, config, draws)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        mixed = keys.select(torch.as_tensor(order))
        shuffled = generate(model, mixed, [model.config.text.dec], SEP, config, draws[order])
        assert shuffled == [together[i] for i in order]
        for i in range(12):
            row = keys.select(slice(i, i + 1))
            assert generate(model, row, [model.config.text.dec], SEP, config, draws[i : i + 1]) == [together[i]]


class TestTextsThatEndedLeave:
    """The naive loop never heard of leaving; the texts must be the same, and the work less."""

    CONFIG = DecodeConfig(min_length=3, max_length=20, top_p=0.95)

    @pytest.mark.parametrize(("every", "candidates"), [(1, 5), (3, 1), (8, 2)])
    def test_and_nothing_else_changes(
        self, model: Blip, images: Tensor, monkeypatch: pytest.MonkeyPatch, candidates: int, every: int
    ) -> None:
        monkeypatch.setattr(decode, "is_poll_step", lambda _device, step: step % every == every - 1)
        fed = rows_fed(model, monkeypatch)
        rows = len(images) * candidates
        draws = np.random.default_rng(candidates).random((rows, 19))
        prompt = [model.config.text.dec]
        actual = generate(
            model, model.image_context(images, "decoder"), prompt, SEP, self.CONFIG, torch.from_numpy(draws)
        )
        wanted = [slow_text(model, images[i // candidates], prompt, self.CONFIG, draws[i]) for i in range(rows)]
        assert actual == wanted
        assert fed[0] == rows
        assert fed == sorted(fed, reverse=True)
        assert fed[-1] < 0.75 * rows, "no row has left"
        assert every > 1 or sum(fed) < 0.75 * rows * len(fed)

    def test_with_a_penalty_too(self, model: Blip, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        config = DecodeConfig(min_length=3, max_length=20, repetition_penalty=1.3)
        draws = np.random.default_rng(3).random((12, 18))
        prompt = [model.config.text.dec, 40]
        fed = rows_fed(model, monkeypatch)
        actual = generate(model, model.image_context(images, "decoder"), prompt, SEP, config, torch.from_numpy(draws))
        assert actual == [slow_text(model, images[i], prompt, config, draws[i]) for i in range(12)]
        assert fed[-1] < fed[0]

    def test_a_few_rows_are_as_many_as_libraries_multiply_alike(
        self, model: Blip, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keys = model.image_context(images, "decoder").select(slice(3))
        draws = np.random.default_rng(0).random((3, 19))
        prompt = [model.config.text.dec]
        for rows in (1, 2, 3):
            fed = rows_fed(model, monkeypatch)
            some = keys.select(slice(rows))
            actual = generate(model, some, prompt, SEP, self.CONFIG, torch.from_numpy(draws[:rows]))
            assert actual == [slow_text(model, images[i], prompt, self.CONFIG, draws[i]) for i in range(rows)]
            assert min(fed) >= decode.MIN_ROWS

    def test_a_batch_does_not_shrink_below_what_libraries_multiply_alike(
        self, model: Blip, images: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fed = rows_fed(model, monkeypatch)
        draws = torch.from_numpy(np.random.default_rng(0).random((12, 19)))
        generate(model, model.image_context(images, "decoder"), [model.config.text.dec], SEP, self.CONFIG, draws)
        assert min(fed) >= decode.MIN_ROWS


@pytest.mark.parametrize("method", ["nucleus", "beam"])
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_language_model_writes_for_few_images_what_it_writes_for_many(
    small_blip2: Callable[..., Blip2], kind: str, method: str
) -> None:
    model, config = small_blip2(kind), DecodeConfig(method=method, min_length=3, max_length=12, beams=2)
    tokens = torch.randn(6, 5, 24, generator=torch.Generator().manual_seed(5))
    draws = torch.from_numpy(np.random.default_rng(5).random((6, 11)))

    def written(images: int) -> list[list[int]]:
        keys = model.image_context(tokens[:images], "decoder")
        if method == "beam":
            return beam_search(model, keys, [2], SEP, config, 1)
        return generate(model, keys, [2], SEP, config, draws[:images])

    every = written(6)
    assert len(every) == 6
    assert [written(images) for images in (1, 2, 3)] == [every[:1], every[:2], every[:3]]


def test_a_language_model_in_fp16_does_not_end_before_the_least_length(small_blip2: Callable[..., Blip2]) -> None:
    """fp16 has no number that is finite and yet impossible."""
    model, config = small_blip2("opt", frozen="fp16"), DecodeConfig(min_length=11, max_length=12)
    keys = model.image_context(torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(5)), "decoder")
    draws = torch.from_numpy(np.random.default_rng(5).random((4, 11)))
    assert {len(ids) for ids in generate(model, keys, [2], SEP, config, draws)} <= {10, 11}


def rows_fed(model: Blip, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step of a generation feeds, as it goes on."""
    fed: list[int] = []
    step = Blip.decode_step

    def noted(self: Blip, ids_BT: Tensor, *rest: object) -> Tensor:
        fed.append(len(ids_BT))
        return step(self, ids_BT, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Blip, "decode_step", noted)
    return fed


class TestChoose:
    LOGITS = (2.0, 1.5, 1.4, 0.5, 0.0, -0.5, -1.0, -3.0)

    @pytest.mark.parametrize(
        "config",
        [
            DecodeConfig(),
            DecodeConfig(top_p=0.6),
            DecodeConfig(top_p=1.0),
            DecodeConfig(top_k=3, top_p=1.0),
            DecodeConfig(top_k=4, top_p=0.8, temperature=2.0),
        ],
        ids=["paper", "narrow", "all", "top-3", "both"],
    )
    def test_draws_the_nucleus(self, config: DecodeConfig) -> None:
        draws = np.concatenate([uniforms(0, 0, str(uid), 0, 100) for uid in range(200)])
        logits = torch.tensor(self.LOGITS).expand(len(draws), -1)
        counts = next_token(logits, config, torch.from_numpy(draws)).bincount(minlength=8).tolist()
        nucleus = slow_nucleus(list(self.LOGITS), config)
        assert {i for i, n in enumerate(counts) if n} == set(nucleus)
        if len(nucleus) > 1:
            assert chance([counts[i] for i in nucleus], [p * len(draws) for p in nucleus.values()]) > 1e-3

    def test_the_nucleus_includes_the_token_that_reaches_p(self) -> None:
        logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
        edge = torch.tensor([1 - 1e-9], dtype=torch.double)
        for p, last in ((0.4, 0), (0.6, 1), (0.79, 1), (0.81, 2), (0.96, 3), (1.0, 3)):
            assert next_token(logits, DecodeConfig(top_p=p), edge).tolist() == [last]
            assert next_token(logits, DecodeConfig(top_p=p), edge * 0).tolist() == [0]

    def test_what_may_not_be_written_is_not_drawn(self) -> None:
        logits = torch.tensor([[1.0, -torch.inf, 0.9]]).expand(50, -1)
        drawn = next_token(logits, DecodeConfig(top_p=1.0), torch.linspace(0, 1 - 1e-9, 50, dtype=torch.double))
        assert set(drawn.tolist()) == {0, 2}

    def test_greedy_ignores_the_draw(self) -> None:
        logits = torch.tensor([self.LOGITS[::-1]] * 3)
        draws = torch.tensor([0.0, 0.5, 0.99], dtype=torch.double)
        assert next_token(logits, DecodeConfig(method="greedy"), draws).tolist() == [7, 7, 7]

    def test_nothing_narrows_the_nucleus_unrequested(self) -> None:
        config = DecodeConfig()
        assert (config.method, config.top_p, config.top_k) == ("nucleus", 0.9, 0)
        assert (config.repetition_penalty, config.temperature, config.prompt) == (1.0, 1.0, "")
        flat, draws = torch.zeros(1000, 1000), torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.double)
        assert len(set(next_token(flat, config, draws).tolist())) == pytest.approx(900, abs=2)


class TestUniforms:
    def test_are_a_function_of_the_four_names(self) -> None:
        base = uniforms(0, 1, "a" * 32, 0, 20)
        assert np.array_equal(base, uniforms(0, 1, "a" * 32, 0, 20))
        for other in ((1, 1, "a" * 32, 0), (0, 2, "a" * 32, 0), (0, 1, "b" * 32, 0), (0, 1, "a" * 32, 1)):
            assert not np.isin(uniforms(*other, 20), base).any()

    def test_more_steps_begin_with_the_same(self) -> None:
        assert np.array_equal(uniforms(0, 0, "u", 0, 50)[:9], uniforms(0, 0, "u", 0, 9))

    def test_are_even_in_0_to_1(self) -> None:
        draws = np.concatenate([uniforms(7, 0, str(uid), 0, 30) for uid in range(300)])
        assert draws.min() >= 0
        assert draws.max() < 1
        counts = np.histogram(draws, bins=20, range=(0, 1))[0].tolist()
        assert chance(counts, [len(draws) / 20] * 20) > 1e-3
        first = [uniforms(7, 0, str(uid), 0, 1)[0] for uid in range(2000)]
        assert chance(np.histogram(first, bins=10, range=(0, 1))[0].tolist(), [200.0] * 10) > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_length": 30},
        {"max_length": 2},
        {"top_p": 0},
        {"top_p": 1.1},
        {"temperature": 0},
        {"repetition_penalty": 0.9},
    ],
)
def test_nonsense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        DecodeConfig(**wrong)
