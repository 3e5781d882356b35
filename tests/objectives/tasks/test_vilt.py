"""ViLT's losses, against the same written out slowly, in chunks, and on two ranks."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.data.text.bert_tokenizers import BertTokenizer
from capfilt.models import architecture_of
from capfilt.models.vilt.config import ViltConfig
from capfilt.models.vilt.model import Vilt
from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.kinds.vilt import ViltObjectives, ViltRetrievalObjectives
from capfilt.objectives.masking import Masked, Vocabulary
from capfilt.objectives.tasks import build_task, unsupported
from capfilt.objectives.tasks.vilt import ViltPretraining, ViltRetrieval

B = 6
SHAPES = ((3, 4), (4, 4), (2, 5), (4, 3), (3, 3), (1, 4))
"""Heights and widths of the pictures in patches of 8."""


@pytest.fixture
def batch() -> PairBatch:
    draw = torch.Generator().manual_seed(1)
    images = torch.zeros(B, 4, 32, 40, dtype=torch.double)
    for image, (h, w) in zip(images, SHAPES, strict=True):
        image[:3, : 8 * h, : 8 * w] = torch.randn(3, 8 * h, 8 * w, generator=draw)
        image[3, : 8 * h, : 8 * w] = 1
    ids = torch.randint(5, 190, (B, 9), generator=draw)
    ids[:, 0] = 2
    ids[1, 6:], ids[4, 3:] = 0, 0
    return PairBatch(images, ids, (ids > 0).long(), torch.arange(B))


def task_of(**objectives: Any) -> ViltPretraining:
    """A task of a small ViLT in float64."""
    torch.manual_seed(0)
    config = architecture_of("vilt/tiny")
    assert isinstance(config, ViltConfig)
    shape = {"width": 32, "depth": 2, "hidden": 48, "init_std": 0.2}
    model = Vilt(
        config.model_copy(
            update={
                "vision": config.vision.model_copy(update=shape),
                "text": config.text.model_copy(update={"width": 32, "init_std": 0.2}),
            }
        )
    )
    task = build_task(model.double(), ViltObjectives(**objectives))
    assert isinstance(task, ViltPretraining)
    task.vocabulary = Vocabulary.of(BertTokenizer.load("world"))
    return task.train()


def drawn(batch: PairBatch) -> dict[str, Any]:
    """What a step may draw: the patches come in an order of their own, and one picture's with padding."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.rand(B, batch.ids_BT.shape[1], generator=generator) < 0.3
    chosen[0, 3] = True
    return {
        "masked": Masked(
            batch.ids_BT.masked_fill(chosen, 4), batch.ids_BT.masked_fill(~chosen | (batch.ids_BT == 0), -100)
        ),
        "matches": torch.tensor([True, False, True, False, False, True]),
        "wrong_images": torch.tensor([1, 2, 0, 5, 3, 4]),
        "mlm_patches": torch.stack([torch.randperm(20, generator=generator)[:12] for _ in range(B)]),
        "itm_patches": torch.stack([torch.randperm(20, generator=generator)[:15] for _ in range(B)]),
    }


