"""Every YAML of the shelves is read as what it is for, and every architecture is built, without weights."""

from __future__ import annotations

import re

import pytest

from capfilt import config as configs
from capfilt import presets
from capfilt.data.policy import PolicyConfig
from capfilt.inference.config import AnnotateConfig
from capfilt.models import Architecture, blank, read_architecture
from capfilt.pipelines import pretrain
from capfilt.pipelines.bootstrap import checks
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from capfilt.pipelines.inspect import show
from capfilt.training.optimizer import learning_rate

COUNTS = {
    "albef/base": 209_937_725,
    "blip/base": 252_441_919,
    "blip/large": 474_729_023,
    "blip2/pretrain": 186_705_470 + 985_952_256 - 2 * 1408,  # the norm behind the tower is counted in both
}


def read_pretrain(name: str) -> pretrain.PretrainConfig:
    return configs.read(presets.find("pipelines", name, within="pretrain"), pretrain.PretrainConfig)


def parameters(architecture: Architecture) -> int:
    return sum(p.numel() for p in blank(architecture).parameters())


@pytest.mark.parametrize("name", presets.names("models"))
def test_an_architecture_can_be_built(name: str) -> None:
    actual = parameters(read_architecture(presets.find("models", name)))
    assert actual == COUNTS.get(name, actual)
    assert actual > 0


@pytest.mark.parametrize("name", presets.names("pipelines"))
def test_a_recipe_is_whole_and_says_how_it_is_run(name: str) -> None:
    path, (kind, _, stem) = presets.find("pipelines", name), name.partition("/")
    text = path.read_text()
    assert text.startswith("# ")
    assert f"#   capfilt {kind}" in text
    if kind == "bootstrap":
        checks.check(configs.read(path, BootstrapConfig))
        return
    if kind in ("annotate", "select"):
        assert f"#   capfilt {kind} SHARDS --recipe {stem} " in text
        configs.read_named(show.KINDS[kind][0], stem)
        return
    assert kind in ("pretrain", "finetune")
    assert f"#   capfilt {kind} {stem} " in text
    assert not re.search(r"^#.*capfilt evaluate runs/[^/ ]+ ", text, re.MULTILINE), "a run folder is no model"
    recipe = configs.read(path, show.KINDS[kind][0])
    assert isinstance(recipe, pretrain.PretrainConfig)
    architecture = pretrain.check(recipe)
    counted = architecture.known_answers == ()
    assert parameters(architecture.with_answers(("yes", "no")) if counted else architecture) > 0
    assert recipe.train.loader.batch_size % recipe.resources.workers == 0


@pytest.mark.parametrize(
    ("name", "count"), [("blip-coco-caption", 223_971_644), ("blip-coco-retrieval", 223_744_258 + 1)]
)
def test_a_fine_tuned_model_is_as_large_as_transformers_counts_it(name: str, count: int) -> None:
    assert parameters(pretrain.check(read_pretrain(name))) == count


@pytest.mark.parametrize(
    ("name", "rows", "epochs"),
    [
        ("blip-14m", 24_700_000, 20),
        ("blip-14m-8gpu", 24_700_000, 20),
        ("blip-129m", 38_300_000, 20),
        ("blip-129m-8gpu", 38_300_000, 20),
        ("blip-coco-caption", 566_747, 5),
        ("blip-coco-retrieval", 566_747, 6),
    ],
)
def test_the_steps_are_the_epochs_of_the_paper(name: str, rows: int, epochs: int) -> None:
    train = read_pretrain(name).train
    assert train.optimizer.epochs == epochs
    assert train.steps == rows // train.loader.batch_size * epochs


@pytest.mark.parametrize("name", ["blip2-stage1-8gpu", "blip2-stage2-opt-2.7b-8gpu"])
def test_the_steps_of_blip2_on_8_gpus_are_those_of_the_log(name: str) -> None:
    train = read_pretrain(name).train
    assert train.steps == 4_606_464 // train.loader.batch_size * train.optimizer.epochs == 44_980


