"""X-VLM's losses against the paper's formulas written out, text by text, and over two ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models import architecture_of, build
from capfilt.models.xvlm.model import Xvlm
from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch, RegionBatch
from capfilt.objectives.kinds.xvlm import XvlmObjectives
from capfilt.objectives.masking import IGNORED, Masked
from capfilt.objectives.tasks import build_task, unsupported
from capfilt.objectives.tasks.xvlm import XvlmPretraining

B = 4
FIVE = {"itc": 1.0, "itm": 1.0, "mlm": 1.0, "box": 1.0, "giou": 1.0}
SETTINGS: dict[str, Any] = {"losses": FIVE, "regions": {}}
WRONG = {"wrong_images": torch.tensor([1, 0, 3, 2]), "wrong_texts": torch.tensor([1, 0, 3, 2])}


@pytest.fixture(scope="module")
def model() -> Xvlm:
    torch.manual_seed(0)
    model = build(architecture_of("xvlm/tiny"))
    assert isinstance(model, Xvlm)
    return model.double()


@pytest.fixture(scope="module")
def pairs() -> PairBatch:
    torch.manual_seed(1)
    ids = torch.randint(5, 190, (B, 6))
    ids[2, 4:] = 0
    return PairBatch(torch.randn(B, 3, 32, 32).double(), ids, (ids != 0).long(), torch.tensor([0, 1, 0, 3]))


@pytest.fixture(scope="module")
def regions(pairs: PairBatch) -> RegionBatch:
    """Two texts of each of two pictures, the first of each about a part of it."""
    torch.manual_seed(2)
    seen = torch.ones(B, 17, dtype=torch.long)
    seen[0, 3:], seen[2, 1:9] = 0, 0
    boxes = torch.tensor([[0.25, 0.125, 0.5, 0.25], [0.5, 0.5, 1, 1], [0.5, 0.75, 1, 0.5], [0.5, 0.5, 1, 1]])
    return RegionBatch(
        torch.randn(2, 3, 32, 32).double(),
        pairs.ids_BT.flip(0),
        pairs.mask_BT.flip(0),
        torch.tensor([5, 5, 6, 6]),
        torch.tensor([0, 0, 1, 1]),
        seen,
        boxes.double(),
        torch.tensor([True, False, True, False]),
    )


def masked(batch: PairBatch | RegionBatch) -> Masked:
    ids, labels = batch.ids_BT.clone(), torch.full_like(batch.ids_BT, IGNORED)
    for row, place in ((0, 1), (1, 3), (1, 1), (3, 3)):
        labels[row, place], ids[row, place] = ids[row, place], 4
    return Masked(ids, labels)


def task_of(model: Xvlm, batch: PairBatch | RegionBatch, **settings: object) -> XvlmPretraining:
    task = build_task(copy.deepcopy(model), XvlmObjectives.model_validate({**SETTINGS, **settings}))
    assert isinstance(task, XvlmPretraining)
    task.draws = GivenDraws(**WRONG, masked=masked(batch))
    return task.train()


def slow_losses(model: Xvlm, batch: PairBatch | RegionBatch) -> dict[str, Tensor]:
    """The losses one text at a time, as X-VLM's section 3.2 has them; what is not in a region is cut out of it."""
    ids, mask = batch.ids_BT, batch.mask_BT
    if isinstance(batch, RegionBatch):
        whole = model.encode_image(batch.images)[batch.image_R]
        parts = []
        for text in range(B):
            patches = whole[text, 1:][batch.seen_RN[text, 1:].bool()]
            parts.append(torch.cat([patches.mean(dim=0, keepdim=True), patches]))
    else:
        whole = model.encode_image(batch.images)
        parts = list(whole)

    def alone(text: int) -> Tensor:
        return model.encode_text(ids[text : text + 1], mask[text : text + 1])

    def fused(tokens: Tensor, text: int, over: Tensor | None = None) -> Tensor:
        context = model.image_context(tokens[None], "encoder")
        if over is not None:
            return model.text(over[text : text + 1], "encoder", mask[text : text + 1], context)
        return model.text.fuse_states(alone(text), mask[text : text + 1], context)

    image = torch.cat([model.project_image(part[None]) for part in parts])
    text = torch.cat([model.project_text(alone(n)) for n in range(B)])
    logits = image @ text.T / model.temperature
    itc = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    triples = [(n, n, 1) for n in range(B)]
    triples += [(int(WRONG["wrong_images"][n]), n, 0) for n in range(B)]
    triples += [(n, int(WRONG["wrong_texts"][n]), 0) for n in range(B)]
    itm = [F.cross_entropy(model.match_head(fused(parts[i], t)[:, 0]), torch.tensor([y])) for i, t, y in triples]
    hidden = masked(batch)
    mlm = [
        F.cross_entropy(
            model.text.logits(fused(parts[n], n, hidden.ids_BT))[0, t : t + 1], hidden.labels_BT[n, t, None]
        )
        for n, t in (hidden.labels_BT != IGNORED).nonzero().tolist()
    ]
    losses = {"itc": itc, "itm": torch.stack(itm).mean(), "mlm": torch.stack(mlm).mean()}
    if isinstance(batch, RegionBatch):
        box, giou = [], []
        for n in (0, 2):
            predicted, target = model.box_head(fused(whole[n], n)[0, 0]).sigmoid(), batch.boxes_R4[n]
            box.append((predicted - target).abs().sum())
            (a0, a1), (b0, b1) = ((b[:2] - b[2:] / 2, b[:2] + b[2:] / 2) for b in (predicted, target))
            both = (torch.minimum(a1, b1) - torch.maximum(a0, b0)).clamp(min=0).prod()
            union = (a1 - a0).prod() + (b1 - b0).prod() - both
            around = (torch.maximum(a1, b1) - torch.minimum(a0, b0)).prod()
            giou.append(1 - both / union + (around - union) / around)
        losses |= {"box": torch.stack(box).mean(), "giou": torch.stack(giou).mean()}
    return losses