def states_alone(model: Vilt, image: Tensor, patches: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """States of one text without padding beside the patches of one picture that are there, and of these patches."""
    grid = image[3, ::8, ::8].flatten() > 0
    there = patches[grid[patches]]
    context = model.image_context(model.encode_image(image[None], there[None]), "encoder")
    states = model.fuse(ids[None], torch.ones_like(ids)[None], context)[0]
    return states[: len(ids)], states[len(ids) + 1 :]


def slow_transport(words: Tensor, patches: Tensor) -> Tensor:
    """IPOT of one pair, as UNITER writes it."""
    costs = 1 - F.normalize(words, dim=1) @ F.normalize(patches, dim=1).T
    m, n = costs.shape
    with torch.no_grad():
        sigma, plan = torch.full((m,), 1 / m, dtype=costs.dtype), torch.ones(m, n, dtype=costs.dtype)
        for _ in range(50):
            scaled = torch.exp(-costs / 0.5) * plan
            delta = 1 / (n * (scaled.T @ sigma))
            sigma = 1 / (m * (scaled @ delta))
            plan = sigma[:, None] * scaled * delta[None, :]
    return (costs * plan).sum()


def test_the_losses_are_those_of_pairs_one_by_one(batch: PairBatch) -> None:
    task, given = task_of(max_patches=3), drawn(batch)
    task.draws = GivenDraws(**given)
    losses, metrics = task(batch, 0.0)
    guesses, matches, costs, right = [], [], [], []
    for row in range(B):
        length = int(batch.mask_BT[row].sum())
        ids, labels = given["masked"].ids_BT[row, :length], given["masked"].labels_BT[row, :length]
        words, _ = states_alone(task.model, batch.images[row], given["mlm_patches"][row], ids)
        logits = task.model.guess_words(words[None])[0].log_softmax(dim=1)
        guesses += [-logits[t, labels[t]] for t in range(length) if labels[t] >= 0]
        own = bool(given["matches"][row])
        image = batch.images[row if own else given["wrong_images"][row]]
        words, patches = states_alone(task.model, image, given["itm_patches"][row], batch.ids_BT[row, :length])
        logits = task.model.match(words[None])[0].log_softmax(dim=0)
        matches.append(-logits[int(own)])
        right.append(float(logits.argmax() == int(own)))
        costs.append(slow_transport(words[1:-1], patches) * (1 if own else -1))
    for name, parts in (("mlm", guesses), ("itm", matches), ("wpa", costs)):
        torch.testing.assert_close(losses[name], torch.stack(parts).mean(), msg=name)
    torch.testing.assert_close(task.total(losses), losses["mlm"] + losses["itm"] + 0.1 * losses["wpa"])
    assert float(metrics["itm_accuracy"]) == pytest.approx(sum(right) / B)


def test_wrong_images_may_be_none_of_the_batch(batch: PairBatch) -> None:
    task, given = task_of(), drawn(batch)
    given |= {"mlm_patches": None, "itm_patches": None}
    task.draws = GivenDraws(**given)
    by_rows, _ = task(batch, 0.0)
    narrower = batch.images[given["wrong_images"]][:, :, :, :40]
    task.draws = GivenDraws(**{**given, "wrong_images": F.pad(narrower, (0, 16, 0, 8))})
    by_pictures, _ = task(batch, 0.0)
    for name, loss in by_rows.items():
        torch.testing.assert_close(by_pictures[name], loss, msg=name)
    task.draws = GivenDraws(**{**given, "wrong_images": 1 - narrower})
    assert (task(batch, 0.0)[0]["itm"] - by_rows["itm"]).abs() > 1e-6


def test_half_of_the_pairs_get_another_image(batch: PairBatch) -> None:
    task = task_of()
    image_ids = torch.tensor([0, 0, 1, 2, 2, 2])
    torch.manual_seed(0)
    partners: set[tuple[int, int]] = set()
    for _ in range(60):
        given = task.draw(batch._replace(image_ids_B=image_ids))
        assert int(given.matches_B.sum()) == B // 2
        assert given.images is not None
        for row in range(B):
            same = [k for k in range(B) if torch.equal(given.images[row], batch.images[k])]
            assert len(same) == 1
            assert (same[0] == row) == bool(given.matches_B[row])
            partners.add((row, same[0]))
    assert partners == {(a, b) for a in range(B) for b in range(B) if a == b or image_ids[a] != image_ids[b]}
    alone = task.draw(batch._replace(image_ids_B=torch.zeros(B, dtype=torch.long)))
    assert bool(alone.matches_B.all()), "where there is no other image all pairs match"


def test_patches_are_drawn_anew_for_each_pass_and_padding_comes_last(batch: PairBatch) -> None:
    task = task_of(max_patches=12)
    torch.manual_seed(0)
    given = task.draw(batch)
    assert given.mlm_patches is not None
    assert given.itm_patches is not None
    assert not torch.equal(given.mlm_patches, given.itm_patches)
    for images, patches in ((batch.images, given.mlm_patches), (given.images, given.itm_patches)):
        assert images is not None
        there = task.model.patches_there(images).flatten(1).gather(1, patches)
        assert patches.shape == (B, 12)
        assert all(len(set(row.tolist())) == 12 for row in patches)
        wanted = task.model.patches_there(images).flatten(1).sum(dim=1).clamp(max=12)
        assert torch.equal(there.sum(dim=1), wanted)
        assert torch.equal(there.long().sort(dim=1, descending=True).values, there.long())
    assert task_of(max_patches=20).draw(batch).mlm_patches is None
    assert task_of(max_patches=0).draw(batch).itm_patches is None


def test_every_weight_learns(batch: PairBatch) -> None:
    task = task_of()
    task.draws = GivenDraws(**drawn(batch))
    task.total(task(batch, 0.0)[0]).backward()
    idle = {name for name, p in task.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == set()


def test_chunks_have_the_gradients_of_the_whole(batch: PairBatch) -> None:
    task, given = task_of(), drawn(batch)
    task.draws = GivenDraws(**given)
    losses, metrics = task(batch, 0.0)
    task.total(losses).backward()
    whole = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    labels = given["masked"].labels_BT.clone()
    in_chunks = task.backward_in_chunks(batch, 0.0, 3, nullcontext)
    for sums, figures in zip(in_chunks, (losses, metrics), strict=True):
        assert sums.keys() == figures.keys()
        for name, value in figures.items():
            torch.testing.assert_close(sums[name].double(), value.detach().double(), msg=name)
    for name, p in task.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], msg=name)
    # A chunk without a hidden word has no mean of its own, and is no NaN.
    labels[:2] = -100
    task.draws = GivenDraws(**{**given, "masked": Masked(given["masked"].ids_BT, labels)})
    assert bool(task.backward_in_chunks(batch, 0.0, 3, nullcontext)[0]["mlm"].isfinite())