@pytest.mark.parametrize("name", ["blip-14m", "blip-14m-8gpu", "blip-129m", "blip-129m-8gpu"])
def test_blip_warms_up_for_3000_steps(name: str) -> None:
    train = read_pretrain(name).train
    assert train.optimizer.warmup * train.steps == pytest.approx(3000, rel=1e-3)
    assert train.objectives.queue % train.loader.batch_size == 0


def test_the_trainings_of_bootstrap_blip_are_those_of_its_parts_by_the_released_code() -> None:
    """But for their length, and for how many processes they take."""
    config = configs.read(presets.find("pipelines", "bootstrap/blip"), BootstrapConfig)
    released = ["objectives.itc_keys=rank", "optimizer.warmup_first=0"]
    length = [f"steps={config.pretrain.steps}", f"optimizer.warmup={config.pretrain.optimizer.warmup}"]
    parts = {
        "pretrain": configs.changed(read_pretrain("blip-14m").train, [*released, *length], "here"),
        "captioner": read_pretrain("blip-coco-caption").train,
        "filter": configs.changed(
            read_pretrain("blip-coco-retrieval").train, [released[0], "objectives.negatives_epsilon=0"], "here"
        ),
    }
    assert config.trainings == parts
    assert config.pretrain.steps == 23_930_000 // config.pretrain.loader.batch_size * 20
    assert config.pretrain.optimizer.warmup * config.pretrain.steps == pytest.approx(3000, rel=1e-3)


def test_the_texts_of_blip2_are_the_same_in_every_recipe() -> None:
    """Ten written, the two best of all by similarity kept, one drawn at each pass (BLIP-2, section 3.4)."""
    config = configs.read(presets.find("pipelines", "bootstrap/blip2"), BootstrapConfig)
    written, chosen = configs.read_named(AnnotateConfig, "blip2-ten"), configs.read_named(PolicyConfig, "blip2-two")
    assert written.captions == config.annotate.captions == 10
    assert chosen == config.select
    assert str(chosen.rule(None)) == "the 2 best by itc"
    assert {stage.train.loader.captions for stage in config.final} == {"one"}


def test_the_schedule_of_blip2_is_the_paper_s() -> None:
    for name, warmup, floor in (("blip2-stage1", 2000, 1e-5), ("blip2-stage2-opt-2.7b", 2000, 5e-5)):
        train = read_pretrain(name).train
        at = [learning_rate(train.optimizer, step, train.steps) for step in (warmup - 1, warmup, train.steps - 1)]
        assert at == pytest.approx([1e-4, 1e-4, floor], rel=1e-3)
        assert train.optimizer.betas == (0.9, 0.98)
        assert not train.optimizer.decay_vectors


def test_the_schedule_of_blip_14m() -> None:
    train = read_pretrain("blip-14m").train
    rates = [learning_rate(train.optimizer, step, train.steps) for step in (0, 1499, 2998, 2999, 3000, 8576, 171_519)]
    expected = [1.1e-6, 1.505e-4, 2.999e-4, 3e-4, 3e-4, 2.7e-4, 4.05e-5]
    assert rates == pytest.approx(expected, rel=2e-3)
    assert rates[2] < 3e-4


@pytest.mark.parametrize("name", ["vlmo-base-texts", "vlmo-base"])
def test_the_schedule_of_vlmo(name: str) -> None:
    train = read_pretrain(name).train
    rates = [learning_rate(train.optimizer, step, train.steps) for step in (0, 1250, 2500, 101_250, 199_999)]
    assert rates == pytest.approx([0, 1e-4, 2e-4, 1e-4, 1e-9], rel=2e-2)


def test_clip_s_steps_are_open_clip_s_epochs_over_laion_400m() -> None:
    train = read_pretrain("clip-vit-b-32").train
    assert train.steps == 407_332_084 * 32 // train.loader.batch_size
    assert train.optimizer.warmup * train.steps == pytest.approx(2000, rel=1e-3)
