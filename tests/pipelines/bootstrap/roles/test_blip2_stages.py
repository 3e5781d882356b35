"""A bootstrap whose last round pretrains a BLIP-2 in its two stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from capfilt.models.checkpoints import store
from capfilt.pipelines.bootstrap.roles.blip2_stages import merge_figures

WIDTH = {"width": 16, "depth": 1, "heads": 2, "hidden": 32, "init_std": 0.25}
OPT = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


def training(model: Path, losses: dict[str, float], **more: Any) -> dict[str, Any]:
    train = {
        "steps": 4,
        "features": True,
        "loader": {"batch_size": 16, "max_length": 24, "shuffle": 64, "captions": "one"},
        "objectives": {"queue": 0, "losses": losses},
        "optimizer": {"lr": 1e-3, "warmup": 0.1},
        "precision": "fp32",
        "log_every": 1,
    }
    return {"model": str(model), "train": train, **more}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The smallest BLIP-2 there can be, with the vision tower of the smallest BLIP."""
    home = tmp_path_factory.mktemp("blip2")
    vision = {**WIDTH, "image_size": 32, "patch_size": 16, "final_norm": False}
    text = {**WIDTH, "vocab_size": 196, "queries": 2, "max_positions": 64, "dropout": 0.0}
    tree = {"family": "blip2", "vision": vision, "text": text, "projection": 16, "frozen": "fp32"}
    (home / "one.yaml").write_text(yaml.safe_dump(tree))
    language = {"kind": "opt", "settings": OPT}
    (home / "two.yaml").write_text(yaml.safe_dump({**tree, "text": {**text, "roles": []}, "language": language}))
    return [
        training(home / "one.yaml", {"itc": 1.0, "itm": 1.0, "lm": 1.0}),
        training(home / "two.yaml", {"lm": 1.0}, language={"steps": 3, "batch_size": 4}),
    ]


@pytest.fixture(scope="module")
def blip2_run(tmp_path_factory: pytest.TempPathFactory, recipe: Any, stages: Any, capfilt: Any) -> Path:
    """A finished run, its recipe beside it; with BLIP-2's choice of texts."""
    home = tmp_path_factory.mktemp("final")
    chosen = {"annotate": {"captions": 3, "decode": {"max_length": 12}, "precision": "fp32"}, "select": {"top_k": 2}}
    done = capfilt("bootstrap", recipe(home, final=stages, **chosen), "--out", home / "run")
    assert done.code == 0, done.err
    (home / "printed.txt").write_text(done.out)
    return home / "run"


def summary(run: Path) -> dict[str, Any]:
    actual: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return actual


@pytest.mark.slow
def test_the_last_round_is_a_blip2_with_the_vision_tower_of_the_newest_blip(blip2_run: Path) -> None:
    assert not (blip2_run / "round-1/pretrain").exists()
    first = store.read(blip2_run / "round-0/pretrain/checkpoint")[1]
    for stage in ("stage-1", "stage-2"):
        own, tensors = store.read(blip2_run / "round-1" / stage / "checkpoint")
        assert own.family == "blip2"
        assert (own.language is not None) == (stage == "stage-2")
        vision = [name for name in tensors if name.startswith("vision.")]
        assert len(vision) > 10
        assert all(tensors[name].equal(first[name]) for name in vision)


def test_its_figures_are_of_both_stages(blip2_run: Path) -> None:
    first, last = summary(blip2_run)["rounds"]
    assert "stages" not in first
    one, two = last["stages"]["stage-1"], last["stages"]["stage-2"]
    assert last["retrieval"] == one["retrieval"]
    assert "retrieval" not in two
    assert last["captioning"] == two["captioning"]
    assert "cider" in one["captioning"]
    assert two["model"].endswith("two.yaml")


def test_no_image_has_more_than_its_two_best_texts(blip2_run: Path) -> None:
    last = summary(blip2_run)["rounds"][1]
    assert last["samples_in"] == 60
    assert 60 < sum(last["kept"].values()) <= 120
    assert last["kept"]["synthetic"] + last["kept"]["web"] + sum(last["dropped"].values()) == 4 * 60
    assert set(last["dropped"]) <= {
        f"{source}: {why}"
        for source in ("web", "synthetic")
        for why in ("not among the 2 best by itc", "same text as a better one", "no text")
    }