def test_two_ranks_learn_what_one_process_learns(batch: PairBatch, rank_pair: Any, tmp_path: Path) -> None:
    pretraining, given = task_of(mean_over="all"), drawn(batch)
    given["matches"] = torch.tensor([True, False, False, False, False, True])
    given["wrong_images"] = torch.tensor([1, 2, 0, 4, 5, 3])  # each rank's images are its own
    of_ranks = {**given, "wrong_images": torch.tensor([1, 2, 0, 1, 2, 0])}
    ranking, wrong = ranks_of(), {"wrong_texts": WRONG}  # rows of all ranks
    tasks = [(pretraining, given, of_ranks), (ranking, wrong, wrong)]
    saved = [{"learner": task, "batch": tuple(batch), "drawn": draws} for task, _, draws in tasks]
    torch.save(saved, tmp_path / "tasks.pt")
    rank_pair.run(Path(__file__).with_name("ranks_of_vilt.py"), tmp_path)
    answers = [torch.load(tmp_path / f"answer-{of}.pt", weights_only=False) for of in range(2)]
    for number, (task, draws, _) in enumerate(tasks):
        task.draws = GivenDraws(**draws)
        losses, _ = task(batch, 0.0)
        task.total(losses).backward()
        for name, loss in losses.items():
            of_both = [answer[number]["losses"][name] for answer in answers]
            torch.testing.assert_close(sum(of_both) / 2, loss.detach(), msg=name)
        for name, p in task.named_parameters():
            for answer in answers:
                torch.testing.assert_close(answer[number]["gradients"][name], p.grad, msg=name)


# ---- fine-tuning for retrieval ----

WRONG = torch.tensor([[1, 4], [3, 3], [0, 5], [2, 1], [0, 2], [4, 3]])


