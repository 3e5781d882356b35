"""CLIP's loss: what it is, and that two processes learn what one would of the same pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from capfilt.models.clip.model import Clip
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.kinds.clip import ClipObjectives
from capfilt.objectives.losses.info_nce import info_nce
from capfilt.objectives.tasks import unsupported
from capfilt.objectives.tasks.clip import ClipPretraining
from capfilt.training.config import ExecutionConfig
from capfilt.training.distributed.data_parallel import Gradients

MakeClip = Callable[..., Clip]
B = 8
CASES: dict[str, dict[str, Any]] = {
    "local, with gradients": {},
    "global, with gradients": {"local_loss": False},
    "global, without": {"local_loss": False, "gather_with_grad": False},
    "local, without": {"gather_with_grad": False},
    "in chunks": {"chunks": 2},
    "global, in chunks": {"chunks": 4, "local_loss": False},
    "sharded": {"parallel": "fsdp"},
    "by image": {"itc_targets": "image"},
}


def make_double(make: MakeClip) -> Clip:
    return make().double()


@pytest.fixture(scope="module")
def batch() -> PairBatch:
    torch.manual_seed(0)
    ids = torch.randint(1, 800, (B, 6))
    ids[:, 0], ids[:, -1] = 802, 803
    ids[3, 3:] = torch.tensor([803, 0, 0])
    image_ids = torch.tensor([0, 1, 2, 3, 0, 5, 6, 3])  # the same images on both ranks
    return PairBatch(torch.randn(B, 3, 16, 16, dtype=torch.double), ids, torch.ones_like(ids), image_ids)


def by_one_process(make: MakeClip, batch: PairBatch, **options: Any) -> tuple[ClipPretraining, Any, dict[str, Any]]:
    chunks = options.pop("chunks", 1)
    options.pop("parallel", None)
    task = ClipPretraining(make_double(make), ClipObjectives(**options))
    learned = Gradients(task, ExecutionConfig(micro_batches=chunks), torch.device("cpu"), torch.float32)
    losses, metrics = learned.of(batch, 0.0)
    return task, losses["itc"].detach(), {name: p.grad for name, p in task.model.named_parameters()} | {"": metrics}


class TestTheLoss:
    def test_it_is_the_mean_of_two_cross_entropies(self) -> None:
        torch.manual_seed(0)
        image, text = (F.normalize(torch.randn(5, 4, dtype=torch.double), dim=1) for _ in range(2))
        pairs = info_nce(image, text, 7.0)
        logits = 7.0 * image @ text.T
        wanted = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).mean() / 2
        torch.testing.assert_close(pairs.loss, wanted)
        torch.testing.assert_close(pairs.image_to_text_BN, logits)
        torch.testing.assert_close(pairs.text_to_image_BN, logits.T)

    def test_pairs_of_one_image_share_the_target(self) -> None:
        image, text = (F.normalize(torch.randn(4, 4), dim=1) for _ in range(2))
        ids = torch.tensor([1, 2, 1, 3])
        logits = 5.0 * image @ text.T
        target = torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 1.0]])
        wanted = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        torch.testing.assert_close(info_nce(image, text, 5.0, image_ids_B=ids).loss, wanted)
        torch.testing.assert_close(info_nce(image, text, 5.0, image_ids_B=torch.arange(4)).loss,
                                   info_nce(image, text, 5.0).loss)  # fmt: skip

    @pytest.mark.parametrize("way", [{}, {"local_loss": False}, {"gather_with_grad": False}])
    def test_one_process_has_one_gradient_whatever_is_said_of_gathering(self, way: dict[str, bool]) -> None:
        torch.manual_seed(1)
        image, text = (F.normalize(torch.randn(5, 4), dim=1).requires_grad_() for _ in range(2))
        plain = torch.autograd.grad(info_nce(image, text, 9.0, True, True).loss, (image, text))
        other = torch.autograd.grad(info_nce(image, text, 9.0, **way).loss, (image, text))
        torch.testing.assert_close(other, plain)


class TestTheTask:
    def test_the_scale_begins_at_an_inverse_temperature_and_stays_below_100(
        self, small_clip: MakeClip, batch: PairBatch
    ) -> None:
        task = ClipPretraining(make_double(small_clip), ClipObjectives())
        assert task.model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
        for given, kept in ((7.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
            task.model.logit_scale.data.fill_(given)
            _, metrics = task(batch, 0.0)
            assert metrics["scale"].item() == pytest.approx(math.exp(kept))
            task.model.logit_scale.data.fill_(given)
            task.after_step()
            assert task.model.logit_scale.item() == pytest.approx(kept)

    def test_chunks_learn_what_the_batch_would(self, small_clip: MakeClip, batch: PairBatch) -> None:
        _, loss, whole = by_one_process(small_clip, batch)
        _, same, chunked = by_one_process(small_clip, batch, chunks=4)
        torch.testing.assert_close((same, chunked), (loss, whole))

    def test_a_loss_whose_gradient_points_elsewhere_is_refused(self, small_clip: MakeClip) -> None:
        architecture = small_clip().config
        assert unsupported(architecture, ClipObjectives(local_loss=False, gather_with_grad=False)) == ""
        assert "set gather_with_grad=true" in unsupported(architecture, ClipObjectives(gather_with_grad=False))


@pytest.fixture(scope="module")
def answers(rank_pair: Any, small_clip: MakeClip, batch: PairBatch, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("clip")
    torch.save({"model": make_double(small_clip), "batch": tuple(batch), "cases": CASES}, folder / "task.pt")
    rank_pair.run(Path(__file__).parent.parent / "ranks_of_clip.py", folder)
    return [torch.load(folder / f"answer-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.timeout(300)
class TestTwoRanks:
    """As facts/vlp.md measured of open_clip: gradients of the encoders against those of one process on all pairs."""

    @pytest.mark.parametrize("case", [name for name in CASES if "without" not in name])
    def test_gradients_are_those_of_one_process(
        self, case: str, answers: Any, small_clip: MakeClip, batch: PairBatch
    ) -> None:
        _, loss, wanted = by_one_process(small_clip, batch, **CASES[case])
        torch.testing.assert_close((answers[0][case]["loss"] + answers[1][case]["loss"]) / 2, loss)
        near = {"rtol": 1e-5, "atol": 1e-6} if case == "sharded" else {"rtol": 1e-6, "atol": 1e-9}  # FSDP adds in fp32
        for rank in range(2):
            for name, gradient in answers[rank][case]["gradients"].items():
                torch.testing.assert_close(gradient, wanted[name], **near, msg=f"{name} of rank {rank}")

    def test_without_gradients_the_encoders_have_half_of_it_and_the_scale_all(
        self, answers: Any, small_clip: MakeClip, batch: PairBatch
    ) -> None:
        _, _, wanted = by_one_process(small_clip, batch)
        for name, gradient in answers[0]["global, without"]["gradients"].items():
            share = 1.0 if name == "logit_scale" else 0.5
            torch.testing.assert_close(gradient, share * wanted[name], rtol=1e-6, atol=1e-9)

    def test_a_local_loss_without_gradients_points_elsewhere(
        self, answers: Any, small_clip: MakeClip, batch: PairBatch
    ) -> None:
        _, _, wanted = by_one_process(small_clip, batch)
        mine = answers[0]["local, without"]["gradients"]
        names = [name for name in mine if name != "logit_scale"]
        one, two = (torch.cat([which[name].flatten() for name in names]) for which in (mine, wanted))
        assert F.cosine_similarity(one, two, dim=0) < 0.99
