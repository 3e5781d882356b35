from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from capfilt.errors import RecipeError
from capfilt.models import Blip
from capfilt.models.layers.config import Share
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.losses.itc import itc
from capfilt.objectives.momentum import Momentum
from capfilt.objectives.tasks.blip import BlipPretraining

MakeBlip = Callable[..., Blip]
ITC = ObjectivesConfig(losses={"itc": 1.0}, queue=8, momentum=0.75, alpha=0.4, alpha_ramp=0.5)


def batch(seed: int, B: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 190, (B, 6), generator=generator)
    return torch.randn(B, 3, 16, 16, generator=generator), ids, torch.ones_like(ids), torch.arange(B)


def copy_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


class TestCopy:
    @pytest.mark.parametrize("share", ["all", "all_but_cross_attention", "all_but_self_attention", "none"])
    def test_starts_equal_to_the_tied_model_in_every_weight(self, small_blip: MakeBlip, share: Share) -> None:
        model = small_blip(share=share)
        momentum = Momentum(model, 0.9, 0)
        mine, online = momentum.model.state_dict(), model.state_dict()
        assert mine
        assert all(torch.equal(tensor, online[name]) for name, tensor in mine.items())
        images, ids, mask, _ = batch(0)
        found = momentum.features(images, ids, mask)
        assert torch.equal(found[0], model.project_image(model.encode_image(images)))
        assert torch.equal(found[1], model.project_text(model.encode_text(ids, mask)))

    def test_is_of_the_encoders_alone_and_learns_nothing_itself(self, small_blip: MakeBlip) -> None:
        momentum = Momentum(small_blip(), 0.9, 0)
        assert "decode" not in momentum.model.capabilities
        assert not any(p.requires_grad for p in momentum.parameters())

    def test_stands_apart_from_the_model(self, small_blip: MakeBlip) -> None:
        model = small_blip()
        momentum = Momentum(model, 0.9, 0)
        before = copy_of(momentum.model.state_dict())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in momentum.model.state_dict().items())


def test_without_a_queue_ranks_exchange_nothing_for_it(small_blip: MakeBlip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capfilt.objectives.momentum.gather", None)
    Momentum(small_blip(), 0.9, 0).enqueue(torch.ones(2, 8), torch.ones(2, 8))


class TestUpdate:
    def test_is_the_exponential_moving_average(self, small_blip: MakeBlip) -> None:
        model = small_blip()
        momentum = Momentum(model, 0.75, 0)
        slow = copy_of(dict(momentum.model.named_parameters()))
        for step in range(3):
            torch.manual_seed(step)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p))
            momentum.update(model)
            online = dict(model.named_parameters())
            slow = {name: 0.75 * p + 0.25 * online[name].detach() for name, p in slow.items()}
        for name, p in momentum.model.named_parameters():
            torch.testing.assert_close(p, slow[name], atol=1e-6, rtol=1e-6)

    def test_comes_before_the_features_of_a_training_step(self, small_blip: MakeBlip) -> None:
        learner = BlipPretraining(small_blip(), ITC).train()
        assert learner.momentum is not None
        old = copy_of(dict(learner.momentum.model.named_parameters()))
        with torch.no_grad():
            for p in learner.model.parameters():
                p.add_(0.05 * torch.randn_like(p))
        images, ids, mask, image_ids = batch(1)
        learner(PairBatch(images, ids, mask, image_ids), progress=0.0)
        online = dict(learner.model.named_parameters())
        for name, p in learner.momentum.model.named_parameters():
            torch.testing.assert_close(p, 0.75 * old[name] + 0.25 * online[name].detach(), atol=1e-6, rtol=1e-6)
        # What the step put into the queue was seen by the weights after the update.
        image, text = learner.momentum.features(images, ids, mask)
        torch.testing.assert_close(learner.momentum.queue_image[:4], image)
        torch.testing.assert_close(learner.momentum.queue_text[:4], text)

    def test_nothing_moves_outside_of_training(self, small_blip: MakeBlip) -> None:
        learner = BlipPretraining(small_blip(), ITC).eval()
        with torch.no_grad():
            learner.model.image_projection.weight.mul_(2)
        before = copy_of(learner.momentum.state_dict())  # type: ignore[union-attr]
        learner(PairBatch(*batch(1)), progress=0.0)
        assert all(torch.equal(x, before[name]) for name, x in learner.momentum.state_dict().items())  # type: ignore[union-attr]

    def test_is_the_paper_s_by_default(self) -> None:
        assert (ObjectivesConfig().momentum, ObjectivesConfig().queue, ObjectivesConfig().alpha) == (0.995, 57600, 0.4)
        assert ObjectivesConfig().alpha_ramp == 2 / 20


