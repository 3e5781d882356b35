from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from capfilt.models import Blip, Blip2
from capfilt.objectives.collectives import gather, rank, world_size
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.losses.itc import itc
from capfilt.objectives.losses.itc_queries import itc_queries
from capfilt.objectives.losses.itm import itm, local_negatives
from capfilt.objectives.tasks.blip import BlipPretraining
from capfilt.objectives.tasks.blip2 import Blip2Stage1

pytestmark = pytest.mark.timeout(300)  # two processes start, perhaps on a busy machine

B, P, Q = 8, 5, 16
TOLERANCE = math.sqrt(8 * 7 * 32) * 2.0**-24
"""Relative to the largest gradient, 2.5e-6. A weight's gradient adds a product for each of 8 texts' 7 tokens, each a
sum over a width of 32: roundings of fp32 in another order grow with the root of how many there are."""


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.double), dim=-1)


@pytest.fixture(scope="module")
def task(small_blip: Callable[..., Blip], small_blip2: Callable[..., Blip2]) -> dict[str, Any]:
    torch.manual_seed(0)
    config = ObjectivesConfig(losses={"itc": 1.0}, queue=Q, momentum=0.5)
    ids = torch.randint(4, 190, (B, 7))
    own_keys = ObjectivesConfig(
        losses={"itc": 1.0, "itm": 1.0}, queue=Q, momentum=0.5, itc_keys="rank", negatives="all", negatives_epsilon=0.0
    )
    return {
        "features": [unit(B, P) for _ in range(4)],
        "queues": [unit(Q, P) for _ in range(2)],
        "temperature": torch.tensor(0.07, dtype=torch.double),
        # ITC alone: nothing reaches the match head and the cross-attention.
        "learner": BlipPretraining(small_blip(roles=("encoder",)), config),
        "learner with own keys": BlipPretraining(small_blip(roles=("encoder",)), own_keys).double(),
        "drawn": {"wrong_images": torch.arange(B).roll(3), "wrong_texts": torch.arange(B).roll(-2)},
        "batch": [torch.randn(B, 3, 16, 16), ids, torch.ones_like(ids), torch.arange(B)],
        "matcher": small_blip(roles=("encoder",)).double(),
        "pairs": pairs_across_ranks(ids),
        "queries": [unit(B, 3, P), unit(B, P)],
        "first_stage": Blip2Stage1(small_blip2().double(), ObjectivesConfig(losses={"itc": 1.0, "lm": 1.0}, queue=0)),
        "matcher of BLIP-2": small_blip2().double(),
    }


