from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from capfilt.models import Blip
from capfilt.models.layers.config import Share
from capfilt.objectives.config import NEEDS, ObjectivesConfig
from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.losses.itm import itm, local_negatives
from capfilt.objectives.losses.lm import lm
from capfilt.objectives.losses.negatives import negative_weights
from capfilt.objectives.tasks.blip import BlipPretraining

MakeBlip = Callable[..., Blip]
B = 5


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 190, (B, 6), generator=generator)
    ids[2, 4:] = 0
    return torch.randn(B, 3, 16, 16, generator=generator), ids, (ids != 0).long(), torch.arange(B)


def config(**losses: float) -> ObjectivesConfig:
    return ObjectivesConfig(losses=losses, queue=10)


@pytest.mark.parametrize("share", ["all", "all_but_cross_attention", "all_but_self_attention", "none"])
def test_all_together_are_what_they_are_alone(small_blip: MakeBlip, batch: tuple[Tensor, ...], share: Share) -> None:
    images, ids, mask, image_ids = batch
    wrong_images, wrong_texts = torch.tensor([3, 0, 1, 4, 2]), torch.tensor([1, 2, 0, 0, 3])
    draws = GivenDraws(wrong_images=wrong_images, wrong_texts=wrong_texts)
    learner = BlipPretraining(small_blip(share=share), config(itc=1.0, itm=1.0, lm=1.0)).eval()
    learner.draws = draws
    losses, figures = learner(PairBatch(*batch), progress=0.5)
    model = learner.model
    tokens = model.encode_image(images)
    image, text = model.project_image(tokens), model.project_text(model.encode_text(ids, mask))
    # The momentum copy equals the model here. A wrong image is drawn by what a text is similar to, and the other way.
    for name, similarity in (("wrong_images", text @ image.T), ("wrong_texts", image @ text.T)):
        weights = negative_weights(similarity.detach() / 0.07, image_ids, image_ids)
        torch.testing.assert_close(draws.weights[name], weights)
    keys = model.image_context(tokens, "encoder")
    wrong = local_negatives(ids, mask, keys, image_ids, wrong_images, wrong_texts)
    wanted, accuracy = itm(model, ids, mask, keys, wrong)
    torch.testing.assert_close(losses["itm"], wanted)
    assert figures == {"itm_accuracy": accuracy}
    written = model.decode(ids, mask, model.image_context(tokens, "decoder"))
    torch.testing.assert_close(losses["lm"], lm(written, ids, mask))
    alone = BlipPretraining(small_blip(share=share), config(itc=1.0)).eval()
    alone.load_state_dict(learner.state_dict())
    torch.testing.assert_close(losses["itc"], alone(PairBatch(*batch), progress=0.5)[0]["itc"])


@pytest.mark.parametrize("names", [("lm",), ("itm",), ("itc",), ("itc", "itm"), ("itm", "lm")])
def test_only_what_is_asked_is_computed(
    small_blip: MakeBlip, batch: tuple[Tensor, ...], names: tuple[str, ...]
) -> None:
    learner = BlipPretraining(small_blip(), config(**dict.fromkeys(names, 1.0))).train()
    losses, figures = learner(PairBatch(*batch), progress=0.0)
    assert tuple(losses) == names
    assert set(figures) == ({"itm_accuracy"} if "itm" in names else set())
    assert (learner.momentum is not None) == ("itc" in names)


def test_each_objective_works_with_the_verbs_it_names(small_blip: MakeBlip, batch: tuple[Tensor, ...]) -> None:
    for name, needs in NEEDS.items():
        role = "decoder" if "decode" in needs else "encoder"
        model = small_blip(roles=(role,))
        assert needs <= model.capabilities
        assert BlipPretraining(model, config(**{name: 1.0}))(PairBatch(*batch), progress=0.0)[0][name].isfinite()


