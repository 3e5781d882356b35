from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from capfilt.errors import RecipeError
from capfilt.models import Blip, Blip2
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.draws import GivenDraws
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.losses.itc_queries import itc_queries
from capfilt.objectives.losses.itm import itm, local_negatives
from capfilt.objectives.losses.lm import answered, lm
from capfilt.objectives.losses.negatives import negative_weights_among_others
from capfilt.objectives.tasks import build_task, unsaid, unsupported
from capfilt.objectives.tasks.blip import BlipPretraining
from capfilt.objectives.tasks.blip2 import Blip2Stage1, Blip2Stage2

MakeBlip2 = Callable[..., Blip2]
B = 5


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 190, (B, 6), generator=generator)
    ids[2, 4:] = 0
    return torch.randn(B, 3, 16, 16, generator=generator), ids, (ids != 0).long(), torch.arange(B)


def config(**losses: float) -> ObjectivesConfig:
    return ObjectivesConfig(losses=losses, queue=0)


def test_the_first_stage_asks_all_three_as_they_are_alone(small_blip2: MakeBlip2, batch: tuple[Tensor, ...]) -> None:
    images, ids, mask, image_ids = batch
    wrong_images, wrong_texts = torch.tensor([3, 0, 1, 4, 2]), torch.tensor([1, 2, 0, 0, 3])
    learner = Blip2Stage1(small_blip2(), config(itc=1.0, itm=1.0, lm=1.0)).train()
    draws = learner.draws = GivenDraws(wrong_images=wrong_images, wrong_texts=wrong_texts)
    losses, figures = learner(PairBatch(*batch), progress=0.5)
    model = learner.model
    tokens = model.encode_image(images)
    image, text = model.project_image(tokens), model.project_text(model.encode_text(ids, mask))
    pairs = itc_queries(image, text, model.temperature)
    torch.testing.assert_close(losses["itc"], pairs.loss)
    # A wrong image is drawn by what a text is similar to, and the other way.
    for name, similarity in (("wrong_images", pairs.text_to_image_BN), ("wrong_texts", pairs.image_to_text_BN)):
        weights = negative_weights_among_others(similarity, image_ids, image_ids)
        torch.testing.assert_close(draws.weights[name], weights)
    keys = model.image_context(tokens, "encoder")
    wanted, accuracy = itm(
        model, ids, mask, keys, local_negatives(ids, mask, keys, image_ids, wrong_images, wrong_texts)
    )
    torch.testing.assert_close([losses["itm"], figures["itm_accuracy"]], [wanted, accuracy])
    written = model.decode(ids, mask, model.image_context(tokens, "decoder"))
    torch.testing.assert_close(losses["lm"], lm(written, ids, mask))
    torch.testing.assert_close(learner.total(losses), losses["itc"] + losses["itm"] + losses["lm"])