def pairs_across_ranks(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pairs whose wrong partners lie on the other rank, on their own, and once not wrong; the first half is shorter."""
    mask = torch.ones_like(ids)
    mask[: B // 2, 5:] = 0
    return {
        "ids": ids * mask,
        "mask": mask,
        "tokens": torch.randn(B, 5, 24, dtype=torch.double),
        "groups": torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]),
        "images": torch.tensor([7, 4, 5, 1, 0, 6, 1, 2]),
        "texts": torch.tensor([4, 0, 7, 6, 1, 2, 3, 5]),
    }


@pytest.fixture(scope="module")
def answers(task: dict[str, Any], rank_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two gloo ranks say about the task."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(task, folder / "task.pt")
    rank_pair.run(Path(__file__).with_name("ranks_of_losses.py"), folder)
    return [torch.load(folder / f"answer-{of}.pt", weights_only=False) for of in range(2)]


def test_alone_nothing_is_gathered() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(gather(x), x)
    assert not gather(x).requires_grad
    assert (rank(), world_size()) == (0, 1)


def test_two_ranks_gather_in_their_order(answers: list[dict[str, Any]]) -> None:
    assert [answer["who"] for answer in answers] == [(0, 2), (1, 2)]
    for answer in answers:
        assert answer["gathered"].tolist() == [[0, 10], [1, 11]]


def test_itc_of_two_ranks_has_the_gradients_of_one_process(task: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    image, text = (x.clone().requires_grad_() for x in task["features"][:2])
    temperature = task["temperature"].clone().requires_grad_()
    whole = itc(image, text, *task["features"][2:], *task["queues"], temperature, 0.4)
    whole.loss.backward()
    found = [answer["features"] for answer in answers]
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, whole.loss.detach())
    # A rank's loss is the mean over its own rows, and data-parallel training takes the mean over ranks.
    for i, wanted in enumerate((image.grad, text.grad)):
        torch.testing.assert_close(torch.cat([f["gradients"][i] for f in found]) / 2, wanted, atol=1e-12, rtol=1e-9)
    mean = (found[0]["gradients"][2] + found[1]["gradients"][2]) / 2
    torch.testing.assert_close(mean, temperature.grad, atol=1e-12, rtol=1e-9)


def test_similarities_are_to_the_keys_of_all_ranks(task: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    image, text, momentum_image, momentum_text = task["features"]
    for of, answer in enumerate(answers):
        own = slice(of * B // 2, (of + 1) * B // 2)
        image_to_text, text_to_image = answer["features"]["pairs"]
        torch.testing.assert_close(image_to_text, image[own] @ momentum_text.T / task["temperature"])
        torch.testing.assert_close(text_to_image, text[own] @ momentum_image.T / task["temperature"])


def test_targets_are_over_the_keys_of_all_ranks(task: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    whole = itc(*task["features"], *task["queues"], task["temperature"], 0.4)
    for i in range(2):
        targets = [answer["features"]["targets"][i] for answer in answers]
        torch.testing.assert_close(torch.cat(targets), whole[3 + i])


def test_own_keys_are_those_of_a_process_that_trains_by_itself(
    task: dict[str, Any], answers: list[dict[str, Any]]
) -> None:
    """As the released BLIP has it: two processes whose ITC knows nothing of the other but by the queue, which both fill
    with the features of both. ITM draws from the pairs of both by what they have in common, all the same."""
    learner = copy.deepcopy(task["learner with own keys"]).train()
    images, ids, mask, image_ids = task["batch"]
    whole = PairBatch(images.double(), ids, mask, image_ids)
    draws = learner.draws = GivenDraws(**task["drawn"])
    learner(whole, progress=0.5)
    before = copy.deepcopy(learner)
    losses, _ = learner(whole, progress=0.5)
    assert learner.momentum is not None
    for of, answer in enumerate(answers):
        half = slice(of * B // 2, (of + 1) * B // 2)
        alone = copy.deepcopy(before)
        alone.draws = GivenDraws(wrong_images=torch.arange(B // 2), wrong_texts=torch.arange(B // 2))
        wanted, _ = alone(whole.select(half), progress=0.5)
        torch.testing.assert_close(answer["own keys"]["losses"]["itc"], wanted["itc"].detach())
        assert abs(float(wanted["itc"].detach() - losses["itc"].detach())) > 0.05
        torch.testing.assert_close(answer["own keys"]["queue"], learner.momentum.queue_text)
        for name, rows in answer["own keys"]["weights"].items():
            torch.testing.assert_close(rows, draws.weights[name][half])
    mean = sum(answer["own keys"]["losses"]["itm"] for answer in answers) / 2
    torch.testing.assert_close(mean, losses["itm"].detach())


def test_steps_of_two_ranks_are_those_of_one_process(task: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    learner = copy.deepcopy(task["learner"]).train()
    for progress in (0.02, 0.05):
        learner.zero_grad()
        losses, _ = learner(PairBatch(*task["batch"]), progress=progress)
        learner.total(losses).backward()
    wanted = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    one, other = (answer["learner"] for answer in answers)
    torch.testing.assert_close((one["loss"] + other["loss"]) / 2, losses["itc"].detach(), atol=1e-6, rtol=0)
    for found in (one, other):
        assert {name for name, g in found["gradients"].items() if g.any()} == {n for n, g in wanted.items() if g.any()}
        for name, gradient in wanted.items():
            torch.testing.assert_close(found["gradients"][name], gradient, atol=1e-6, rtol=1e-5)
        assert learner.momentum is not None
        torch.testing.assert_close(found["queues"][0], learner.momentum.queue_image, atol=1e-6, rtol=0)
        torch.testing.assert_close(found["queues"][1], learner.momentum.queue_text, atol=1e-6, rtol=0)
        assert int(found["queues"][2]) == 0  # two steps of 8 fill the queue of 16


def test_itc_of_queries_has_the_gradients_of_one_process(task: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    image, text, heat = (x.clone().requires_grad_() for x in (*task["queries"], task["temperature"]))
    whole = itc_queries(image, text, heat, image_ids_B=task["pairs"]["groups"])
    whole.loss.backward()
    found = [answer["queries"] for answer in answers]
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, whole.loss.detach())
    for i, wanted in enumerate((image.grad, text.grad)):
        torch.testing.assert_close(torch.cat([f["gradients"][i] for f in found]) / 2, wanted, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close((found[0]["gradients"][2] + found[1]["gradients"][2]) / 2, heat.grad)
    for i in range(2):
        torch.testing.assert_close(torch.cat([f["pairs"][i] for f in found]), whole[1 + i])


def test_detached_keys_carry_no_gradient_to_any_rank(task: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    """As LAVIS gathers them: the value is that of all, the gradients are of a process's own rows as queries alone."""
    image, text, heat = (x.clone().requires_grad_() for x in (*task["queries"], task["temperature"]))
    keys_image, keys_text = image.detach(), text.detach()
    to_text = torch.einsum("bqp,np->bqn", image, keys_text).amax(dim=1) / heat
    to_image = torch.einsum("nqp,bp->bnq", keys_image, text).amax(dim=2) / heat
    groups = task["pairs"]["groups"]
    same = (groups[:, None] == groups[None, :]).double()
    target = 0.9 * same / same.sum(dim=1, keepdim=True) + 0.1 / B
    loss = -(target * (to_text.log_softmax(dim=1) + to_image.log_softmax(dim=1))).sum() / (2 * B)
    loss.backward()
    found = [answer["detached queries"] for answer in answers]
    torch.testing.assert_close((found[0]["loss"] + found[1]["loss"]) / 2, loss.detach())
    for i, wanted in enumerate((image.grad, text.grad)):
        torch.testing.assert_close(torch.cat([f["gradients"][i] for f in found]) / 2, wanted, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close((found[0]["gradients"][2] + found[1]["gradients"][2]) / 2, heat.grad)
    for f, answer in zip(found, answers, strict=True):
        assert not torch.allclose(f["gradients"][1], answer["queries"]["gradients"][1], rtol=0.05)


def test_alone_even_detached_keys_have_gradients(task: dict[str, Any]) -> None:
    """What LAVIS' gathering does without torch.distributed: it returns what it is given."""
    found = []
    for detached in (True, False):
        image, text, heat = (x.clone().requires_grad_() for x in (*task["queries"], task["temperature"]))
        itc_queries(image, text, heat, detached=detached).loss.backward()
        found.append(text.grad)
    torch.testing.assert_close(*found, atol=0, rtol=0)


def test_a_step_of_the_first_stage_is_that_of_one_process(task: dict[str, Any], answers: list[dict[str, Any]]) -> None:
    learner = copy.deepcopy(task["first_stage"]).train()
    images, *texts = task["batch"]
    losses, _ = learner(PairBatch(images.double(), *texts), progress=0.0)
    learner.total(losses).backward()
    found = [answer["first_stage"] for answer in answers]
    for name, loss in losses.items():
        mean = (found[0]["losses"][name] + found[1]["losses"][name]) / 2
        torch.testing.assert_close(mean, loss.detach(), atol=1e-6, rtol=0)
    wanted = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for f in found:
        assert {name for name, g in f["gradients"].items() if g.any()} == {n for n, g in wanted.items() if g.any()}
        for name, gradient in wanted.items():
            torch.testing.assert_close(f["gradients"][name], gradient, atol=TOLERANCE * largest, rtol=1e-5)


@pytest.mark.parametrize(("matcher", "answered"), [("matcher", "itm"), ("matcher of BLIP-2", "itm of BLIP-2")])
def test_itm_with_partners_of_all_ranks_has_the_gradients_of_one_process(
    task: dict[str, Any], answers: list[dict[str, Any]], matcher: str, answered: str
) -> None:
    """A rank's images collect gradients of every rank that took them for wrong ones."""
    model, case = copy.deepcopy(task[matcher]), task["pairs"]
    tokens = case["tokens"].clone().requires_grad_()
    keys = model.image_context(tokens, "encoder")
    wrong = local_negatives(case["ids"], case["mask"], keys, case["groups"], case["images"], case["texts"])
    assert wrong.image_is_wrong_B.tolist() == [False, *[True] * 7]
    # The mean over ranks weighs halves alike, though one of them leaves a pair out.
    losses = []
    for of in range(2):
        own = slice(of * B // 2, (of + 1) * B // 2)
        part = type(wrong)(
            wrong.image_context.select(own),
            *(x[own] for x in wrong[1:]),  # type: ignore[index]
        )
        losses.append(itm(model, case["ids"][own], case["mask"][own], keys.select(own), part)[0])
    (sum(losses) / 2).backward()  # type: ignore[union-attr]
    found = [answer[answered] for answer in answers]
    assert [f["width"] for f in found] == [5, 7]
    torch.testing.assert_close(torch.stack([f["loss"] for f in found]), torch.stack(losses).detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat([f["tokens"] for f in found]) / 2, tokens.grad, atol=1e-7, rtol=1e-5)
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for f in found:
        assert f["gradients"].keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(f["gradients"][name], gradient, atol=1e-7, rtol=1e-5)