def test_the_total_is_the_weighted_sum(small_blip: MakeBlip) -> None:
    losses = {"itc": torch.tensor(2.0), "itm": torch.tensor(3.0), "lm": torch.tensor(5.0)}
    plain = BlipPretraining(small_blip(), ObjectivesConfig(queue=0))
    assert plain.total(losses).item() == 10
    assert BlipPretraining(small_blip(), config(itc=0.5, lm=2.0)).total(losses).item() == 11


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.5), (1e-5, 0.001), (-1.0, 0.001), (0.07, 0.07)])
def test_the_temperature_is_clamped_in_place_and_still_learned(
    small_blip: MakeBlip, batch: tuple[Tensor, ...], before: float, after: float
) -> None:
    learner = BlipPretraining(small_blip(), config(itc=1.0)).train()
    with torch.no_grad():
        learner.model.temperature.fill_(before)
    learner(PairBatch(*batch), progress=0.0)[0]["itc"].backward()
    assert learner.model.temperature.item() == pytest.approx(after)
    assert learner.model.temperature.grad is not None
    assert learner.model.temperature.grad.item() != 0


def test_without_itc_any_other_image_may_be_the_wrong_one(small_blip: MakeBlip, batch: tuple[Tensor, ...]) -> None:
    learner = BlipPretraining(small_blip(), config(itm=1.0))
    drawn = learner.draws = GivenDraws(wrong_images=torch.arange(B).roll(1), wrong_texts=torch.arange(B).roll(1))
    learner(PairBatch(*batch), progress=0.0)
    for weights in drawn.weights.values():
        torch.testing.assert_close(weights, (torch.full((B, B), 1 / B + 1e-4)).fill_diagonal_(0))
    assert len(drawn.weights) == 2


def test_the_smoothing_of_the_recipe_reaches_the_loss(small_blip: MakeBlip, batch: tuple[Tensor, ...]) -> None:
    model, (images, ids, mask, _) = small_blip(), batch
    learner = BlipPretraining(model, ObjectivesConfig(losses={"lm": 1.0}, smoothing=0.0))
    logits = model.decode(ids, mask, model.image_context(model.encode_image(images), "decoder"))
    found = learner(PairBatch(*batch), progress=0.0)[0]["lm"]
    torch.testing.assert_close(found, lm(logits, ids, mask, smoothing=0.0))


def test_the_paper_s_sum_is_the_default() -> None:
    assert ObjectivesConfig().losses == {"itc": 1.0, "itm": 1.0, "lm": 1.0}
    assert ObjectivesConfig().smoothing == 0.1


@pytest.mark.parametrize("wrong", [{"losses": {}}, {"losses": {"mlm": 1.0}}, {"momentum": 1.5}, {"alpha": -0.1}])
def test_nonsense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ObjectivesConfig(**wrong)


def test_the_prompt_is_left_out_of_the_language_loss(small_blip: MakeBlip, batch: tuple[Tensor, ...]) -> None:
    model, (images, ids, mask, _) = small_blip(), batch
    logits = model.decode(ids, mask, model.image_context(model.encode_image(images), "decoder"))
    found = BlipPretraining(model, config(lm=1.0), prompt=4)(PairBatch(*batch), progress=0.0)[0]["lm"]
    torch.testing.assert_close(found, lm(logits, ids, mask, prompt=4))
    assert not torch.isclose(found, lm(logits, ids, mask))


def test_the_queue_remembers_images_where_targets_ask_for_them(small_blip: MakeBlip, batch: tuple[Tensor, ...]) -> None:
    options = {"losses": {"itc": 1.0}, "queue": 10, "alpha": 0.0}
    learner = BlipPretraining(small_blip(), ObjectivesConfig(itc_targets="image", **options)).train()
    pairs = BlipPretraining(small_blip(), ObjectivesConfig(**options)).train()
    assert learner.momentum is not None
    assert learner.momentum.queue_groups.tolist() == [-100] * 10
    pairs.load_state_dict(learner.state_dict(), strict=False)
    images, ids, mask, image_ids = batch
    later = (
        images.roll(1, 0),
        ids.roll(1, 0),
        mask.roll(1, 0),
        image_ids,
    )  # other looks of the images that are queued now
    losses = [
        [each(PairBatch(*seen), progress=0.0)[0]["itc"].item() for each in (learner, pairs)] for seen in (batch, later)
    ]
    assert losses[0][0] == pytest.approx(losses[0][1])
    assert losses[1][0] != pytest.approx(losses[1][1])
    assert learner.momentum.queue_groups.tolist() == [0, 1, 2, 3, 4] * 2
    assert "momentum.queue_groups" not in pairs.state_dict()


