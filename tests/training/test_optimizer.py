from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from capfilt.models import Blip, Blip2
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.tasks.blip import BlipPretraining
from capfilt.training.config import OptimizerConfig
from capfilt.training.optimizer import learning_rate, make_optimizer, set_rate

PLAIN = OptimizerConfig(lr=1.0, min_lr=0.1, warmup=0.1)


def rates(config: OptimizerConfig, steps: int) -> list[float]:
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    found = rates(PLAIN, 100)
    assert found[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert max(found) == 1.0


def test_the_cosine_goes_from_the_peak_to_its_end() -> None:
    found = rates(PLAIN, 100)
    assert found[10] == 1.0
    assert found[55] == pytest.approx(0.55)
    assert found[32] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 22 / 90)) / 2)
    assert 0.1 < found[99] < 0.101
    assert found[10:] == sorted(found[10:], reverse=True)


def test_constant_stays_at_the_peak() -> None:
    config = PLAIN.model_copy(update={"decay": "constant"})
    assert set(rates(config, 100)[9:]) == {1.0}


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert rates(PLAIN.model_copy(update={"warmup": 0.0}), 50)[0] == 1.0


@pytest.mark.parametrize(("rate", "last"), [(0.9, 4.05e-5), (0.85, 1.37e-5)])
def test_the_released_decay_is_ten_percent_an_epoch_and_the_paper_s_fifteen(rate: float, last: float) -> None:
    config = OptimizerConfig(decay="exponential", rate=rate, warmup=3000 / 171_000)
    assert (config.lr, config.min_lr, config.epochs, OptimizerConfig().rate) == (3e-4, 1e-6, 20, 0.9)
    steps = 171_000
    assert learning_rate(config, 2999, steps) == 3e-4
    for epoch in range(20):
        wanted = 3e-4 * rate**epoch
        assert learning_rate(config, max(steps * epoch // 20, 3000), steps) == pytest.approx(wanted)
        assert learning_rate(config, steps * (epoch + 1) // 20 - 1, steps) == pytest.approx(wanted)
    assert learning_rate(config, steps - 1, steps) == pytest.approx(last, rel=5e-3)


def test_the_exponential_has_a_floor() -> None:
    config = OptimizerConfig(lr=1e-3, min_lr=4e-4, decay="exponential", rate=0.5, epochs=4, warmup=0.0)
    assert sorted(set(rates(config, 40)), reverse=True) == [1e-3, 5e-4, 4e-4]


def test_a_training_of_one_step_has_a_rate() -> None:
    for decay in ("cosine", "exponential", "constant"):
        assert learning_rate(PLAIN.model_copy(update={"decay": decay}), 0, 1) == 1.0


def test_every_weight_decays_and_the_momentum_copy_is_left_alone(small_blip: Callable[..., Blip]) -> None:
    learner = BlipPretraining(small_blip(), ObjectivesConfig(queue=0))
    (group,) = make_optimizer(learner, OptimizerConfig()).param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in learner.model.parameters()}
    assert any(p is learner.model.temperature for p in group["params"])
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.05, (0.9, 0.999), 3e-4)


def test_a_step_is_adamw_s() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    before, gradient = layer.weight.detach().clone(), torch.tensor([[0.3, -2.0]])
    optimizer = make_optimizer(layer, OptimizerConfig(lr=0.01))
    layer.weight.grad = gradient
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before * (1 - 0.01 * 0.05) - 0.01 * gradient.sign())


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"warmup": 1}, {"decay": "steps"}, {"rate": 1.1}, {"epochs": 0}])
def test_nonsense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OptimizerConfig(**wrong)


def test_warm_up_may_begin_above_nothing() -> None:
    found = rates(PLAIN.model_copy(update={"warmup_lr": 0.5}), 100)
    assert found[:10] == pytest.approx([0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0])


def test_the_cosine_of_fine_tuning_stays_within_an_epoch() -> None:
    config = OptimizerConfig(lr=1e-5, min_lr=0.0, warmup=0.0, decay="epoch_cosine", epochs=5)
    found = rates(config, 50)
    wanted = [1e-5 * (1 + math.cos(math.pi * epoch / 5)) / 2 for epoch in range(5)]
    assert found == pytest.approx([rate for rate in wanted for _ in range(10)])


def test_vectors_may_be_spared_and_frozen_towers_are_in_no_group(small_blip2: Callable[..., Blip2]) -> None:
    model = small_blip2("opt")
    plain, spared = (make_optimizer(model, OptimizerConfig(decay_vectors=all_)) for all_ in (True, False))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [group["weight_decay"] for group in plain.param_groups] == [0.05]
    assert [group["weight_decay"] for group in spared.param_groups] == [0.05, 0.0]
    assert all(p.ndim >= 2 for p in spared.param_groups[0]["params"])
    assert all(p.ndim < 2 for p in spared.param_groups[1]["params"])
    for optimizer in (plain, spared):
        found = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(found) == sorted(map(id, trained))


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("scalars", [True, False, None])
def test_single_numbers_decay_as_vectors_do_or_as_is_said(
    small_blip2: Callable[..., Blip2], vectors: bool, scalars: bool | None
) -> None:
    """LAVIS spares what has one dimension, and the temperature has none."""
    model = small_blip2()
    groups = make_optimizer(model, OptimizerConfig(decay_vectors=vectors, decay_scalars=scalars)).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(model.temperature)] == (0.05 if (vectors if scalars is None else scalars) else 0.0)
    assert decay[id(model.vision_norm.weight)] == (0.05 if vectors else 0.0)
    assert decay[id(model.match_head.weight)] == 0.05


