from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from capfilt import config as configs
from capfilt import presets
from capfilt.config import Config
from capfilt.data import shards
from capfilt.data.policy import PolicyConfig
from capfilt.data.sample import Sample
from capfilt.inference.config import AnnotateConfig
from capfilt.models import FAMILIES, ArchitectureConfig
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from capfilt.pipelines.finetune import FinetuneConfig
from capfilt.pipelines.inspect import keys, show
from capfilt.pipelines.pretrain import PretrainConfig
from capfilt.recipe_tree import read_tree

KINDS: dict[str, type[Config]] = {
    "bootstrap": BootstrapConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "annotate": AnnotateConfig,
    "select": PolicyConfig,
    **{name: family.config for name, family in FAMILIES.items()},
}


@pytest.mark.parametrize("name", [*presets.names("pipelines"), *presets.names("models")])
@pytest.mark.slow
def test_every_preset_is_shown_and_reads_back(name: str, tmp_path: Path, capfilt: Any) -> None:
    done = capfilt("show", name)
    assert done.code == 0, done.err
    assert all(line.startswith("note: not found on this machine") for line in done.err.splitlines())
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
        (["demo", "--set", "model.text.vocab_size=50"], "197 entries, [DEC] and [ENC] included, and model (blip) has"),
        (["demo", "--set", "model=blip/tiny", "--set", "model.text.vocab_size=50"], "model.text.vocab_size=197, or"),
        (["blip-tiny", "--set", "model.text.vocab_size=50"], "set model.text.vocab_size=197, or `tokenizer`"),
        (["demo", "--set", "model.text.depht=5"], "unknown key 'model.text.depht'. Did you mean 'depth'? Allowed"),
        (["demo", "--set", "model.vision.image_size=33"], "image_size 33 is not a multiple of patch_size 8"),
        (["demo", "--set", "pretrain.image_size=33"], "image_size 33 is not a multiple of patch_size 8"),
        (["demo", "--set", "model=[a]"], "'model' is ['a']: give the name of a preset, a .yaml file, or a section"),
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


# ---- a recipe that holds its architecture ----


def test_a_key_of_the_model_is_set_where_the_recipe_gives_its_name(capfilt: Any) -> None:
    done = capfilt("show", "demo", "--set", "model.text.vocab_size=300", "--json")
    tiny = read_tree(presets.find("models", "blip/tiny"), ArchitectureConfig)
    assert json.loads(done.out)["model"]["text"]["vocab_size"] == 300
    assert json.loads(done.out)["model"]["vision"]["width"] == tiny["vision"]["width"]


def test_a_recipe_s_architecture_is_that_of_a_yaml_that_extends_a_preset(tmp_path: Path, capfilt: Any) -> None:
    changes = "extends: blip/base-captioner\ntext: {vocab_size: 300}\n"
    (tmp_path / "model.yaml").write_text(changes)
    (tmp_path / "mine.yaml").write_text(f"extends: blip-coco-caption\nmodel: {{{', '.join(changes.splitlines())}}}\n")
    shown = capfilt("show", tmp_path / "model.yaml")
    assert shown.code == 0, shown.err
    assert yaml.safe_load(shown.out) == yaml.safe_load(capfilt("show", tmp_path / "mine.yaml").out)["model"]
    assert yaml.safe_load(shown.out)["text"]["roles"] == ["decoder"]