def ranks_of(**objectives: Any) -> ViltRetrieval:
    """A task of the same ViLT with the head that ranks."""
    model = task_of().model
    torch.manual_seed(3)
    config = ViltRetrievalObjectives(**{"wrong_texts": 2, **objectives})
    task = build_task(Vilt(model.config.changed_heads(("itm", "rank"))).double(), config)
    assert isinstance(task, ViltRetrieval)
    return task.train()


def test_the_right_text_is_ranked_above_wrong_ones(batch: PairBatch) -> None:
    task = ranks_of()
    task.draws = GivenDraws(wrong_texts=WRONG)
    losses, metrics = task(batch, 0.0)
    expected, first = [], []
    for row in range(B):
        numbers = []
        for text in (row, *WRONG[row].tolist()):
            ids = batch.ids_BT[text, : int(batch.mask_BT[text].sum())]
            words, _ = states_alone(task.model, batch.images[row], torch.arange(20), ids)
            numbers.append(task.model.rank_head(task.model.summary(words[None]))[0, 0])  # type: ignore[misc]
        expected.append(-torch.stack(numbers).log_softmax(dim=0)[0])
        first.append(float(torch.stack(numbers).argmax() == 0))
    torch.testing.assert_close(losses["rank"], torch.stack(expected).mean())
    assert float(metrics["rank_accuracy"]) == pytest.approx(sum(first) / B)
    task.total(losses).backward()
    idle = {name for name, p in task.model.named_parameters() if p.grad is None or not p.grad.any()}
    # A bias moves all candidates alike: its gradient is 0, or what rounding leaves of it.
    assert idle - {"rank_head.bias"} == {"match_head.weight", "match_head.bias"}, "which stay as they are"


def test_wrong_texts_may_be_none_of_the_batch(batch: PairBatch) -> None:
    task = ranks_of()
    task.draws = GivenDraws(wrong_texts=WRONG)
    by_rows = task(batch, 0.0)[0]["rank"]
    wider = tuple(F.pad(x[WRONG], (0, 3)) for x in (batch.ids_BT, batch.mask_BT))
    task.draws = GivenDraws(wrong_texts=wider)
    torch.testing.assert_close(task(batch, 0.0)[0]["rank"], by_rows)


def test_wrong_texts_are_of_other_images(batch: PairBatch) -> None:
    image_ids = torch.tensor([0, 0, 1, 2, 2, 2])
    torch.manual_seed(0)
    given = ranks_of(wrong_texts=40).draw(batch._replace(image_ids_B=image_ids))
    for row in range(B):
        others = {tuple(ids.tolist()) for ids in batch.ids_BT[image_ids != image_ids[row]]}
        assert {tuple(ids.tolist()) for ids in given.ids_BKT[row]} == others
    alone = batch._replace(image_ids_B=torch.zeros(B, dtype=torch.long))
    assert float(ranks_of()(alone, 0.0)[0]["rank"].detach()) == 0, (
        "where there is no other image there is nothing to rank"
    )


def test_ranking_in_chunks_has_the_gradients_of_the_whole(batch: PairBatch) -> None:
    task = ranks_of()
    task.draws = GivenDraws(wrong_texts=WRONG)
    losses, _ = task(batch, 0.0)
    task.total(losses).backward()
    whole = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    torch.testing.assert_close(task.backward_in_chunks(batch, 0.0, 3, nullcontext)[0]["rank"], losses["rank"].detach())
    for name, gradient in whole.items():
        torch.testing.assert_close(task.get_parameter(name).grad, gradient, msg=name)


def test_a_model_that_does_not_rank_is_refused() -> None:
    why = unsupported(architecture_of("vilt/tiny"), ViltRetrievalObjectives())
    assert "its heads are mlm, itm: set model.heads=[rank]" in why


def test_an_objective_without_its_head_is_refused() -> None:
    config = architecture_of("vilt/tiny")
    assert isinstance(config, ViltConfig)
    assert unsupported(config, ViltObjectives()) == ""
    why = unsupported(config.changed_heads(("itm",)), ViltObjectives())
    assert "objective 'mlm' needs a model that can unmask" in why
    assert "itm, wpa" in why
