"""VLMo's losses written out pair by pair, over two ranks, and what texts alone train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models import architecture_of, build
from capfilt.models.vlmo.model import Vlmo
from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.kinds.clip import ClipObjectives
from capfilt.objectives.kinds.vlmo import VlmoObjectives, VlmoTextObjectives
from capfilt.objectives.masking import IGNORED, Masked, Vocabulary
from capfilt.objectives.tasks import build_task, unsupported

B = 4
WRONG_IMAGES, WRONG_TEXTS = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 1, 0])


def make_model() -> Vlmo:
    torch.manual_seed(0)
    model = build(architecture_of("vlmo/tiny"))
    assert isinstance(model, Vlmo)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.double()


def make_batch() -> PairBatch:
    torch.manual_seed(1)
    ids = torch.randint(5, 190, (B, 6))
    ids[2, 4:] = 0
    return PairBatch(torch.randn(B, 3, 32, 32).double(), ids, (ids != 0).long(), torch.arange(B))


def make_masked(batch: PairBatch) -> Masked:
    ids, labels = batch.ids_BT.clone(), torch.full_like(batch.ids_BT, IGNORED)
    for row, place in ((0, 1), (1, 3), (1, 4), (3, 5)):
        labels[row, place], ids[row, place] = ids[row, place], 4
    return Masked(ids, labels)


@pytest.fixture
def model() -> Vlmo:
    return make_model()


@pytest.fixture
def batch() -> PairBatch:
    return make_batch()


@pytest.fixture
def masked(batch: PairBatch) -> Masked:
    return make_masked(batch)


def losses_by_hand(model: Vlmo, batch: PairBatch, masked: Masked) -> dict[str, Tensor]:
    images, ids, mask, _ = batch
    tokens = model.encode_image(images)
    itc = []
    image_states, image_tail = model.run(tokens, "image", 0, tail=True)
    text_states, text_tail = model.run(model.embed_text(ids), "text", ids.shape[1], mask.bool(), tail=True)
    assert image_tail is not None
    assert text_tail is not None
    for image, text, scale in (
        (model.image_projection(image_states[:, 0]), model.text_projection(text_states[:, 0]), model.logit_scale),
        (
            model.fused_image_projection(image_tail[:, 0]),
            model.fused_text_projection(text_tail[:, 0]),
            model.fused_logit_scale,
        ),
    ):
        logits = scale.exp() * (image / image.norm(dim=1, keepdim=True)) @ (text / text.norm(dim=1, keepdim=True)).T
        itc.append(-(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2)
    pairs = [(b, b, 1) for b in range(B)]
    pairs += [(int(WRONG_IMAGES[b]), b, 0) for b in range(B)] + [(b, int(WRONG_TEXTS[b]), 0) for b in range(B)]
    itm, mlm = [], []

    def beside(image: int, of_text: Tensor, text: int) -> Tensor:
        context = model.image_context(tokens[image : image + 1], "encoder")
        return model.fuse(of_text[text : text + 1], mask[text : text + 1], context)

    for image, text, label in pairs:
        pooled = (model.pooler(beside(image, ids, text)[:, 0])).tanh()
        assert model.match_head is not None
        itm.append(F.cross_entropy(model.match_head(pooled), torch.tensor([label])))
    for b, t in (masked.labels_BT != IGNORED).nonzero().tolist():
        logits = model.guess_words(beside(b, masked.ids_BT, b))[0, t]
        mlm.append(-logits.log_softmax(0)[masked.labels_BT[b, t]])
    return {"itc": sum(itc) / 2, "itm": torch.stack(itm).mean(), "mlm": torch.stack(mlm).mean()}  # type: ignore[dict-item]


def test_losses_and_gradients_are_the_formulas(model: Vlmo, batch: PairBatch, masked: Masked) -> None:
    task = build_task(model, VlmoObjectives()).train()
    task.draws = GivenDraws(wrong_images=WRONG_IMAGES, wrong_texts=WRONG_TEXTS, masked=masked)
    losses, metrics = task(batch, 0.5)
    task.total(losses).backward()
    other = copy.deepcopy(model)
    other.zero_grad()
    expected = losses_by_hand(other, batch, masked)
    torch.testing.assert_close(losses, expected)
    (expected["itc"] + expected["itm"] + expected["mlm"] / 4).backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name, atol=1e-10, rtol=1e-6)
    assert 0 <= metrics["itm_accuracy"] <= 1
    with torch.no_grad():
        cosines = model.similarity(model.image_vectors(model.encode_image(batch.images))[0],
                                   model.text_vectors(*batch[1:3])[0])  # fmt: skip
    weights = (model.logit_scale.exp() * cosines).softmax(dim=1).fill_diagonal_(0.0)
    torch.testing.assert_close(task.draws.weights["wrong_texts"], weights.detach())


def test_without_fused_heads_itc_is_its_first_half(model: Vlmo, batch: PairBatch) -> None:
    small = Vlmo(model.config.changed(outputs=("itc",))).double()
    small.load_state_dict({name: model.state_dict()[name] for name in small.state_dict()})
    image, text = (
        small.project_image(small.encode_image(batch.images)),
        small.project_text(small.encode_text(*batch[1:3])),
    )
    logits = small.logit_scale.exp() * small.similarity(image, text)
    expected = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
    losses, _ = build_task(small, VlmoObjectives(losses={"itc": 1.0}))(batch, 0.0)
    torch.testing.assert_close(losses, {"itc": expected})


def test_texts_alone_train_their_experts_and_nothing_that_images_pass_through(model: Vlmo, batch: PairBatch) -> None:
    words = Vocabulary(195, 0, 1, 2, 4, torch.zeros(195, dtype=torch.bool))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    task = build_task(model, VlmoTextObjectives()).train()
    task.vocabulary = words
    torch.manual_seed(0)
    losses, _ = task(batch, 0.0)
    losses["mlm"].backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    parts = {".".join(part for part in name.split(".")[:4] if not part.isdigit()) for name in learned}
    assert parts == {
        *("text.words.weight", "text.types.weight", "text.norm.weight", "text.norm.bias"),
        *("modality.weight", "relative.table", "norm.weight", "norm.bias"),
        *("blocks.experts.text", "mlm_head.transform.weight", "mlm_head.transform.bias"),
        *("mlm_head.norm.weight", "mlm_head.norm.bias", "mlm_head.weight", "mlm_head.bias"),
    }
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in learned), name
    with pytest.raises(LookupError, match="nothing is given for the draw masked"):
        task.draws = GivenDraws()
        task(batch, 0.0)


CASES: dict[str, dict[str, Any]] = {
    "as released": {},
    "itc": {"losses": {"itc": 1.0}},
    "as one": {"gather_with_grad": True, "mean_over": "all"},
    "sharded": {"gather_with_grad": True, "mean_over": "all", "parallel": "fsdp"},
}


@pytest.fixture(scope="module")
def answers(rank_pair: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process computes of all pairs, and what two do of halves of them."""
    model, batch = make_model(), make_batch()
    masked, folder = make_masked(batch), tmp_path_factory.mktemp("ranks")
    task = {
        "model": model,
        "batch": tuple(batch),
        "masked": tuple(masked),
        "wrong_images": WRONG_IMAGES,
        "wrong_texts": WRONG_TEXTS,
        "cases": CASES,
    }
    torch.save(task, folder / "task.pt")
    rank_pair.run(Path(__file__).parents[1] / "ranks_of_vlmo.py", folder)
    both = [torch.load(folder / f"answer-{of}.pt", weights_only=False) for of in range(2)]
    alone = {}
    for case in ("as one", "itc"):
        config = VlmoObjectives.model_validate({k: v for k, v in CASES[case].items() if k == "losses"})
        learner = build_task(copy.deepcopy(model), config).train()
        learner.draws = GivenDraws(wrong_images=WRONG_IMAGES, wrong_texts=WRONG_TEXTS, masked=masked)
        losses, _ = learner(batch, 0.0)
        learner.total(losses).backward()
        gradients = {name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None}
        alone[case] = {"losses": losses, "gradients": gradients, "weights": learner.draws.weights}
    return {"alone": alone, "ranks": both}


