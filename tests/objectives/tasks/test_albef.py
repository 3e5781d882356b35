"""ALBEF's pretraining against the paper's formulas written out, pair by pair, and over two ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models import architecture_of, build
from capfilt.models.albef.model import Albef
from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.kinds.albef import AlbefObjectives
from capfilt.objectives.masking import IGNORED, Masked
from capfilt.objectives.tasks import build_task, unsupported
from capfilt.objectives.tasks.albef import AlbefPretraining

B, QUEUE, ALPHA = 4, 8, 0.3
WRONG_IMAGES, WRONG_TEXTS = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 1, 0])


@pytest.fixture
def model() -> Albef:
    torch.manual_seed(0)
    model = build(architecture_of("albef/tiny"))
    assert isinstance(model, Albef)
    return model.double()


@pytest.fixture
def batch() -> PairBatch:
    torch.manual_seed(1)
    ids = torch.randint(5, 190, (B, 6))
    ids[2, 4:] = 0
    return PairBatch(torch.randn(B, 3, 32, 32).double(), ids, (ids != 0).long(), torch.arange(B))


@pytest.fixture
def masked(batch: PairBatch) -> Masked:
    ids, labels = batch.ids_BT.clone(), torch.full_like(batch.ids_BT, IGNORED)
    for row, place in ((0, 1), (1, 3), (1, 4), (3, 5)):
        labels[row, place], ids[row, place] = ids[row, place], 4
    return Masked(ids, labels)


def task_of(model: Albef, masked: Masked, **settings: object) -> AlbefPretraining:
    task = build_task(model, AlbefObjectives.model_validate({"queue": QUEUE, **settings}))
    assert isinstance(task, AlbefPretraining)
    task.momentum.double()
    task.draws = GivenDraws(wrong_images=WRONG_IMAGES, wrong_texts=WRONG_TEXTS, masked=masked)
    task.alpha = ALPHA
    return task.train()


def slow_losses(model: Albef, slow: Albef, queues: tuple[Tensor, Tensor], batch: PairBatch, masked: Masked) -> Tensor:
    """The three losses, one pair at a time (ALBEF equations 1 to 7)."""
    images, ids, mask, _ = batch
    tokens, slow_tokens = model.encode_image(images), slow.encode_image(images)
    states = model.encode_text(ids, mask)
    features = model.project_image(tokens), model.project_text(states)
    keys = slow.project_image(slow_tokens), slow.project_text(slow.encode_text(ids, mask))
    itc = torch.zeros((), dtype=torch.float64)
    for side in (0, 1):
        columns = torch.cat([keys[1 - side], queues[1 - side]])
        for b in range(B):
            target = ALPHA * (columns @ keys[side][b] / model.temperature).softmax(0)
            target[b] += 1 - ALPHA
            itc = itc - (target.detach() * (columns @ features[side][b] / model.temperature).log_softmax(0)).sum()
    pairs = [(b, b, 1) for b in range(B)]
    pairs += [(int(WRONG_IMAGES[b]), b, 0) for b in range(B)] + [(b, int(WRONG_TEXTS[b]), 0) for b in range(B)]
    itm = []
    for image, text, label in pairs:
        context = model.image_context(tokens[image : image + 1], "encoder")
        fused = model.text.fuse_states(states[text : text + 1], mask[text : text + 1], context)
        itm.append(F.cross_entropy(model.match_head(fused[:, 0]), torch.tensor([label])))
    mlm = []
    for b, t in (masked.labels_BT != IGNORED).nonzero().tolist():
        logits = []
        for one, of_image in ((model, tokens), (slow, slow_tokens)):
            context = one.image_context(of_image[b : b + 1], "encoder")
            logits.append(one.unmask(masked.ids_BT[b : b + 1], mask[b : b + 1], context)[0, t])
        log_p, soft = logits[0].log_softmax(0), logits[1].detach().softmax(0)
        mlm.append(-(1 - ALPHA) * log_p[masked.labels_BT[b, t]] - ALPHA * (soft * log_p).sum())
    return torch.stack([itc / (2 * B), torch.stack(itm).mean(), torch.stack(mlm).mean()])


def test_losses_and_gradients_are_the_papers(model: Albef, batch: PairBatch, masked: Masked) -> None:
    task = task_of(model, masked)
    with torch.no_grad():  # a copy that differs from the model
        for parameter in task.momentum.model.parameters():
            parameter.mul_(0.9)
        task.model.temperature.fill_(0.9)
    slow = copy.deepcopy(task.momentum.model)
    queues = task.momentum.queue_image.clone(), task.momentum.queue_text.clone()
    losses, _ = task(batch, 0.5)
    task.total(losses).backward()
    other = copy.deepcopy(model)
    with torch.no_grad():
        assert task.model.temperature.item() == 0.5, "clamped before it is used"
        for mine, parameter in zip(slow.parameters(), other.parameters(), strict=True):
            mine.lerp_(parameter, 1 - task.config.momentum)
    other.zero_grad()
    assert isinstance(slow, Albef)
    expected = slow_losses(other, slow, queues, batch, masked)
    torch.testing.assert_close(torch.stack([losses[name] for name in ("itc", "itm", "mlm")]), expected)
    expected.sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name, atol=1e-10, rtol=1e-6)
    torch.testing.assert_close(task.momentum.queue_text[:B], slow.project_text(slow.encode_text(*batch[1:3])))


def test_negatives_are_drawn_by_what_itc_sees(model: Albef, batch: PairBatch, masked: Masked) -> None:
    task = task_of(model, masked)
    task(batch, 0.5)
    assert isinstance(task.draws, GivenDraws)
    with torch.no_grad():
        image = model.project_image(model.encode_image(batch.images))
        keys = task.momentum.queue_text[:B]  # the momentum features that were queued
        weights = (image @ keys.T / model.temperature).softmax(dim=1)
    torch.testing.assert_close(task.draws.weights["wrong_texts"], weights.fill_diagonal_(0.0))


@pytest.mark.parametrize("name", ["itc", "itm", "mlm"])
def test_one_loss_alone_is_what_it_is_among_the_others(
    name: str, model: Albef, batch: PairBatch, masked: Masked
) -> None:
    whole = task_of(copy.deepcopy(model), masked)
    alone = task_of(model, masked, losses={name: 1.0})
    alone.load_state_dict(whole.state_dict())
    torch.testing.assert_close(alone(batch, 0.5)[0], {name: whole(batch, 0.5)[0][name]})


def test_what_does_not_fit_is_said_before_anything_is_built() -> None:
    architecture = architecture_of("albef/tiny")
    assert "micro_batches is 2" in unsupported(architecture, AlbefObjectives(), 2)
    assert "'mlm' needs a model that can unmask" in unsupported(architecture.for_role("filter"), AlbefObjectives())
    with pytest.raises(ValueError, match=r"queue 65536 is not a multiple of loader\.batch_size 60; 65520 is"):
        AlbefObjectives().check_batch(60)


SWAPPED = torch.tensor([1, 0, 3, 2])
"""The negatives of two ranks of two pairs each."""
CASES: dict[str, dict[str, Any]] = {
    "as one": {"itc_keys": "all", "mean_over": "all"},
    "as released": {"itc_keys": "rank", "mean_over": "rank"},
}


@pytest.fixture(scope="module")
def pairs() -> tuple[PairBatch, Masked]:
    """Four pairs of which one rank hides three tokens, and the other one."""
    torch.manual_seed(1)
    ids = torch.randint(5, 190, (B, 6))
    ids[2, 4:] = 0
    batch = PairBatch(torch.randn(B, 3, 32, 32).double(), ids, (ids != 0).long(), torch.arange(B))
    labels = torch.full_like(ids, IGNORED)
    for row, place in ((0, 1), (1, 3), (1, 4), (3, 5)):
        labels[row, place] = ids[row, place]
    return batch, Masked(ids.masked_fill(labels != IGNORED, 4), labels)


@pytest.fixture(scope="module")
def learners(pairs: tuple[PairBatch, Masked]) -> dict[str, AlbefPretraining]:
    torch.manual_seed(0)
    built = build(architecture_of("albef/tiny"))
    assert isinstance(built, Albef)
    model = built.double()
    return {name: task_of(copy.deepcopy(model), pairs[1], momentum=0.5, **case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def answers(
    rank_pair: Any,
    learners: dict[str, AlbefPretraining],
    pairs: tuple[PairBatch, Masked],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("albef")
    batch, masked = pairs
    task = {"learners": learners, "batch": tuple(batch), "masked": tuple(masked), "swapped": SWAPPED}
    torch.save(task, folder / "task.pt")
    rank_pair.run(Path(__file__).parent.parent / "ranks_of_albef.py", folder)
    return [torch.load(folder / f"answer-{rank}.pt", weights_only=False) for rank in range(2)]


def step(learner: AlbefPretraining, batch: PairBatch, masked: Masked, swapped: Tensor) -> dict[str, Any]:
    """Two steps of one process, as `ranks_of_albef.steps`."""
    learner.draws = GivenDraws(wrong_images=swapped, wrong_texts=swapped, masked=masked)
    for progress in (0.1, 0.5):
        learner.zero_grad()
        losses, _ = learner(batch, progress)
        learner.total(losses).backward()
        taken = {name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for name, gradient in taken.items():
                learner.model.get_parameter(name).sub_(0.02 * gradient)
    return {"losses": losses, "gradients": taken, "state": learner.state_dict()}


@pytest.mark.timeout(300)
class TestTwoRanks:
    def test_they_learn_what_one_process_does(
        self,
        answers: list[dict[str, Any]],
        learners: dict[str, AlbefPretraining],
        pairs: tuple[PairBatch, Masked],
    ) -> None:
        """Gradients, weights, the momentum copy, both queues and their pointer, after two steps."""
        wanted = step(copy.deepcopy(learners["as one"]), *pairs, SWAPPED)
        found = [answer["as one"] for answer in answers]
        for name, loss in wanted["losses"].items():
            torch.testing.assert_close(sum(one["losses"][name] for one in found) / 2, loss.detach())
        for one in found:
            assert one["gradients"].keys() == wanted["gradients"].keys()
            assert one["state"].keys() == wanted["state"].keys()
            for part in ("gradients", "state"):
                for name, tensor in wanted[part].items():
                    torch.testing.assert_close(one[part][name], tensor, rtol=1e-7, atol=1e-10, msg=f"{part}: {name}")
        assert int(wanted["state"]["momentum.pointer"]) == 0  # two steps of 4 fill the queue of 8
        assert any(
            not torch.equal(wanted["state"][f"momentum.model.{name}"], p)
            for name, p in learners["as one"].momentum.model.named_parameters()
        )

    def test_as_released_a_rank_compares_with_its_own_keys_and_the_queue_of_all(
        self,
        answers: list[dict[str, Any]],
        learners: dict[str, AlbefPretraining],
        pairs: tuple[PairBatch, Masked],
    ) -> None:
        """A rank's ITC in the second step is that of a process by itself that has the weights and the queue of both."""
        batch, masked = pairs
        found = [answer["as released"] for answer in answers]
        one = found[0]["state"]
        assert all(torch.equal(one[name], tensor) for name, tensor in found[1]["state"].items())
        first = copy.deepcopy(learners["as released"])
        for rank in range(2):
            half = slice(rank * B // 2, (rank + 1) * B // 2)
            alone = copy.deepcopy(learners["as released"])
            state = {name: t.clone() for name, t in one.items()}
            for name, gradient in found[0]["gradients"].items():  # back to before the second step
                state[f"model.{name}"] = state[f"model.{name}"] + 0.02 * gradient
                state[f"momentum.model.{name}"] = 2 * state[f"momentum.model.{name}"] - state[f"model.{name}"]
            for side in ("queue_image", "queue_text"):
                state[f"momentum.{side}"][B:] = getattr(first.momentum, side)[B:]
            state["momentum.pointer"] = torch.tensor(B)
            alone.load_state_dict(state)
            alone.draws = GivenDraws(
                wrong_images=SWAPPED[:2], wrong_texts=SWAPPED[:2], masked=Masked(*(x[half] for x in masked))
            )
            losses, _ = alone(batch.select(half), 0.5)
            for name, loss in losses.items():
                torch.testing.assert_close(found[rank]["losses"][name], loss.detach(), rtol=1e-6, atol=1e-9, msg=name)
        differs = [abs(float(found[0]["losses"][name] - found[1]["losses"][name])) for name in ("itc", "itm", "mlm")]
        assert min(differs) > 1e-4
        everywhere = answers[0]["as one"]["losses"]["itc"]
        assert abs(float(found[0]["losses"]["itc"] - everywhere)) > 1e-3