def test_every_weight_that_is_trained_learns_and_no_other(small_blip2: MakeBlip2, batch: tuple[Tensor, ...]) -> None:
    learner = Blip2Stage1(small_blip2(), config(itc=1.0, itm=1.0, lm=1.0)).train()
    learner.total(learner(PairBatch(*batch), progress=0.0)[0]).backward()
    learned = {name for name, p in learner.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {name for name, p in learner.named_parameters() if p.requires_grad}
    assert not any(name.startswith("model.vision.") for name in learned)
    assert not learner.model.vision.training


@pytest.mark.parametrize("heat", [0.9, 1e-5])
def test_the_temperature_is_not_clamped(small_blip2: MakeBlip2, batch: tuple[Tensor, ...], heat: float) -> None:
    learner = Blip2Stage1(small_blip2(), config(itc=1.0)).train()
    with torch.no_grad():
        learner.model.temperature.fill_(heat)
    learner(PairBatch(*batch), progress=0.0)[0]["itc"].backward()
    assert learner.model.temperature.item() == pytest.approx(heat)


@pytest.mark.parametrize("roles", [("encoder",), ("decoder",)])
def test_half_a_model_is_asked_for_half(
    small_blip2: MakeBlip2, batch: tuple[Tensor, ...], roles: tuple[str, ...]
) -> None:
    names = {"encoder": {"itc": 1.0, "itm": 1.0}, "decoder": {"lm": 1.0}}[roles[0]]
    losses, _ = Blip2Stage1(small_blip2(roles=roles), config(**names))(PairBatch(*batch), progress=0.0)
    assert set(losses) == set(names)
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("language", ["opt", "t5"])
@pytest.mark.parametrize("prompt", [0, 2])
def test_the_second_stage_asks_the_language_model(
    small_blip2: MakeBlip2, batch: tuple[Tensor, ...], language: str, prompt: int
) -> None:
    images, ids, mask, _ = batch
    learner = Blip2Stage2(
        small_blip2(language), ObjectivesConfig(losses={"lm": 1.0}, queue=0, smoothing=0.0), prompt
    ).train()
    losses, _ = learner(PairBatch(*batch), progress=0.0)
    logits, labels = learner.model.predict(learner.model.encode_image(images), ids, mask, prompt)
    told = logits.double().log_softmax(dim=-1)
    rows = [(b, t) for b in range(B) for t in range(labels.shape[1]) if labels[b, t] != -100]
    assert len(rows) == int(mask[:, prompt:].sum())
    wanted = -sum(told[b, t, labels[b, t]] for b, t in rows) / len(rows)
    torch.testing.assert_close(losses["lm"].double(), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(answered(logits, labels), losses["lm"])
    losses["lm"].backward()
    learned = {name for name, p in learner.named_parameters() if p.grad is not None and p.grad.any()}
    assert learned == {name for name, p in learner.named_parameters() if p.requires_grad}


def test_each_family_and_stage_has_its_own(small_blip2: MakeBlip2, small_blip: Callable[..., Blip]) -> None:
    assert type(build_task(small_blip(), config(itc=1.0))) is BlipPretraining
    assert type(build_task(small_blip2(), config(itc=1.0))) is Blip2Stage1
    assert type(build_task(small_blip2("opt"), config(lm=1.0))) is Blip2Stage2


def test_what_would_be_passed_over_is_named(small_blip2: MakeBlip2, small_blip: Callable[..., Blip]) -> None:
    blip2 = small_blip2().config
    assert unsupported(blip2, config(itc=1.0)) == ""
    assert "objectives.queue is 57600" in unsupported(blip2, ObjectivesConfig())
    assert "objectives.alpha " in unsupported(blip2, ObjectivesConfig(queue=0, alpha=0.1))
    assert "objectives.negatives " in unsupported(blip2, ObjectivesConfig(queue=0, negatives="all"))
    assert "objectives.negatives_epsilon " in unsupported(blip2, ObjectivesConfig(queue=0, negatives_epsilon=0.0))
    assert unsupported(blip2, ObjectivesConfig(queue=0, itc_keys="detached")) == ""
    assert "itc_keys is rank" in unsupported(blip2, ObjectivesConfig(queue=0, itc_keys="rank"))
    assert unsupported(small_blip().config, ObjectivesConfig(alpha=0.1, itc_keys="rank")) == ""
    assert "itc_keys is detached" in unsupported(small_blip().config, ObjectivesConfig(itc_keys="detached"))


def test_smoothing_is_to_be_given_where_its_default_is_not_the_published_one(small_blip2: MakeBlip2) -> None:
    silent = ObjectivesConfig(losses={"lm": 1.0}, queue=0)
    assert "objectives.smoothing is not given, and 0.1 applies" in unsaid(small_blip2("opt").config, silent)
    for smoothing in (0.0, 0.1):
        said = ObjectivesConfig(losses={"lm": 1.0}, queue=0, smoothing=smoothing)
        assert unsaid(small_blip2("opt").config, said) == ""
    assert unsaid(small_blip2().config, silent) == ""
    # What crosses to a worker has every key.
    assert unsaid(small_blip2("opt").config, ObjectivesConfig(**silent.model_dump())) == ""


def test_gradients_that_would_vanish_are_refused(small_blip2: MakeBlip2) -> None:
    """Before the training begins, and of a task that is built by hand."""
    half, only_lm = small_blip2("opt", frozen="fp16"), ObjectivesConfig(losses={"lm": 1.0}, queue=0, smoothing=0.0)
    assert "set it to bf16, or to fp32" in unsupported(half.config, only_lm)
    with pytest.raises(
        RecipeError, match="frozen is fp16, in which gradients that come through a language model vanish"
    ):
        build_task(half, only_lm)
    assert unsupported(small_blip2(frozen="fp16").config, config(itc=1.0)) == "", "none come through a vision tower"