@pytest.mark.parametrize("kind", ["pairs", "regions"])
def test_losses_and_gradients_are_the_papers(kind: str, model: Xvlm, pairs: PairBatch, regions: RegionBatch) -> None:
    batch = pairs if kind == "pairs" else regions
    task = task_of(model, batch)
    with torch.no_grad():
        task.model.temperature.fill_(0.9)
    losses, metrics = task(batch, 0.5)  # type: ignore[operator]
    assert task.model.temperature.item() == 0.5, "clamped before it is used"
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.temperature.fill_(0.5)
    expected = slow_losses(other, batch)
    assert losses.keys() == expected.keys()
    torch.testing.assert_close(losses, expected)
    assert metrics.keys() == {"itm_accuracy"}
    task.total(losses).backward()
    torch.stack(list(expected.values())).sum().backward()
    for (name, mine), theirs in zip(task.model.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, msg=name, atol=1e-10, rtol=1e-6)


def test_negatives_are_drawn_by_what_itc_sees(model: Xvlm, pairs: PairBatch) -> None:
    """Two texts of one image are wrong for each other in pretraining, and not in fine-tuning for retrieval."""
    for targets, same in (("pair", 0), ("image", 2)):
        task = task_of(model, pairs, itc_targets=targets)
        task.config = task.config.model_copy(update={"losses": {"itm": 1.0}})  # no MLM: the temperature stays
        task(pairs, 0.0)
        with torch.no_grad():
            image = model.project_image(model.encode_image(pairs.images))
            text = model.project_text(model.encode_text(pairs.ids_BT, pairs.mask_BT))
            weights = (image @ text.T / model.temperature).softmax(dim=1) + 1e-5
        weights.fill_diagonal_(0.0)
        assert isinstance(task.draws, GivenDraws)
        if same:
            weights[0, 2] = weights[2, 0] = 0.0
        torch.testing.assert_close(task.draws.weights["wrong_texts"], weights)


