"""A captioner or a filter that is a pretrained model instead of one that each round fine-tunes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from capfilt.models.checkpoints import store


def write_recipe(folder: Path, base: Path, **sections: Any) -> Path:
    """A recipe that extends `base`, which fine-tunes both roles."""
    path = folder / "pretrained.yaml"
    path.write_text(yaml.safe_dump({"extends": str(base), **sections}))
    return path


def rows(run: Path, r: int) -> list[dict[str, Any]]:
    files = sorted((run / f"round-{r}/annotations").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.fixture(scope="module")
def filter_model(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filter in a folder of its own."""
    return Path(
        shutil.copytree(finished_run / "round-1/filter/checkpoint", tmp_path_factory.mktemp("model") / "filter")
    )


@pytest.fixture(scope="module")
def run(finished_run: Path, filter_model: Path, tmp_path_factory: pytest.TempPathFactory, capfilt: Any) -> Path:
    """A finished bootstrap of two rounds with a pretrained filter and a fine-tuned captioner, its recipe beside it."""
    home = tmp_path_factory.mktemp("pretrained")
    sections = {"filter": {"pretrained": str(filter_model)}, "select": {"threshold": "calibrated"}}
    mine = write_recipe(home, finished_run.parent / "mine.yaml", **sections)
    done = capfilt("bootstrap", mine, "--rounds", 2, "--out", home / "run")
    assert done.code == 0, done.err
    return home / "run"


@pytest.mark.slow
def test_a_pretrained_filter_scores_every_round_untrained(run: Path, filter_model: Path, capfilt: Any) -> None:
    fingerprint = store.fingerprint(filter_model)
    captioners = {store.fingerprint(run / f"round-{r}/captioner/checkpoint") for r in (1, 2)}
    assert len(captioners) == 2
    for r in (1, 2):
        assert not (run / f"round-{r}/filter").exists()
        assert not (run / f"round-{r}/ledger/filter").exists()
        assert {row["filter"] for row in rows(run, r)} == {fingerprint}
    labels = [stage["label"] for stage in json.loads(capfilt("status", run, "--json").out)["stages"]]
    assert "round 1 captioner" in labels
    assert not {"round 1 filter", "round 2 filter"} & set(labels)
    thresholds = {json.loads((run / f"round-{r}/calibration.json").read_text())["threshold"] for r in (1, 2)}
    assert len(thresholds) == 1, "the same filter on the same validation pairs"


def test_plan_recipe_and_explain_name_it(run: Path, filter_model: Path, capfilt: Any) -> None:
    plan, fingerprint = json.loads((run / "plan.json").read_text()), store.fingerprint(filter_model)
    assert plan["filter"] == {"pretrained": fingerprint}
    assert plan["captioner"]["steps"] == 4
    assert "filter" not in plan["decided"]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["filter"] == {"pretrained": str(filter_model)}
    explained = json.loads(capfilt("explain", run, rows(run, 1)[0]["key"], "--json").out)
    assert explained["models"][fingerprint] == str(filter_model)
    assert capfilt("verify", run).code == 0
    assert (run / "report.html").is_file()
    assert capfilt("report", run).code == 0


def test_a_rerun_touches_nothing_even_where_run_and_model_were_moved(
    run: Path, filter_model: Path, tmp_path: Path, capfilt: Any, snapshot: Any
) -> None:
    moved, model = shutil.copytree(run, tmp_path / "run"), shutil.copytree(filter_model, tmp_path / "model")
    before = snapshot(moved)
    words = ("bootstrap", run.parent / "pretrained.yaml", "--rounds", 2, "--out", moved)
    done = capfilt(*words, "--set", f"filter.pretrained={model}", "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    assert {name for name, stat in snapshot(moved).items() if stat != before[name]} == {"recipe.yaml"}
    assert json.loads(done.out) == json.loads((run / "summary.json").read_text())


def test_what_is_gone_is_made_again_alike(run: Path, tmp_path: Path, capfilt: Any) -> None:
    moved = shutil.copytree(run, tmp_path / "run")
    for name in ("round-2/annotations/00001.parquet", "round-2/ledger/captioner/model.json"):
        (moved / name).unlink()
    done = capfilt("bootstrap", run.parent / "pretrained.yaml", "--rounds", 2, "--out", moved)
    assert done.code == 0, done.err
    for name in ("round-2/annotations/00001.parquet", "round-2/captioner/checkpoint/model.safetensors"):
        assert (moved / name).read_bytes() == (run / name).read_bytes()


def test_another_model_under_the_same_name_is_another_run(
    run: Path, finished_run: Path, filter_model: Path, capfilt: Any, snapshot: Any
) -> None:
    before = snapshot(run)
    done = capfilt(
        "bootstrap", run.parent / "pretrained.yaml", "--rounds", 2, "--out", run,
        "--set", f"filter.pretrained={finished_run / 'round-0/pretrain'}",
    )  # fmt: skip
    assert done.code == 1
    assert f'filter.pretrained: "{store.fingerprint(filter_model)}"'[:59] in done.line
    assert snapshot(run) == before


def test_a_fork_that_pins_the_fine_tuned_filter_takes_over_its_annotations(
    finished_run: Path, filter_model: Path, tmp_path: Path, capfilt: Any
) -> None:
    words = ("bootstrap", finished_run.parent / "mine.yaml", "--out", finished_run, "--fork", tmp_path / "new")
    done = capfilt(*words, "--set", f"filter.pretrained={filter_model}")
    assert done.code == 0, done.err
    assert all("resumed" in line for line in done.err.splitlines() if "/" in line), done.err
    for shard in ("00000", "00001", "00002"):
        name = f"round-1/dataset/{shard}.tar"
        assert (tmp_path / "new" / name).read_bytes() == (finished_run / name).read_bytes()


def test_with_both_roles_pretrained_the_model_needs_no_decoder(
    finished_run: Path, filter_model: Path, tmp_path: Path, capfilt: Any, model_yaml: Path
) -> None:
    tree = yaml.safe_load(model_yaml.read_text())
    tree["text"]["roles"] = ["encoder"]
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(tree))
    mine = write_recipe(
        tmp_path,
        finished_run.parent / "mine.yaml",
        model=str(tmp_path / "half.yaml"),
        captioner={"pretrained": str(finished_run / "round-1/captioner")},
        filter={"pretrained": str(filter_model)},
    )
    done = capfilt("bootstrap", mine, "--out", tmp_path / "run", "--set", "pretrain.objectives.losses={itc: 1, itm: 1}")
    assert done.code == 0, done.err
    made = {path.name for path in (tmp_path / "run/round-1").iterdir() if path.is_dir()}
    assert made == {"annotations", "dataset", "ledger", "pretrain"}
    entry = json.loads((tmp_path / "run/summary.json").read_text())["rounds"][1]
    assert "retrieval" in entry
    assert "captioning" not in entry


