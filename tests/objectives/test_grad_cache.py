from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from capfilt.errors import RecipeError
from capfilt.models import Blip, Blip2
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.grad_cache import GeneratorStates
from capfilt.objectives.interface import LossesAndMetrics, PairBatch
from capfilt.objectives.tasks import unsupported
from capfilt.objectives.tasks.blip import BlipPretraining
from capfilt.objectives.tasks.blip2 import Blip2Stage1, Blip2Stage2

B = 8


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eight pairs of six images, texts of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 190, (B, 7), generator=generator)
    for row, length in enumerate((7, 4, 5, 6, 3, 7, 4, 5)):
        ids[row, length:] = 0
    images = torch.randn(B, 3, 16, 16, generator=generator)
    return images, ids, (ids != 0).long(), torch.tensor([0, 1, 2, 3, 4, 0, 5, 2])


def learned(
    learner: Any, batch: tuple[Tensor, ...], pieces: int, steps: int = 2
) -> tuple[LossesAndMetrics, dict[str, Tensor]]:
    """The last of a few steps, in pieces or (0) as a whole; the draws of negatives are the same ones."""
    learner = copy.deepcopy(learner).train()
    for number in range(steps):
        learner.zero_grad()
        torch.manual_seed(number)
        if pieces:
            found = learner.backward_in_chunks(PairBatch(*batch), 0.02, pieces, contextlib.nullcontext)
        else:
            found = learner(PairBatch(*batch), progress=0.02)
            learner.total(found[0]).backward()
    gradients = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None and p.grad.any()}
    return found, {**gradients, **{name: t for name, t in learner.state_dict().items() if "queue" in name}}


def same(found: tuple[LossesAndMetrics, dict[str, Tensor]], wanted: tuple[LossesAndMetrics, dict[str, Tensor]]) -> None:
    for one, other in zip(found[0], wanted[0], strict=True):
        assert list(one) == list(other)
        torch.testing.assert_close(one, {n: t.detach() for n, t in other.items()}, atol=1e-6, rtol=1e-6)
    assert found[1].keys() == wanted[1].keys()
    largest = max(float(t.abs().max()) for t in wanted[1].values())
    for name, tensor in wanted[1].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-6 * max(1.0, largest), rtol=1e-6)


@pytest.mark.parametrize("pieces", [2, 8])
@pytest.mark.parametrize(
    ("losses", "options"),
    [
        ({"itc": 1.0, "itm": 1.0, "lm": 1.0}, {}),
        ({"itc": 1.0, "itm": 0.5, "lm": 2.0}, {"negatives_by": "online", "itc_targets": "image"}),
        ({"itc": 1.0}, {}),
        ({"itm": 1.0}, {}),
        ({"lm": 1.0}, {"mean_over": "all"}),
    ],
)
def test_chunks_learn_what_the_whole_batch_does(
    small_blip: Callable[..., Blip],
    batch: tuple[Tensor, ...],
    losses: dict[str, float],
    options: dict[str, Any],
    pieces: int,
) -> None:
    torch.manual_seed(0)
    config = ObjectivesConfig(losses=losses, queue=16, momentum=0.5, **options)  # type: ignore[arg-type]
    learner = BlipPretraining(small_blip(init_std=0.1), config, prompt=2)
    same(learned(learner, batch, pieces), learned(learner, batch, 0))


@pytest.mark.parametrize("share", ["none", "all"])
def test_whatever_the_roles_share(small_blip: Callable[..., Blip], batch: tuple[Tensor, ...], share: str) -> None:
    torch.manual_seed(0)
    learner = BlipPretraining(small_blip(init_std=0.1, share=share), ObjectivesConfig(queue=16))
    learner.model.vision.recompute = 1
    same(learned(learner, batch, 4), learned(learner, batch, 0))


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_the_second_stage_too(small_blip2: Callable[..., Blip2], batch: tuple[Tensor, ...], language: str) -> None:
    config = ObjectivesConfig(losses={"lm": 1.0}, queue=0, smoothing=0.0)
    learner = Blip2Stage2(small_blip2(language), config, prompt=2)
    same(learned(learner, batch, 4), learned(learner, batch, 0))