def test_a_stage_of_final_may_hold_its_architecture(tmp_path: Path, capfilt: Any) -> None:
    tree = read_tree(presets.find("pipelines", "bootstrap/blip2-tiny"), BootstrapConfig)
    del tree["select"]["recall"]  # of what it extends, where the threshold is calibrated
    tree["final"] = [{**stage, "model": {"extends": stage["model"], "projection": 32}} for stage in tree["final"]]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    shown = capfilt("show", tmp_path / "mine.yaml")
    assert shown.code == 0, shown.err
    assert [stage["model"]["projection"] for stage in yaml.safe_load(shown.out)["final"]] == [32, 32]
    tree["final"][0]["model"] |= {"text": {"vocab_size": 100}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    assert "set final.0.model.text.vocab_size=196, or `tokenizer`" in capfilt("show", tmp_path / "mine.yaml").line


@pytest.mark.parametrize(
    "name", ["bootstrap/demo", "bootstrap/blip2", "pretrain/blip-14m", "pretrain/blip2-tiny-stage2"]
)
def test_a_recipe_that_names_its_model_keeps_its_dump(name: str) -> None:
    """Plans and fingerprints of existing runs hold the name as it is written."""
    path, kind = presets.find("pipelines", name), KINDS[name.split("/")[0]]
    assert configs.read(path, kind).model_dump(mode="json")["model"] == read_tree(path, kind)["model"]


# ---- texts that a tokenizer cannot read ----


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Shards of pictures with texts of everyday English."""
    texts = ["a man walking his dog along the beach", "two children wait for the school bus in heavy rain"]
    samples = [Sample(f"{n:05d}", picture(), "png", text) for n, text in enumerate(texts * 4)]
    (tmp_path / "captions").mkdir()
    shards.write(tmp_path / "captions" / "00000.tar", samples)
    return tmp_path / "captions"


def picture() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    return data.getvalue()


def test_the_demo_s_vocabulary_on_real_texts_is_warned_of_with_the_share_that_it_spells(
    captions: Path, capfilt: Any
) -> None:
    done = capfilt("show", "demo", "--set", f"data={{web: {captions}, human: {captions}, val: shards/none}}")
    assert done.code == 0, done.err
    absent, web, human = done.err.splitlines()
    assert absent == "note: not found on this machine, so not checked: data.val"
    assert web.startswith("note: the tokenizer 'world' spells out 94% of the characters of data.web letter by letter")
    assert "of data.human letter by letter (8 texts): it has the words of the demo's world alone" in human
    assert "spells out" in capfilt("show", "blip-tiny", "--set", f"data={captions}").err


def test_a_length_that_cuts_the_texts_is_warned_of(captions: Path, tmp_path: Path, capfilt: Any) -> None:
    words = sorted(
        {word for url in shards.expand(str(captions)) for item in shards.read(url) for word in item.text.split()}
    )
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    sets = [f"data={captions}", f"tokenizer={tmp_path / 'vocab.txt'}", f"model.text.vocab_size={len(vocabulary) + 2}"]
    words = [word for each in sets for word in ("--set", each)]
    assert capfilt("show", "blip-tiny", *words).err == ""
    cut = capfilt("show", "blip-tiny", *words, "--set", "train.loader.max_length=11")
    assert cut.err == (
        "note: 50% of the texts of data.0 would be cut by train.loader.max_length 11; 95 % have 12 tokens at most.\n"
    )


def test_a_length_that_the_model_has_no_positions_for_is_warned_of(capfilt: Any) -> None:
    sets = ("--set", "captioner.loader.max_length=65", "--set", "annotate.decode.max_length=90")
    said = "note: the model has 64 positions, and a longer text ends the run: lower"
    done = capfilt("show", "demo", *sets)
    assert done.err == f"{said} captioner.loader.max_length 65, annotate.decode.max_length 90.\n"
    without = capfilt("show", "demo", *sets, "--set", "captioner.pretrained=some/model")
    assert without.err == "", "a pretrained captioner has positions of its own"
    assert said in capfilt("show", "blip-tiny", "--set", "train.loader.max_length=65").err


# ---- --explain ----


@pytest.mark.parametrize("name", ["bootstrap/blip2", "blip-14m", "blip2-ten", "blip2-two", "blip2/tiny-opt"])
def test_a_recipe_with_its_meanings_is_the_same_recipe(name: str, capfilt: Any) -> None:
    explained, plain = capfilt("show", name, "--explain"), capfilt("show", name)
    assert yaml.safe_load(explained.out) == yaml.safe_load(plain.out)
    assert max(map(len, explained.out.splitlines())) <= 120 or "settings:" in explained.out


def test_the_meaning_stands_above_the_key(capfilt: Any) -> None:
    lines = capfilt("show", "demo", "--explain").out.splitlines()
    at = lines.index("rounds: 2")
    assert lines[at - 1].endswith("[a whole number, 0 or more; default 2]")
    above = lines[lines.index("start: scratch") - 2 : lines.index("start: scratch")]
    assert " ".join(line.removeprefix("# ") for line in above).endswith("[scratch, continue; default scratch]")
    assert "  # Keys as in pretrain." in lines, "a section of a class that came before is not commented again"


def test_the_meanings_are_there_for_machines(capfilt: Any) -> None:
    keys = json.loads(capfilt("show", "blip2-tiny", "--explain", "--json").out)
    assert keys["pretrain.objectives.queue"] == {
        "value": 0,
        "meaning": "Features kept from earlier steps as negatives; a multiple of the global batch.",
        "allowed": "a whole number, 0 or more",
        "default": "57600",
    }
    assert keys["final.1.train.steps"]["value"] == 500
    assert "default" not in keys["final.1.train.steps"]


def test_a_key_that_dumps_leave_out_at_its_default_is_shown(capfilt: Any) -> None:
    class Recipe(Config):
        """A section that was extended."""

        old: int = 1
        """The old one."""
        new: int = configs.added(2, ge=0)
        """The new one."""

    assert "new" not in Recipe().model_dump()
    assert configs.full_tree(Recipe()) == {"old": 1, "new": 2}
    assert keys.explained(Recipe()).splitlines()[2:] == [
        "# The new one. [a whole number, 0 or more; default 2]",
        "new: 2",
    ]


def test_a_second_stage_that_does_not_say_its_smoothing_is_warned_of(tmp_path: Path) -> None:
    """LAVIS trains it without, and the default is that of BLIP."""
    recipe = tmp_path / "pretrain/mine.yaml"
    recipe.parent.mkdir()
    tree = "model: blip2/tiny-opt\ntokenizer: facebook/opt-125m\ninitial: {language: facebook/opt-125m}\ndata: shards\n"
    recipe.write_text(tree + "train: {steps: 3, objectives: {losses: {lm: 1.0}, queue: 0}}\n")
    warned = "train.objectives.smoothing is not given, and 0.1 applies"
    assert [note[: len(warned)] for note in show.notes(show.resolved(str(recipe), ()))][:1] == [warned]
    said = show.resolved(str(recipe), ("train.objectives.smoothing=0.0",))
    assert not any("smoothing" in note for note in show.notes(said))