@pytest.mark.parametrize("case", ["as one", "sharded"])
def test_two_ranks_learn_what_one_process_would(case: str, answers: dict[str, Any]) -> None:
    alone, ranks = answers["alone"]["as one"], [each[case] for each in answers["ranks"]]
    for name, gradient in alone["gradients"].items():
        for rank in ranks:
            torch.testing.assert_close(rank["gradients"][name], gradient, msg=name, atol=1e-6, rtol=1e-5)
    for name, loss in alone["losses"].items():
        mean = (ranks[0]["losses"][name] + ranks[1]["losses"][name]) / 2
        torch.testing.assert_close(mean, loss.detach(), msg=name)
    drawn_from = torch.cat([rank["weights"]["wrong_images"] for rank in ranks])
    torch.testing.assert_close(drawn_from, alone["weights"]["wrong_images"]), "rows of both ranks"


def test_as_released_itc_has_half_the_gradient_on_two_ranks_but_for_the_scales(answers: dict[str, Any]) -> None:
    alone, ranks = answers["alone"]["itc"], [each["itc"] for each in answers["ranks"]]
    for name, gradient in alone["gradients"].items():
        share = 1.0 if "logit_scale" in name else 0.5
        torch.testing.assert_close(ranks[0]["gradients"][name], gradient * share, msg=name, atol=1e-8, rtol=1e-5)
    torch.testing.assert_close(ranks[0]["losses"]["itc"], alone["losses"]["itc"].detach())


def test_what_does_not_fit_is_said_before_anything_is_built() -> None:
    architecture = architecture_of("vlmo/tiny")
    assert "micro_batches is 2" in unsupported(architecture, VlmoObjectives(), 2)
    assert "'mlm' needs a model that can unmask" in unsupported(architecture.for_role("filter"), VlmoTextObjectives())
    assert "'itm' needs a model that can" in unsupported(architecture.changed(outputs=("itc",)), VlmoObjectives())
    assert "set objectives.task=vlmo or set objectives.task=vlmo-texts" in unsupported(architecture, ClipObjectives())