def test_a_captioners_targets_sum_to_less_than_one(model: Xvlm, pairs: PairBatch) -> None:
    torch.manual_seed(0)
    writer = build(architecture_of("xvlm/tiny").for_role("captioner")).double()
    task = build_task(writer, XvlmObjectives(losses={"lm": 1.0}), prompt=2)
    loss = task(pairs, 0.0)[0]["lm"]
    context = writer.image_context(writer.encode_image(pairs.images), "decoder")
    log_p, terms = writer.decode(pairs.ids_BT, pairs.mask_BT, context).log_softmax(dim=2), []
    for n in range(B):
        for t in range(1, int(pairs.mask_BT[n].sum()) - 1):
            weights = torch.full((195,), 0.1 / 195, dtype=torch.float64)
            weights[pairs.ids_BT[n, t + 1]] = 0.9
            terms.append(-(weights * log_p[n, t]).sum())
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_what_does_not_fit_is_said_before_anything_is_built() -> None:
    architecture = architecture_of("xvlm/tiny")
    whole = XvlmObjectives.model_validate(SETTINGS)
    assert unsupported(architecture, whole) == ""
    assert "micro_batches is 2" in unsupported(architecture, whole, 2)
    assert "objective 'box' is of regions" in unsupported(architecture, XvlmObjectives(losses=FIVE))
    writer, judge = architecture.for_role("captioner"), architecture.for_role("filter")
    assert "'itc' needs a model that can encode_text" in unsupported(writer, XvlmObjectives())
    assert unsupported(writer, XvlmObjectives(losses={"lm": 1.0})) == ""
    assert "'mlm' needs a model that can unmask" in unsupported(judge, XvlmObjectives())
    assert "no head for boxes" in unsupported(judge, XvlmObjectives(losses={"itc": 1.0}, regions={}))


CASES: dict[str, dict[str, Any]] = {
    "as released": SETTINGS,
    "of all": {**SETTINGS, "itc_gradients": "all", "mean_over": "all"},
    "itc alone": {"losses": {"itc": 1.0}},
    "itc of all": {"losses": {"itc": 1.0}, "itc_gradients": "all"},
}


def half(batch: Any, of: int, pictures: int) -> Any:
    rows, images = slice(2 * of, 2 * of + 2), slice(pictures // 2 * of, pictures // 2 * (of + 1))
    parts = [tensor[images if n == 0 else rows] for n, tensor in enumerate(batch)]
    mine = type(batch)(*parts)
    return mine._replace(image_R=mine.image_R - of) if isinstance(mine, RegionBatch) else mine


@pytest.fixture(scope="module")
def answers(
    rank_pair: Any, model: Xvlm, pairs: PairBatch, regions: RegionBatch, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder, wrong = tmp_path_factory.mktemp("xvlm"), torch.tensor([1, 0])
    batches: list[dict[str, Any]] = []
    for of in range(2):
        batches.append({})
        for kind, batch, pictures in (("pairs", pairs, B), ("regions", regions, 2)):
            hidden = Masked(*(x[2 * of : 2 * of + 2] for x in masked(batch)))
            draws = {"wrong_images": wrong, "wrong_texts": wrong, "masked": hidden}
            batches[of][kind] = half(batch, of, pictures), draws
    torch.save({"model": model, "batches": batches, "cases": CASES}, folder / "task.pt")
    rank_pair.run(Path(__file__).parent.parent / "ranks_of_xvlm.py", folder)
    return [torch.load(folder / f"answer-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["pairs", "regions"])
@pytest.mark.parametrize("case", ["of all", "itc of all", "itc alone"])
def test_two_ranks_learn_what_one_process_does(
    case: str, kind: str, answers: Any, model: Xvlm, pairs: PairBatch, regions: RegionBatch
) -> None:
    """As released, the encoders have half of ITC's gradient, and the temperature all of it."""
    batch = pairs if kind == "pairs" else regions
    settings = {"regions": None, **CASES[case]}
    task = task_of(model, batch, **settings)
    losses, _ = task(batch, 0.0)  # type: ignore[operator]
    task.total(losses).backward()
    (mine, taken), (theirs, _) = (answers[rank][f"{case}, {kind}"] for rank in range(2))
    for name, loss in losses.items():
        torch.testing.assert_close((mine[name] + theirs[name]) / 2, loss.detach())
    reached = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    share = 0.5 if case == "itc alone" else 1.0
    for name, gradient in reached.items():
        wanted = gradient * (1.0 if name == "temperature" else share)
        torch.testing.assert_close(taken[name], wanted, rtol=1e-6, atol=1e-9, msg=name)
    assert all(not gradient.any() for name, gradient in taken.items() if name not in reached)