def test_plain_pieces_would_not(small_blip: Callable[..., Blip], batch: tuple[Tensor, ...]) -> None:
    """What is compared here is no triviality: contrast within each piece has other gradients."""
    torch.manual_seed(0)
    learner = BlipPretraining(small_blip(init_std=0.1), ObjectivesConfig(losses={"itc": 1.0}, queue=0)).train()
    _, whole = learned(learner, batch, 0, steps=1)
    for own in (slice(0, 4), slice(4, 8)):
        losses, _ = learner(PairBatch(*batch).select(own), progress=0.02)
        (learner.total(losses) / 2).backward()
    apart = {name: p.grad for name, p in learner.named_parameters() if name in whole and p.grad is not None}
    both = [torch.cat([g[name].flatten() for name in apart]) for g in (apart, whole)]
    assert float(torch.nn.functional.cosine_similarity(*both, dim=0)) < 0.99


def test_a_piece_has_the_same_draws_both_times(small_blip: Callable[..., Blip], batch: tuple[Tensor, ...]) -> None:
    """With dropout, what the towers carry back is the derivative of what they said: nudged, the loss moves by it."""
    torch.manual_seed(0)
    model = small_blip(init_std=0.1, dropout=0.3)
    learner = BlipPretraining(model, ObjectivesConfig(losses={"itc": 1.0}, queue=0, momentum=1.0, alpha=0.0)).train()

    def said() -> float:
        learner.zero_grad()
        torch.manual_seed(3)
        losses, _ = learner.backward_in_chunks(PairBatch(*batch), 0.0, 4, contextlib.nullcontext)
        return float(losses["itc"])

    for weight in (model.text.layers[0].self_attention["encoder"].block.query.weight, model.vision.positions):  # type: ignore[union-attr,index]
        said()
        gradient = weight.grad.clone()
        norm, nudge, found = float(gradient.norm()), 1e-3 * gradient / gradient.norm(), []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * nudge
            found.append(said())
            with torch.no_grad():
                weight -= sign * nudge
        assert (found[0] - found[1]) / 2e-3 == pytest.approx(norm, rel=0.03)


def test_draws_come_again() -> None:
    before = GeneratorStates(torch.device("cpu"))
    first = torch.rand(3)
    before.restore()
    assert torch.equal(torch.rand(3), first)


def test_what_cannot_be_cut_says_why(
    small_blip: Callable[..., Blip], small_blip2: Callable[..., Blip2], batch: Any
) -> None:
    batch = PairBatch(*batch)
    plain, all_ranks = ObjectivesConfig(queue=0), ObjectivesConfig(queue=0, negatives="all")
    only_lm = ObjectivesConfig(losses={"lm": 1.0}, queue=0)
    assert unsupported(small_blip().config, plain, micro_batches=2) == ""
    assert unsupported(small_blip2("opt").config, only_lm, micro_batches=2) == ""
    assert "all queries with all texts" in unsupported(small_blip2().config, plain, micro_batches=2)
    assert "images of other processes" in unsupported(small_blip().config, all_ranks, micro_batches=2)
    assert unsupported(small_blip().config, all_ranks) == unsupported(small_blip2().config, plain) == ""
    for learner in (Blip2Stage1(small_blip2(), plain), BlipPretraining(small_blip(), all_ranks)):
        with pytest.raises(RecipeError, match="set micro_batches to 1"):
            learner.backward_in_chunks(batch, 0.0, 2, contextlib.nullcontext)
    with pytest.raises(RecipeError, match="has 8 pairs of a batch, which micro_batches 3 does not divide"):
        BlipPretraining(small_blip(), plain).backward_in_chunks(batch, 0.0, 3, contextlib.nullcontext)
