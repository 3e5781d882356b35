from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from capfilt import config as configs
from capfilt import presets
from capfilt.config import Config
from capfilt.data.policy import PolicyConfig
from capfilt.inference.config import AnnotateConfig
from capfilt.models import FAMILIES, ArchitectureConfig
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from capfilt.pipelines.pretrain import PretrainConfig

KINDS: dict[str, type[Config]] = {
    "bootstrap": BootstrapConfig,
    "pretrain": PretrainConfig,
    "annotate": AnnotateConfig,
    "select": PolicyConfig,
    **{name: family.config for name, family in FAMILIES.items()},
}


@pytest.mark.parametrize("name", [*presets.names("pipelines"), *presets.names("models")])
def test_every_preset_is_shown_and_reads_back(name: str, tmp_path: Path, capfilt: Any) -> None:
    done = capfilt("show", name)
    assert done.code == 0, done.err
    assert done.err == ""
    kind = KINDS[name.split("/")[0]]
    (tmp_path / "again.yaml").write_text(done.out)
    shelf = "models" if issubclass(kind, ArchitectureConfig) else "pipelines"
    assert configs.read(tmp_path / "again.yaml", kind) == configs.read(presets.find(shelf, name), kind)
    assert list(yaml.safe_load(done.out)) == list(kind.model_fields), "every default is spelled out"
    # What was shown is itself a recipe that can be shown.
    assert capfilt("show", tmp_path / "again.yaml").out == done.out


def test_presets_go_by_their_short_names(capfilt: Any) -> None:
    assert capfilt("show", "demo").out == capfilt("show", "bootstrap/demo").out
    assert capfilt("show", "blip-tiny").out == capfilt("show", "pretrain/blip-tiny").out


def test_json_is_for_machines(capfilt: Any) -> None:
    done = capfilt("show", "demo", "--set", "seed=7", "--json")
    assert json.loads(done.out)["seed"] == 7


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("extends: bootstrap/demo\nseed: 3\n", "rounds"),
        ("extends: demo\ndata: {world: null, web: web/, human: human/, val: val/}\n", "rounds"),
        ("extends: pretrain/blip-tiny\n", "resources"),
        ("extends: other.yaml\nseed: 2\n", "rounds"),
        ("model: blip/tiny\ndata: s/\ntrain: {steps: 5}\n", "train"),
    ],
)
def test_a_yaml_of_one_s_own_is_what_it_extends_or_what_its_keys_say(
    text: str, key: str, tmp_path: Path, capfilt: Any, recipe: Any
) -> None:
    recipe(tmp_path).rename(tmp_path / "other.yaml")
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    done = capfilt("show", mine)
    assert done.code == 0, done.err
    assert key in yaml.safe_load(done.out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dmo"], "Did you mean 'demo'?"),
        (["blip/bas"], "Did you mean 'blip/base'?"),
        (["absent.yaml"], "there is no file absent.yaml"),
        (["demo", "--set", "select.threshold=calibrated", "--set", "data.world.val=0"], "needs validation pairs"),
        (["demo", "--set", "pretrain.loader.batch_size=33"], "cannot be split over"),
        (["demo", "--set", "captioner.objectives.losses={itm: 1}"], "captioner: objective 'itm' needs"),
        (["demo", "--set", "data.web=shards/"], "both the embedded world and shards (web)"),
        (["demo", "--set", "data.world=null", "--set", "data.web=s/"], "`human` shards and `web` shards"),
        (["demo", "--set", "data.world.human=0"], "at least one image"),
        (["demo", "--set", "filter.recompute=3"], "filter: recompute 3, and the vision tower has 2 blocks"),
        (["demo", "--set", "pretrain.objectives.momentum_from=start"], "round 0 starts from nothing: take 'model'"),
        (["demo", "--set", "filter.objectives.momentum_from=start"], "set pretrain.keep_momentum=true"),
        (["blip-coco-retrieval", "--set", "start=null"], "momentum_from is 'start', and there is none: give `start`"),
    ],
)  # fmt: skip
def test_parts_that_do_not_meet_are_refused_when_the_recipe_is_read(words: list[str], said: str, capfilt: Any) -> None:
    done = capfilt("show", *words)
    assert done.code == 2
    assert said in done.line
    assert len(done.err.splitlines()) == 1


def test_a_model_without_a_decoder_cannot_bootstrap(
    tmp_path: Path, capfilt: Any, model_yaml: Path, recipe: Any
) -> None:
    tree = yaml.safe_load(model_yaml.read_text())
    tree["text"]["roles"] = ["encoder"]
    half = tmp_path / "half.yaml"
    half.write_text(yaml.safe_dump(tree))
    mine = recipe(tmp_path, model=str(half))
    done = capfilt("show", mine, "--set", "pretrain.objectives.losses={itc: 1, itm: 1}")
    assert done.code == 2
    assert "cannot be the captioner: it cannot decode" in done.line