def released_rate(step: int, epoch_steps: int, warmup: int, config: OptimizerConfig) -> float:
    """As BLIP's and LAVIS' loops set it before a step: a warm-up inside epoch 0, else the epoch's rate."""
    epoch = step // epoch_steps
    if epoch == 0 and warmup:
        return min(config.lr, config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup)
    if config.decay == "exponential":
        return max(config.min_lr, config.lr * config.rate**epoch)
    return (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * epoch / config.epochs)) + config.min_lr


@pytest.mark.parametrize("decay", ["exponential", "epoch_cosine"])
@pytest.mark.parametrize("warmup", [0, 3, 10, 14])
def test_the_released_schedules_count_from_nought(decay: str, warmup: int) -> None:
    """The warm-up of 14 steps is cut off by the end of an epoch of 10."""
    config = OptimizerConfig(
        lr=1e-3, min_lr=1e-5, warmup=warmup / 40, warmup_lr=1e-6, warmup_first=0, decay=decay, epochs=4
    )
    wanted = [released_rate(step, 10, warmup, config) for step in range(40)]
    assert rates(config, 40) == pytest.approx(wanted, rel=1e-12)
    assert wanted[0] == (1e-6 if warmup else 1e-3)


def test_other_schedules_may_count_from_nought_too() -> None:
    found = rates(PLAIN.model_copy(update={"warmup_first": 0}), 100)
    assert found[:11] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


def test_newer_options_are_in_no_dump_at_their_defaults() -> None:
    """Or the fingerprints of trainings that never heard of them would change."""
    assert not {"warmup_first", "warmup_hold", "decay_scalars", "adamw"} & OptimizerConfig().model_dump().keys()
    assert not {"itc_keys", "negatives_epsilon"} & ObjectivesConfig().model_dump().keys()


def test_fused_adamw_is_for_gpus() -> None:
    """On a CPU its last bits are others: golden curves and figures would be, too."""
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4)
    assert not make_optimizer(module, OptimizerConfig()).defaults["fused"]


def test_what_is_a_vector_in_clip_s_own_code_is_spared_as_vectors_are(
    small_clip: Callable[..., torch.nn.Module],
) -> None:
    model = small_clip()
    plain = make_optimizer(model, OptimizerConfig(decay_vectors=False, weight_decay=0.2, eps=1e-6))
    spared = {id(p) for group in plain.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in spared}
    assert {"vision.cls", "logit_scale", "vision.norm.weight", "text.blocks.0.attention.qkv.bias"} <= names
    assert not names & {"vision.positions", "text.positions", "text.words.weight", "image_projection.weight"}
    assert plain.defaults["eps"] == 1e-6
    every = make_optimizer(model, OptimizerConfig(weight_decay=0.2))
    assert [group["weight_decay"] for group in every.param_groups] == [0.2]


def test_old_adamw_adds_epsilon_first_and_decays_last() -> None:
    """As transformers' AdamW of 2021 is written down, step by step."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    config = OptimizerConfig(lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), decay_vectors=False, adamw="transformers")
    optimizer = make_optimizer(layer, config)
    expected, m, v = layer.weight.detach().clone(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for t in (1, 2, 3):
        gradient = torch.randn(2, 3).double() * 1e-7  # so small that epsilon counts
        layer.weight.grad, layer.bias.grad = gradient.clone(), None
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        moved = expected - 0.1 * math.sqrt(1 - 0.9**t) / (1 - 0.8**t) * m / (v.sqrt() + 1e-8)
        expected = moved * (1 - 0.1 * 0.2)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=0)
    assert set(optimizer.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}, "kept as torch's are"
    plain = make_optimizer(layer, config.model_copy(update={"adamw": "torch"}))
    plain.load_state_dict(optimizer.state_dict())


def test_albefs_warm_up_holds_each_rate_for_a_hundred_steps() -> None:
    """20 "epochs" of its schedule, which goes on by one behind every hundredth step of epoch 0: the peak
    comes with step 2,001, and from the second epoch on the rate is that of the cosine over 30."""
    config = OptimizerConfig(
        lr=1e-4, min_lr=1e-5, warmup=2000 / 90_000, warmup_lr=1e-5, warmup_first=0, warmup_hold=100,
        decay="epoch_cosine", epochs=30,
    )  # fmt: skip
    found = rates(config, 90_000)
    for step, passed in ((0, 0), (100, 0), (101, 1), (200, 1), (201, 2), (2000, 19)):
        assert found[step] == pytest.approx(1e-5 + 9e-5 * passed / 20)
    assert found[2001] == found[2999] == pytest.approx(1e-4)
    for epoch in (1, 17, 29):
        wanted = 1e-5 + 9e-5 * (1 + math.cos(math.pi * epoch / 30)) / 2
        assert found[3000 * epoch] == found[3000 * epoch + 2999] == pytest.approx(wanted)


def test_new_weights_may_learn_faster(small_blip: Callable[..., Blip]) -> None:
    """Those that no checkpoint gave; where none gave any, all are alike."""
    model = small_blip()
    config = OptimizerConfig(fresh_rate=2.0, decay_vectors=False)
    assert len(make_optimizer(model, config).param_groups) == 2
    model.filled = frozenset(name for name in model.state_dict() if not name.startswith("match_head."))
    optimizer = make_optimizer(BlipPretraining(model, ObjectivesConfig(queue=0)), config)
    set_rate(optimizer, 0.5)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.match_head.weight)] == (1.0, 0.05)
    assert rates[id(model.match_head.bias)] == (1.0, 0.0)
    assert {rate for p, (rate, _) in rates.items() if p not in map(id, model.match_head.parameters())} == {0.5}