@pytest.mark.parametrize("by", ["momentum", "online"])
def test_negatives_are_as_hard_as_the_features_say_that_are_asked(
    small_blip: MakeBlip, batch: tuple[Tensor, ...], by: str
) -> None:
    """BLIP's pretraining asks momentum features, its retrieval fine-tuning the online ones."""
    options = ObjectivesConfig(losses={"itc": 1.0, "itm": 1.0}, queue=10, negatives_by=by)
    learner = BlipPretraining(small_blip(), options).eval()
    assert learner.momentum is not None
    learner.momentum.model = small_blip(seed=1, roles=("encoder",))
    draws = learner.draws = GivenDraws(wrong_images=torch.arange(B).roll(1), wrong_texts=torch.arange(B).roll(2))
    learner(PairBatch(*batch), progress=0.0)
    images, ids, mask, image_ids = batch
    model, other = learner.model, learner.momentum.model if by == "momentum" else learner.model
    image, text = model.project_image(model.encode_image(images)), model.project_text(model.encode_text(ids, mask))
    keys_image, keys_text = (
        other.project_image(other.encode_image(images)),
        other.project_text(other.encode_text(ids, mask)),
    )
    for name, similarity in (("wrong_images", text @ keys_image.T), ("wrong_texts", image @ keys_text.T)):
        weights = negative_weights(similarity.detach() / 0.07, image_ids, image_ids)
        torch.testing.assert_close(draws.weights[name], weights)
        assert not draws.weights[name].requires_grad


def test_alpha_may_be_set(small_blip: MakeBlip, batch: tuple[Tensor, ...]) -> None:
    """In the place of what the ramp says."""
    options: dict[str, Any] = {"losses": {"itc": 1.0}, "queue": 10, "momentum": 1.0}
    flat: dict[str, Any] = {"alpha": 0.3, "alpha_ramp": 0.0}
    found = []
    for alpha, settings in ((0.3, {}), (None, flat), (None, {})):
        torch.manual_seed(0)
        learner = BlipPretraining(small_blip(), ObjectivesConfig(**options, **settings)).train()
        assert learner.momentum is not None
        learner.momentum.model = small_blip(seed=1, roles=("encoder",))
        learner.alpha = alpha
        found.append(learner(PairBatch(*batch), progress=0.0)[0]["itc"].item())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("options", "least"), [({}, 1e-4), ({"negatives_epsilon": 0.0}, 0.0)])
def test_the_recipe_says_what_is_added_to_weights(
    small_blip: MakeBlip, batch: tuple[Tensor, ...], options: dict[str, Any], least: float
) -> None:
    losses = {"itc": 1.0, "itm": 1.0}
    learner = BlipPretraining(small_blip(), ObjectivesConfig(losses=losses, queue=10, **options)).eval()
    draws = learner.draws = GivenDraws(wrong_images=torch.arange(B).roll(1), wrong_texts=torch.arange(B).roll(2))
    with torch.no_grad():
        learner.model.temperature.fill_(0.001)  # one column has it all
    learner(PairBatch(*batch), progress=0.0)
    for weights in draws.weights.values():
        assert float(weights[~torch.eye(B, dtype=torch.bool)].min()) == pytest.approx(least)


def test_alone_the_negatives_of_all_are_one_s_own(small_blip: MakeBlip, batch: tuple[Tensor, ...]) -> None:
    losses = []
    for negatives in ("rank", "all"):
        learner = BlipPretraining(small_blip(), ObjectivesConfig(queue=10, negatives=negatives)).train()
        torch.manual_seed(3)
        losses.append(learner(PairBatch(*batch), progress=0.0)[0]["itm"])
    torch.testing.assert_close(*losses)
