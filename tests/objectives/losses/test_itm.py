from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models import Blip
from capfilt.models.layers.image_context import ImageContext
from capfilt.objectives.losses.itm import TRIVIAL_LOSS, Alarm, global_negatives, hard_negatives, itm, local_negatives

MakeBlip = Callable[..., Blip]


def chance(observed: list[int], expected: list[float]) -> float:
    """The p-value of Pearson's chi-square test."""
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = torch.tensor((len(observed) - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.double)))


class TestHardNegatives:
    @pytest.mark.parametrize("sure", [False, True])
    def test_are_drawn_by_softmax_of_similarity_plus_a_ten_thousandth(self, sure: bool) -> None:
        torch.manual_seed(0)
        B, draws = 6, 1500
        # A row that is sure of its own pair leaves the others 4.5e-5, 1.7e-5 and less, where 1e-4 more is much.
        graded = (-10.0 - torch.arange(B)).repeat(B, 1).fill_diagonal_(0)
        similarity = graded if sure else torch.randn(B, B) * 2
        counts = torch.zeros(B, B, dtype=torch.long)
        for _ in range(draws):
            counts[torch.arange(B), hard_negatives(similarity, torch.arange(B), torch.arange(B))] += 1
        assert counts.diagonal().tolist() == [0] * B
        for row in range(B):
            others = [c for c in range(B) if c != row]
            total = sum(math.exp(x) for x in similarity[row].tolist())
            weights = [math.exp(float(similarity[row, c])) / total + 1e-4 for c in others]
            expected = [draws * w / sum(weights) for w in weights]
            assert chance(counts[row, others].tolist(), expected) > 1e-3

    def test_what_underflows_is_drawn_evenly(self) -> None:
        """A row so sure of itself that nothing else has a probability: without 1e-4 there is nothing to draw."""
        torch.manual_seed(0)
        B = 5
        counts = torch.zeros(B, B, dtype=torch.long)
        for _ in range(1000):
            counts[torch.arange(B), hard_negatives(torch.eye(B) * 1000, torch.arange(B), torch.arange(B))] += 1
        for row in range(B):
            others = [c for c in range(B) if c != row]
            assert chance(counts[row, others].tolist(), [1000 / 4] * 4) > 1e-3

    def test_one_image_is_never_a_negative_of_itself(self) -> None:
        torch.manual_seed(0)
        image_ids = torch.tensor([0, 1, 0, 2, 1, 0, 3])
        similarity = torch.where(image_ids[:, None] == image_ids[None, :], 50.0, 0.0)  # the temptation is great
        drawn = torch.stack([hard_negatives(similarity, image_ids, image_ids) for _ in range(300)])
        assert not (image_ids[drawn] == image_ids).any()
        assert {int(c) for c in drawn[:, 0]} == {1, 3, 4, 6}

    def test_two_rows_are_each_other_s(self) -> None:
        assert hard_negatives(torch.zeros(2, 2), torch.arange(2), torch.arange(2)).tolist() == [1, 0]

    @pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
    def test_similarities_that_are_not_finite_are_no_crash(self, wrong: float) -> None:
        similarity = torch.randn(3, 3)
        similarity[1] = wrong
        drawn = hard_negatives(similarity, torch.arange(3), torch.arange(3))
        assert not (drawn == torch.arange(3)).any()

    @pytest.mark.parametrize("B", [1, 4])
    def test_a_batch_of_one_image_is_no_crash(self, B: int) -> None:
        one = torch.zeros(B, dtype=torch.long)
        drawn = hard_negatives(torch.randn(B, B), one, one)
        assert drawn.shape == (B,)
        assert ((drawn >= 0) & (drawn < B)).all()


