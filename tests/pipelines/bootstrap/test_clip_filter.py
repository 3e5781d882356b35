"""A CLIP as the filter of a round, beside a BLIP that captions: it gives itc alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from capfilt.models.checkpoints import store

WIDTH = {"width": 16, "depth": 1, "heads": 2, "hidden": 32}
FUSED = {
    "score": "fused",
    "fused": {"itc": 0.9, "entropy": 0.1},
    "normalise": "z-score",
    "conditions": [{"score": "side", "min": 1}],
}
BY_ITC = {"score": "itc", "threshold": "keep-rate", "keep_rate": 0.5}


def training(steps: int, **objectives: Any) -> dict[str, Any]:
    return {
        "steps": steps,
        "loader": {"batch_size": 16, "max_length": 24, "shuffle": 64},
        "objectives": {"task": "clip", **objectives},
        "optimizer": {"lr": 1e-3, "warmup": 0.1},
        "precision": "fp32",
        "log_every": 1,
    }


@pytest.fixture(scope="module")
def clip_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest CLIP there can be, whose pictures have another size and shape than BLIP's."""
    path = tmp_path_factory.mktemp("clip") / "mite.yaml"
    vision = {**WIDTH, "image_size": 24, "patch_size": 12}
    tree = {"family": "clip", "activation": "gelu", "vision": vision, "text": {**WIDTH, "vocab_size": 804}}
    path.write_text(yaml.safe_dump({**tree, "projection": 16}))
    return path


@pytest.fixture(scope="module")
def clip_filter(clip_yaml: Path) -> dict[str, Any]:
    return {"model": str(clip_yaml), "pretrain": training(3), **training(2)}


def test_a_round_with_a_clip_keeps_texts_by_itc_and_what_was_added_to_it(
    recipe: Any, capfilt: Any, clip_filter: dict[str, Any], tmp_path: Path
) -> None:
    """The policy sums its itc with a measure of the picture, which `annotate.scores` makes, and asks for another."""
    run = tmp_path / "run"
    path = recipe(tmp_path, filter=clip_filter, select=BY_ITC | FUSED)
    scores = ("--set", "annotate.scores=[entropy, side]")
    done = capfilt("bootstrap", path, "--out", run, *scores, "--json")
    assert done.code == 0, done.err
    trained = [store.architecture(run / f"round-1/{stage}/checkpoint") for stage in ("filter-pretrain", "filter")]
    assert {(one.family, one.image_size) for one in trained} == {("clip", 24)}
    assert store.architecture(run / "round-1/captioner/checkpoint").family == "blip"
    rows = [row for row in pq.read_table(run / "round-1/annotations").to_pylist() if row["status"] == "ok"]
    assert len(rows) > 60
    assert {row["source"] for row in rows} == {"web", "synthetic"}
    assert all(row["itm"] is None and -1 <= row["itc"] <= 1 for row in rows)
    assert {row["filter"] for row in rows} == {store.fingerprint(run / "round-1/filter/checkpoint")}
    said = capfilt("explain", run, rows[0]["key"]).out
    assert "scored by round-1/filter/checkpoint (clip-" in said
    assert f"itc {rows[0]['itc']:.4f}" in said
    assert "itm " not in said, "a score that it does not give"
    figures = json.loads(done.out)["rounds"][1]
    assert 0 <= figures["filter"]["auc"] <= 1
    assert 0 < sum(figures["kept"].values()) < len(rows)
    assert {term["score"] for term in figures["pool"]["fused"]} == {"itc", "entropy"}
    verdicts = [row for path in (run / "round-1/dataset").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert {row["why"] for row in verdicts} == {"", "fused below threshold"}
    assert min(row["fused"] for row in verdicts if not row["why"]) >= figures["filter"]["threshold"]
    assert all(row["side"] >= 1 and 0 <= row["entropy"] <= 8 for row in verdicts)
    again = capfilt("bootstrap", path, "--out", run, *scores, "--json")
    assert json.loads(again.out)["rounds"] == json.loads(done.out)["rounds"]


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (["select.score=itm"], "itm is needed, and"),
        (
            ["select.score=sieve"],
            "sieve is needed, and a round has itm, itc. Say how it is made: annotate.scores=[SPEC",
        ),
        (["select.score=sieve", "annotate.scores=[side]"], "sieve is needed, and a round has itm, itc, side."),
        (["select.rules.languages=[eng]"], "rules.languages has 'eng'. Did you mean 'en'?"),
        (["filter.objectives={queue: 0}"], "its objectives are not those with which the family clip is trained"),
        (["filter.objectives.gather_with_grad=false"], "set gather_with_grad=true, or local_loss=false"),
        (["filter.objectives.losses={itm: 1.0}"], "filter.objectives.losses"),
    ],
)
def test_what_a_clip_cannot_do_is_said_when_the_recipe_is_read(
    sets: list[str], why: str, recipe: Any, capfilt: Any, clip_filter: dict[str, Any], tmp_path: Path
) -> None:
    path = recipe(tmp_path, filter=clip_filter, select=BY_ITC)
    done = capfilt("show", path, *(word for assignment in sets for word in ("--set", assignment)))
    assert done.code == 2
    assert why in done.line
    assert "gives itc alone" in done.line or "itm is needed" not in done.line


