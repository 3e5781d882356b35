"""A captioner or a filter of another architecture than what the rounds pretrain: an ALBEF beside a BLIP, and the other
way round."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_run import LOSSES, WIDTH, training

from capfilt.models.checkpoints import store

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def albef_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest ALBEF there can be."""
    text = {**WIDTH, "depth": 2, "fusion_layer": 1, "vocab_size": 195, "max_positions": 64, "dropout": 0.0}
    path = tmp_path_factory.mktemp("albef") / "albef-mite.yaml"
    vision = {**WIDTH, "image_size": 32, "patch_size": 16}
    path.write_text(yaml.safe_dump({"family": "albef", "vision": vision, "text": text, "projection": 16}))
    return path


def albef_training(**losses: float) -> dict[str, Any]:
    tree = training(**losses)
    return {**tree, "objectives": {"task": "albef", **tree["objectives"]}}


@pytest.fixture(scope="module")
def run(recipe: Write, albef_yaml: Path, tmp_path_factory: pytest.TempPathFactory, capfilt: Any) -> Path:
    """Two rounds with an ALBEF as the filter, pretrained in each, and fine-tuned with the momentum copy of that."""
    home = tmp_path_factory.mktemp("separate")
    section = {**albef_training(**LOSSES["filter"]), "model": str(albef_yaml)}
    section["objectives"]["momentum_from"] = "start"
    section["pretrain"] = {**albef_training(), "keep_momentum": True}
    done = capfilt("bootstrap", recipe(home, filter=section), "--rounds", 2, "--out", home / "run")
    assert done.code == 0, done.err
    return home / "run"


@pytest.mark.slow
def test_an_albef_filters_what_a_blip_writes(run: Path, capfilt: Any) -> None:
    families = {
        name: store.architecture(run / f"round-1/{name}/checkpoint").family
        for name in ("captioner", "filter-pretrain", "filter", "pretrain")
    }
    assert families == {"captioner": "blip", "filter-pretrain": "albef", "filter": "albef", "pretrain": "blip"}
    assert "unmask" in store.architecture(run / "round-1/filter-pretrain/checkpoint").capabilities
    assert "unmask" not in store.architecture(run / "round-1/filter/checkpoint").capabilities
    stages = [stage["label"] for stage in json.loads(capfilt("status", run, "--json").out)["stages"]]
    first = [f"round 1 {name}" for name in ("captioner", "filter-pretrain", "filter", "annotate", "select", "pretrain")]
    assert [label for label in stages if label in first] == first
    assert (run / "round-1/filter-pretrain/checkpoint" / store.MOMENTUM).is_file()
    assert not (run / "round-1/filter/checkpoint" / store.MOMENTUM).exists()
    assert capfilt("verify", run).code == 0
    assert "filter-pretrain" in (run / "report.html").read_text()


def test_it_is_pretrained_on_what_the_round_before_left(run: Path) -> None:
    rows = {r: json.loads((run / f"round-{r}/filter-pretrain/log.jsonl").read_text().splitlines()[0]) for r in (1, 2)}
    assert {"itc", "itm", "mlm"} <= rows[1].keys()
    assert rows[1]["mlm"] != rows[2]["mlm"]
    models = {store.fingerprint(run / f"round-{r}/filter-pretrain/checkpoint") for r in (1, 2)}
    assert len(models) == 2


def test_plan_and_recipe_name_it_and_a_rerun_touches_nothing(run: Path, capfilt: Any, snapshot: Any) -> None:
    plan = json.loads((run / "plan.json").read_text())
    assert plan["filter"]["architecture"]["family"] == "albef"
    assert plan["filter"]["pretrain"]["objectives"]["losses"] == {"itc": 1, "itm": 1, "mlm": 1}
    assert {"filter", "filter-pretrain"} <= plan["decided"].keys()
    before = snapshot(run)
    again = capfilt("bootstrap", run / "recipe.yaml", "--rounds", 2, "--out", run)
    assert again.code == 0, again.err
    assert snapshot(run) == before


def test_what_a_kill_took_is_made_again_alike(run: Path, tmp_path: Path, capfilt: Any) -> None:
    moved = shutil.copytree(run, tmp_path / "run")
    (moved / "round-2/ledger/filter-pretrain/model.json").unlink()
    done = capfilt("bootstrap", run / "recipe.yaml", "--rounds", 2, "--out", moved)
    assert done.code == 0, done.err
    for name in ("filter-pretrain", "filter", "pretrain"):
        tensors = f"round-2/{name}/checkpoint/model.safetensors"
        assert (moved / tensors).read_bytes() == (run / tensors).read_bytes()


def test_the_rounds_pretrain_an_albef_and_a_blip_writes(
    recipe: Write, albef_yaml: Path, model_yaml: Path, finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    start = finished_run / "round-0/pretrain/checkpoint"
    mine = recipe(
        tmp_path,
        model=str(albef_yaml),
        pretrain=albef_training(),
        captioner={**training(lm=1.0), "model": str(model_yaml), "start": str(start)},
        filter=albef_training(**LOSSES["filter"]),
    )
    done = capfilt("bootstrap", mine, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert not (tmp_path / "run/round-1/captioner-pretrain").exists()
    entry = json.loads((tmp_path / "run/summary.json").read_text())["rounds"][1]
    assert "retrieval" in entry
    assert "captioning" not in entry
    assert json.loads((tmp_path / "run/plan.json").read_text())["captioner"]["start"] == store.fingerprint(start)


ALBEF = "filter.model=ALBEF"
TASK = "filter.objectives={task: albef, losses: {itc: 1, itm: 1}, queue: 0}"


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([ALBEF], "filter: its objectives are not those with which the family albef is trained: set objectives.task"),
        (
            ["captioner.model=ALBEF"],
            "albef-mite.yaml (captioner.model) cannot be the captioner: it cannot decode; give",
        ),
        (["filter.model=clip/tiny", "filter.objectives.task=clip"], "clip/tiny (filter.model) gives itc alone"),
        ([ALBEF, TASK, "filter.start=a", "filter.initial.vision=b"], "start and initial both say"),
        ([ALBEF, TASK, "filter.initial.language=b"], "has no language model: leave it out."),
        ([ALBEF, TASK, "filter.start=FOLDER/round-0/pretrain"], "is of the family blip, and `filter.model` of albef"),
        ([ALBEF, TASK, "filter.pretrain={steps: 1}"], "filter.pretrain: its objectives are not those"),
        (["filter.model=MODEL", "filter.objectives.momentum_from=start"], "and there is none: give filter.start."),
        (
            ["filter.model=MODEL", "filter.objectives.momentum_from=start", "filter.pretrain={steps: 1}"],
            "set filter.pretrain.keep_momentum=true",
        ),
        ([ALBEF, TASK, "filter.tokenizer=FOLDER/no"], "no vocabulary at"),
        (["model=ALBEF", "pretrain.objectives.task=albef", "filter.objectives.task=albef"], "give captioner.model, an"),
    ],
)
def test_what_cannot_play_a_role_says_so_before_round_0(
    finished_run: Path, albef_yaml: Path, model_yaml: Path, tmp_path: Path, capfilt: Any, sets: list[str], message: str
) -> None:
    places = {"FOLDER": str(finished_run), "ALBEF": str(albef_yaml), "MODEL": str(model_yaml)}
    words: list[str] = []
    for text in sets:
        for name, place in places.items():
            text = text.replace(name, place)
        words += ["--set", text]
    done = capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", tmp_path / "run", *words)
    assert done.code in (1, 2)
    assert message in done.line, done.err
    assert not (tmp_path / "run/plan.json").exists()