class TestQueue:
    def test_begins_with_random_unit_rows(self, small_blip: MakeBlip) -> None:
        momentum = Momentum(small_blip(), 0.9, 32)
        for queue in (momentum.queue_image, momentum.queue_text):
            assert queue.shape == (32, 8)
            torch.testing.assert_close(queue.norm(dim=1), torch.ones(32))
        assert not torch.equal(momentum.queue_image, momentum.queue_text)

    def test_is_first_in_first_out(self, small_blip: MakeBlip) -> None:
        momentum = Momentum(small_blip(), 0.9, 6)
        start = momentum.queue_image.clone()
        fed = [torch.full((2, 8), float(i)) for i in range(5)]
        for i, rows in enumerate(fed):
            momentum.enqueue(rows, -rows)
            older = [fed[j] if i - 2 <= j <= i else start[2 * j : 2 * j + 2] for j in range(min(i, 2) + 1)]
            assert int(momentum.pointer) == 2 * (i + 1) % 6
            if i < 3:
                assert torch.equal(momentum.queue_image, torch.cat([*older, start[2 * len(older) :]]))
        assert torch.equal(momentum.queue_image, torch.cat([fed[3], fed[4], fed[2]]))
        assert torch.equal(momentum.queue_text, -momentum.queue_image)

    def test_must_be_a_multiple_of_the_batch(self, small_blip: MakeBlip) -> None:
        momentum = Momentum(small_blip(), 0.9, 10)
        with pytest.raises(RecipeError, match="queue 10 is not a multiple of the global batch 4"):
            momentum.enqueue(torch.zeros(4, 8), torch.zeros(4, 8))

    def test_may_be_empty(self, small_blip: MakeBlip) -> None:
        momentum = Momentum(small_blip(), 0.9, 0)
        momentum.enqueue(torch.zeros(4, 8), torch.zeros(4, 8))
        assert momentum.queue_image.shape == (0, 8)
        assert int(momentum.pointer) == 0

    def test_takes_a_step_s_features_after_its_loss(self, small_blip: MakeBlip) -> None:
        learner = BlipPretraining(small_blip(), ITC).train()
        momentum = learner.momentum
        assert momentum is not None
        for step in range(3):
            images, ids, mask, image_ids = batch(step)
            queues = momentum.queue_image.clone(), momentum.queue_text.clone()
            losses, _ = learner(PairBatch(images, ids, mask, image_ids), progress=0.25)
            wanted = itc(
                learner.model.project_image(learner.model.encode_image(images)),
                learner.model.project_text(learner.model.encode_text(ids, mask)),
                *momentum.features(images, ids, mask),
                *queues,
                learner.model.temperature,
                alpha=0.2,  # half of the ramp is over
            )
            torch.testing.assert_close(losses["itc"], wanted.loss)
            losses["itc"].backward()  # the queue may change under a graph that holds it

    def test_is_part_of_the_state(self, small_blip: MakeBlip) -> None:
        learner, other = BlipPretraining(small_blip(), ITC).train(), BlipPretraining(small_blip(seed=9), ITC)
        learner(PairBatch(*batch(0)), progress=0.5)
        other.load_state_dict(learner.state_dict())
        for name in ("queue_image", "queue_text", "pointer"):
            assert torch.equal(getattr(other.momentum, name), getattr(learner.momentum, name))