def test_a_pretrained_filter_may_read_pictures_of_another_size(
    finished_run: Path, filter_model: Path, tmp_path: Path, capfilt: Any
) -> None:
    large = Path(shutil.copytree(filter_model, tmp_path / "large"))
    store.save(store.load(filter_model, image_size=48), large)
    words = ("bootstrap", finished_run.parent / "mine.yaml", "--out", finished_run, "--fork", tmp_path / "new")
    done = capfilt(*words, "--set", f"filter.pretrained={large}")
    assert done.code == 0, done.err
    scored, before = rows(tmp_path / "new", 1), rows(finished_run, 1)
    assert {row["filter"] for row in scored} == {store.fingerprint(large)}
    assert [row["text"] for row in scored] == [row["text"] for row in before], "the captioner reads what it read"
    assert [row["itm"] for row in scored] != [row["itm"] for row in before]


@pytest.mark.parametrize(
    ("sets", "code", "message"),
    [
        (["filter.pretrained=FOLDER/round-1/captioner"], 2, "cannot be the filter: it cannot encode_text. "),
        (["captioner.pretrained=FOLDER/round-1/filter"], 2, "cannot be the captioner: it cannot decode"),
        (["filter.pretrained=FOLDER/data"], 2, "data is no model; what can be read"),
        (["filter.pretrained=FOLDER/round-0", "filter.steps=4"], 2, "unknown key 'filter.steps'. Allowed here: pretr"),
        (["filter={pretrained: m, steps: 4}"], 2, "unknown key 'filter.steps'. Allowed here: pretrained."),
        (["captioner.stepz=4"], 2, "unknown key 'captioner.stepz'. Did you mean 'steps'?"),
        (["captioner={loader: {}}"], 2, "key 'captioner.steps' is missing"),
        (["captioner.steps=none"], 2, "'captioner.steps' is 'none': Input should be a valid integer"),
        (
            [
                "captioner.pretrained=FOLDER/round-1/captioner",
                "annotate.decode={prompt: a red b, max_length: 4, min_length: 1}",
            ],
            2,
            "decode.prompt has",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_a_run_is_opened(
    finished_run: Path, tmp_path: Path, capfilt: Any, sets: list[str], code: int, message: str
) -> None:
    words = [word for text in sets for word in ("--set", text.replace("FOLDER", str(finished_run)))]
    done = capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", tmp_path / "run", *words)
    assert (done.code, message in done.line) == (code, True), done.err
    assert not (tmp_path / "run/plan.json").exists()


def test_show_does_not_look_for_the_model(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    mine = write_recipe(
        tmp_path, finished_run.parent / "mine.yaml", filter={"pretrained": "Salesforce/blip-itm-base-coco"}
    )
    done = capfilt("show", mine)
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["filter"] == {"pretrained": "Salesforce/blip-itm-base-coco"}
    (tmp_path / "again.yaml").write_text(done.out)
    assert capfilt("show", tmp_path / "again.yaml").out == done.out
    back = write_recipe(tmp_path, tmp_path / "again.yaml", filter={"steps": 7, "objectives": {"losses": {"itc": 1}}})
    assert yaml.safe_load(capfilt("show", back).out)["filter"]["steps"] == 7