def test_terminal_status_and_report_show_both_stages(blip2_run: Path, capfilt: Any) -> None:
    printed = (blip2_run.parent / "printed.txt").read_text()
    assert "Round 1, stage 1 (" in printed
    assert "Round 1, stage 2 (" in printed
    assert "round-1/stage-2/checkpoint --as hf" in printed
    status = capfilt("status", blip2_run, "--json")
    labels = [stage["label"] for stage in json.loads(status.out)["stages"]]
    expected = ["round 1 select", "round 1 language", "round 1 stage 1", "round 1 stage 2", "round 1 evaluate"]
    assert [label for label in labels if label in expected] == expected
    page = (blip2_run / "report.html").read_text()
    assert "Round 1, stage 2 (" in page
    assert "stage-2: lm" in page


def test_a_rerun_touches_nothing_even_where_the_folder_was_moved(
    blip2_run: Path, tmp_path: Path, capfilt: Any, snapshot: Any
) -> None:
    run_copy = Path(shutil.copytree(blip2_run, tmp_path / "run"))
    before = snapshot(run_copy)
    done = capfilt("bootstrap", blip2_run.parent / "mine.yaml", "--out", run_copy, "--json")
    assert done.code == 0, done.err
    assert snapshot(run_copy) == before
    assert done.err == ""


@pytest.mark.slow
def test_with_one_more_round_the_former_last_one_pretrains_a_blip_again(
    blip2_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    run_copy = Path(shutil.copytree(blip2_run, tmp_path / "run"))
    done = capfilt("bootstrap", blip2_run.parent / "mine.yaml", "--out", run_copy, "--rounds", 2)
    assert done.code == 0, done.err
    _, second, third = summary(run_copy)["rounds"]
    assert "stages" not in second
    assert set(third["stages"]) == {"stage-1", "stage-2"}
    assert store.architecture(run_copy / "round-1/pretrain/checkpoint").family == "blip"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("final.1.language", "null"), "has a frozen language model: say which with `language`"),
        (("final.0.language", "facebook/opt-125m"), "`language` is given, and the model has none"),
        (("final.1.vision", "eva_vit_g.pth"), "vision and text are of final.0"),
        (("final.0.model", "blip/tiny"), "a stage is a BLIP-2, and this is of the family blip"),
        (
            ("final.0.model", "blip2/pretrain"),
            "whose vision tower it takes unless `vision` is given, has vision.width 16",
        ),
        (("final.1.model", "blip2/tiny-opt"), "final.0 has vision.width 16, and final.1 (blip2/tiny-opt) 64"),
        (("final.1.model", "blip2/flan-t5-xl"), "a language model that is trained here is an OPT, and this is a T5"),
        (("final.0.train.objectives.queue", "64"), "BLIP-2 has no queue"),
    ],
)
def test_stages_that_do_not_fit_are_refused_when_the_recipe_is_read(
    tmp_path: Path, recipe: Any, stages: Any, capfilt: Any, change: tuple[str, str], message: str
) -> None:
    tree = json.loads(json.dumps(stages))
    _, number, *keys = change[0].split(".")
    place = tree[int(number)]
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = yaml.safe_load(change[1])
    done = capfilt("bootstrap", recipe(tmp_path, final=tree), "--out", tmp_path / "run")
    assert done.code == 2, done.err
    assert message in done.line


@pytest.mark.parametrize(
    "change", [("final.0.vision", "eva_vit_g.pth"), ("final.1.language", "/models/opt"), ("initial.text", "bert")]
)
def test_a_missing_checkpoint_of_the_last_stage_is_refused_at_the_start(
    tmp_path: Path, recipe: Any, stages: Any, capfilt: Any, change: tuple[str, str]
) -> None:
    key, _, last = change[0].rpartition(".")
    tree = json.loads(json.dumps(stages))
    given = {"final": tree} if key != "initial" else {"final": tree, "initial": {last: change[1]}}
    if key != "initial":
        tree[int(key[-1])][last] = change[1]
    done = capfilt("bootstrap", recipe(tmp_path, **given), "--out", tmp_path / "run")
    assert done.code == 2, done.err
    assert done.line.startswith(f"error: {change[1]}: no such file or folder")
    assert not (tmp_path / "run").exists()


def test_merge_figures_takes_each_kind_from_the_last_stage_that_has_it() -> None:
    one, two = {"retrieval": {"tr@1": 1.0}, "captioning": {"cider": 2.0}}, {"captioning": {"cider": 3.0}}
    actual = merge_figures({"stage-1": one, "stage-2": two}, ["a", "b"])
    assert actual["retrieval"] == one["retrieval"]
    assert actual["captioning"] == two["captioning"]
    assert actual["stages"] == {"stage-1": {"model": "a", **one}, "stage-2": {"model": "b", **two}}