def test_a_clip_cannot_be_the_captioner(recipe: Any, capfilt: Any, clip_filter: dict[str, Any], tmp_path: Path) -> None:
    done = capfilt("show", recipe(tmp_path, captioner=clip_filter))
    assert done.code == 2
    assert "cannot be the captioner: it cannot decode" in done.line


def test_rounds_may_pretrain_a_clip_beside_a_captioner_of_its_own(
    recipe: Any, capfilt: Any, model_yaml: Path, clip_yaml: Path, tmp_path: Path
) -> None:
    captioner = {"model": str(model_yaml), **training(2), "objectives": {"losses": {"lm": 1.0}}}
    sections = {"model": str(clip_yaml), "pretrain": training(3), "captioner": captioner, "filter": training(2)}
    done = capfilt("bootstrap", recipe(tmp_path, **sections, select=BY_ITC), "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    families = {role: store.architecture(tmp_path / f"run/round-1/{role}/checkpoint").family
                for role in ("pretrain", "captioner", "filter")}  # fmt: skip
    assert families == {"pretrain": "clip", "captioner": "blip", "filter": "clip"}
    figures = json.loads(done.out)["rounds"][1]
    assert figures["retrieval"].keys() >= {"tr@1", "ir@1"}
    assert "captioning" not in figures


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_clip_tiny_and_the_filter_of_the_recipe_reach_what_their_headers_say(capfilt: Any, tmp_path: Path) -> None:
    """A third of the recipe's steps: ten times guessing, and 0.85 over all kinds of wrong texts after fine-tuning."""
    from capfilt.data.synthetic import world

    size = world.WorldConfig(web=4000, human=400, val=200, test=250, noise=0.6, shard_size=250)
    for split in ("web", "human", "test"):
        world.write(size, 0, tmp_path, split)
    common = ("--set", "train.log_every=100", "--json")
    words = ("pretrain", "clip-tiny", "--set", f"data={tmp_path}/web", "--set", "train.steps=300")
    done = capfilt(*words, "--out", tmp_path / "one", *common)
    assert done.code == 0, done.err
    first = json.loads(done.out)["model"]
    figures = json.loads(capfilt("evaluate", first, tmp_path / "test", "--json").out)["retrieval"]
    assert min(figures["tr@1"], figures["ir@1"]) >= 10 * 100 / 250, figures
    sets = (f"data={tmp_path}/human", f"start={first}", "train.steps=150", "train.optimizer.lr=5e-4")
    words = ("pretrain", "clip-tiny", *(word for assignment in sets for word in ("--set", assignment)))
    done = capfilt(*words, "--out", tmp_path / "two", *common)
    assert done.code == 0, done.err
    asked = (
        "evaluate",
        json.loads(done.out)["model"],
        tmp_path / "web",
        "--set",
        "score=itc",
        "--set",
        "threshold=0.5",
    )
    assert json.loads(capfilt(*asked, "--json").out)["filter"]["auc"] >= 0.85
