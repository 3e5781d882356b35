from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models import Blip
from capfilt.models.layers.image_context import ImageContext
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.draws import Draws
from capfilt.objectives.kinds.vilt import ViltObjectives
from capfilt.objectives.losses.itm import Alarm, global_negatives, itm, local_negatives, trivial_loss
from capfilt.objectives.losses.negatives import negative_weights

MakeBlip = Callable[..., Blip]


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
        torch.testing.assert_close(loss, wanted)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        wanted.backward()
        torch.testing.assert_close(fast.grad, slow.grad)
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(found[name], p.grad)
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
        wide = partners._replace(texts=F.pad(partners.texts, (0, 3)), mask_BT=F.pad(partners.mask_BT, (0, 3)))
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
        drawn = Draws().columns("", negative_weights(torch.zeros(self.B, self.B), image_ids, image_ids))
        keys = model.image_context(tokens, "encoder")
        loss, accuracy = itm(model, ids, mask, keys, local_negatives(ids, mask, keys, image_ids, drawn, drawn))
        wanted = self.slow(model, ids, tokens, [(i, i, 1) for i in range(self.B)])
        torch.testing.assert_close(loss, wanted)
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
        assert loss.item() == pytest.approx(trivial_loss(), abs=1e-4)
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

    def test_it_knows_how_many_of_the_pairs_match(self) -> None:
        half = Alarm(400, match_share=ViltObjectives().match_share)
        assert half.level == pytest.approx(math.log(2))
        assert Alarm(400, match_share=ObjectivesConfig().match_share).level == pytest.approx(0.63651, abs=1e-5)
        assert half.stuck(200, 0.69)
        assert not half.stuck(220, 0.6365), "what is trivial elsewhere"

    def test_does_not_count_what_it_did_not_see(self) -> None:
        assert not Alarm(400, start=300).stuck(320, 0.6365)
