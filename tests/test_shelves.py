"""Every YAML of the shelves is read as what it is for, and every architecture is built, without weights."""

from __future__ import annotations

import pytest
import torch

from capfilt import config as configs
from capfilt import presets
from capfilt.models import Blip, BlipConfig
from capfilt.pipelines import bootstrap, pretrain
from capfilt.training.optimizer import learning_rate

COUNTS = {"blip/base": 252_441_919, "blip/large": 474_729_023}


def read_pretrain(name: str) -> pretrain.PretrainConfig:
    return configs.read(presets.find("pipelines", name, within="pretrain"), pretrain.PretrainConfig)


def parameters(architecture: BlipConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Blip(architecture).parameters())


@pytest.mark.parametrize("name", presets.names("models"))
def test_an_architecture_can_be_built(name: str) -> None:
    found = parameters(configs.read(presets.find("models", name), BlipConfig))
    assert found == COUNTS.get(name, found)
    assert found > 0


@pytest.mark.parametrize("name", presets.names("pipelines"))
def test_a_recipe_is_whole_and_says_how_it_is_run(name: str) -> None:
    path, (kind, _, stem) = presets.find("pipelines", name), name.partition("/")
    text = path.read_text()
    assert text.startswith("# ")
    assert f"#   capfilt {kind}" in text
    if kind == "bootstrap":
        bootstrap.check(configs.read(path, bootstrap.BootstrapConfig))
        return
    assert kind == "pretrain"
    assert f"#   capfilt pretrain {stem} " in text
    recipe = configs.read(path, pretrain.PretrainConfig)
    assert parameters(pretrain.check(recipe)) > 0
    assert recipe.train.loader.batch_size % recipe.resources.workers == 0


@pytest.mark.parametrize(
    ("name", "count"), [("blip-coco-caption", 223_971_644), ("blip-coco-retrieval", 223_744_258 + 1)]
)
def test_a_fine_tuned_model_is_as_large_as_transformers_counts_it(name: str, count: int) -> None:
    assert parameters(pretrain.check(read_pretrain(name))) == count


@pytest.mark.parametrize(
    ("name", "rows", "epochs"),
    [("blip-14m", 24_700_000, 20), ("blip-coco-caption", 566_747, 5), ("blip-coco-retrieval", 566_747, 6)],
)
def test_the_steps_are_the_epochs_of_the_paper(name: str, rows: int, epochs: int) -> None:
    train = read_pretrain(name).train
    assert train.optimizer.epochs == epochs
    assert train.steps == rows // train.loader.batch_size * epochs


def test_trap_4_the_schedule_of_blip_14m() -> None:
    train = read_pretrain("blip-14m").train
    rates = [learning_rate(train.optimizer, step, train.steps) for step in (0, 1499, 2998, 2999, 3000, 8576, 171_519)]
    wanted = [1.1e-6, 1.505e-4, 2.999e-4, 3e-4, 3e-4, 2.7e-4, 4.05e-5]
    assert rates == pytest.approx(wanted, rel=2e-3)
    assert rates[2] < 3e-4