class TestItm:
    B = 4

    def case(self, small_blip: MakeBlip) -> tuple[Blip, Tensor, Tensor, Tensor]:
        model = small_blip().double()
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(4, 190, (self.B, 6), generator=generator)
        ids[1, 4:] = ids[3, 3:] = 0
        tokens = torch.randn(self.B, 5, 24, dtype=torch.double, generator=generator)
        return model, ids, (ids != 0).long(), tokens

    def slow(self, model: Blip, ids: Tensor, tokens: Tensor, pairs: list[tuple[int, int, int]]) -> Tensor:
        """Pair by pair: (image, text, label)."""
        total = torch.zeros((), dtype=torch.double)
        for image, text, label in pairs:
            length = int((ids[text] != 0).sum())
            alone = ids[text : text + 1, :length]
            keys = model.image_context(tokens[image : image + 1], "encoder")
            logits = model.match(model.fuse(alone, torch.ones_like(alone), keys))[0]
            total = total - (logits[label] - torch.log(logits.exp().sum()))
        return total / len(pairs)

    def test_is_the_mean_over_right_pairs_wrong_texts_and_wrong_images(self, small_blip: MakeBlip) -> None:
        model, ids, mask, tokens = self.case(small_blip)
        wrong_images, wrong_texts = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 0])
        fast, slow = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
        keys = model.image_context(fast, "encoder")
        wrong = local_negatives(ids, mask, keys, torch.arange(self.B), wrong_images, wrong_texts)
        loss, accuracy = itm(model, ids, mask, keys, wrong)
        pairs = [(i, i, 1) for i in range(self.B)]
        pairs += [(i, int(wrong_texts[i]), 0) for i in range(self.B)]
        pairs += [(int(wrong_images[i]), i, 0) for i in range(self.B)]
        wanted = self.slow(model, ids, slow, pairs)
        # The ITM loss itself is taken in fp32.
        torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=0)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        wanted.backward()
        torch.testing.assert_close(fast.grad, slow.grad, atol=1e-6, rtol=1e-5)
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-5)
        right = sum(self.judged(model, ids, tokens, image, text) == label for image, text, label in pairs)
        assert float(accuracy) == pytest.approx(right / 12)
        assert 0 < right < 12

    def judged(self, model: Blip, ids: Tensor, tokens: Tensor, image: int, text: int) -> int:
        one = ids[text : text + 1]
        keys = model.image_context(tokens[image : image + 1], "encoder")
        return int(model.match(model.fuse(one, (one != 0).long(), keys)).argmax())

    def test_alone_the_partners_of_all_are_one_s_own(self, small_blip: MakeBlip) -> None:
        model, ids, mask, tokens = self.case(small_blip)
        image_ids, images, texts = torch.tensor([0, 1, 1, 2]), torch.tensor([2, 0, 1, 1]), torch.tensor([1, 3, 0, 0])
        own = local_negatives(ids, mask, model.image_context(tokens, "encoder"), image_ids, images, texts)
        every = global_negatives(model, tokens, ids, mask, image_ids, images, texts)
        torch.testing.assert_close(own, every)
        assert own.image_is_wrong_B.tolist() == [True, True, False, True]
        assert own.text_is_wrong_B.all()

    def test_texts_of_other_ranks_may_be_longer(self, small_blip: MakeBlip) -> None:
        model, ids, mask, tokens = self.case(small_blip)
        wrong_images, wrong_texts = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 3, 0, 0])
        keys = model.image_context(tokens, "encoder")
        partners = local_negatives(ids, mask, keys, torch.arange(self.B), wrong_images, wrong_texts)
        wide = partners._replace(ids_BT=F.pad(partners.ids_BT, (0, 3)), mask_BT=F.pad(partners.mask_BT, (0, 3)))
        torch.testing.assert_close(itm(model, ids, mask, keys, wide), itm(model, ids, mask, keys, partners))

    def test_gradient_reaches_images_that_stand_as_negatives(self, small_blip: MakeBlip) -> None:
        model, ids, mask, tokens = self.case(small_blip)
        tokens.requires_grad_()
        kept = torch.arange(self.B) == 0
        keys = ImageContext.of_layers(
            (k * kept[:, None, None, None], v) for k, v in model.image_context(tokens, "encoder").layers
        )
        others = torch.tensor([1, 0, 0, 0])
        loss, _ = itm(model, ids, mask, keys, local_negatives(ids, mask, keys, torch.arange(self.B), others, others))
        loss.backward()
        assert (tokens.grad.abs().amax(dim=(1, 2)) > 0).all()

    def test_a_pair_that_cannot_be_wrong_is_left_out(self, small_blip: MakeBlip) -> None:
        model, ids, mask, tokens = self.case(small_blip)
        image_ids = torch.zeros(self.B, dtype=torch.long)
        drawn = hard_negatives(torch.zeros(self.B, self.B), image_ids, image_ids)
        keys = model.image_context(tokens, "encoder")
        loss, accuracy = itm(model, ids, mask, keys, local_negatives(ids, mask, keys, image_ids, drawn, drawn))
        wanted = self.slow(model, ids, tokens, [(i, i, 1) for i in range(self.B)])
        torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=0)
        right = sum(self.judged(model, ids, tokens, i, i) for i in range(self.B))
        assert float(accuracy) == pytest.approx(right / self.B)

    def test_a_constant_guess_costs_the_trivial_loss(self, small_blip: MakeBlip) -> None:
        model, ids, mask, tokens = self.case(small_blip)
        with torch.no_grad():
            model.match_head.weight.zero_()
            model.match_head.bias.copy_(torch.tensor([2 / 3, 1 / 3]).log())
        wrong = torch.tensor([1, 2, 3, 0])
        keys = model.image_context(tokens, "encoder")
        partners = local_negatives(ids, mask, keys, torch.arange(self.B), wrong, wrong)
        loss, accuracy = itm(model, ids, mask, keys, partners)
        assert loss.item() == pytest.approx(TRIVIAL_LOSS, abs=1e-4)
        assert float(accuracy) == pytest.approx(2 / 3)


class TestAlarm:
    def told(self, steps: int, losses: list[float], every: int = 20) -> list[int]:
        alarm = Alarm(steps)
        return [(i + 1) * every for i, loss in enumerate(losses) if alarm.stuck((i + 1) * every, loss)]

    def test_sounds_after_200_steps_of_a_short_training(self) -> None:
        assert self.told(400, [0.6365] * 20) == list(range(200, 401, 20))

    def test_sounds_after_30_percent_of_a_long_one(self) -> None:
        assert self.told(2000, [0.7, 0.65] + [0.638] * 98)[0] == 40 + 600

    def test_never_sounds_while_the_loss_moves(self) -> None:
        assert self.told(1000, [0.6365, 0.6365, 0.6365, 0.62] * 12) == []
        assert self.told(1000, [0.70 - 0.004 * i for i in range(50)]) == []

    def test_ends_when_the_model_begins_to_learn(self) -> None:
        assert self.told(500, [0.635] * 12 + [0.6] * 13) == [200, 220, 240]

    @pytest.mark.parametrize(("loss", "trivial"), [(0.6416, False), (0.6414, True), (0.6316, True), (0.6314, False)])
    def test_the_band_is_five_thousandths(self, loss: float, trivial: bool) -> None:
        assert bool(self.told(400, [loss] * 20)) == trivial

    def test_does_not_count_what_it_did_not_see(self) -> None:
        assert not Alarm(400, start=300).stuck(320, 0.6365)
