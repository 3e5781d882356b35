"""A captioner that is a vision-language model of transformers, taught on the human pairs once for all rounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capfilt import config as configs
from capfilt import presets
from capfilt.inference.captioners.vlm import folder
from capfilt.pipelines.bootstrap.config import BootstrapConfig, PretrainedConfig, TaughtConfig

Write = Callable[..., Path]
SHAPE = {"patch_size": 16, "width": 32, "vision_depth": 1, "text_depth": 1, "heads": 2, "vocabulary": 320}
SECTIONS = {
    "captioner": {"teach": {"shape": SHAPE, "steps": 3, "batch_size": 8, "precision": "fp32"}},
    "annotate": {"vlm": {"max_new_tokens": 8, "rules": []}, "max_length": 35, "precision": "fp32"},
}


@pytest.fixture(scope="module")
def run(recipe: Write, tmp_path_factory: pytest.TempPathFactory, capfilt: Any) -> Path:
    """Two rounds, their recipe beside the run folder."""
    home = tmp_path_factory.mktemp("taught")
    done = capfilt("bootstrap", recipe(home, **SECTIONS), "--rounds", 2, "--out", home / "run")
    assert done.code == 0, done.err
    assert sum("teach the captioner" in line and "1/1" in line for line in done.err.splitlines()) == 2
    assert "resumed" in next(line for line in reversed(done.err.splitlines()) if "teach the captioner" in line)
    return home / "run"


@pytest.mark.slow
def test_one_model_writes_for_every_round(run: Path, capfilt: Any) -> None:
    model = folder.fingerprint(run / "captioner")
    for r in (1, 2):
        assert not (run / f"round-{r}/captioner").exists()
        tables = [pq.read_table(path) for path in sorted((run / f"round-{r}/annotations").glob("*.parquet"))]
        written = [row for table in tables for row in table.to_pylist() if row["source"] == "synthetic"]
        assert len(written) == 60
        assert {(row["captioner"], row["prompt"], row["round"]) for row in written} == {(model, "ignore", r)}
    assert capfilt("verify", run).code == 0
    stages = json.loads(capfilt("status", run, "--json").out)["stages"]
    (stage,) = (stage for stage in stages if stage["label"] == "teach the captioner")
    assert (stage["folder"], stage["done"], stage["usage"]["cpu_seconds"]["busy"] > 0) == (".", 1, True)


@pytest.mark.slow
def test_a_teaching_that_was_killed_ends_with_the_same_bytes(run: Path, capfilt: Any) -> None:
    before = {path.name: path.read_bytes() for path in (run / "captioner").iterdir()}
    (run / "ledger/captioner/captioner.json").unlink()
    (run / "captioner/model.safetensors").write_bytes(b"cut")
    done = capfilt("bootstrap", run.parent / "mine.yaml", "--rounds", 2, "--out", run)
    assert done.code == 0, done.err
    assert {path.name: path.read_bytes() for path in (run / "captioner").iterdir()} == before
    assert "round 1 annotate         3/3 shards  0 s  60 images kept  resumed" not in done.err
    assert all("resumed" in line for line in done.err.splitlines() if "annotate  " in line)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"filter": SECTIONS["captioner"]}, "filter.teach: a vision-language model is no filter"),
        ({"annotate": {"decode": {"method": "beam"}}}, "decode.method is beam"),
        ({"captioner": {"teach": {"start": "/nowhere", "shape": {"width": 64}}}}, "give one of them"),
        ({"captioner": {"teach": {"shape": {"width": 30}}}}, "must be a multiple"),
        ({"captioner": {"teach": {}, "steps": 3}}, "steps"),
    ],
)
def test_what_does_not_fit_is_refused(
    recipe: Write, tmp_path: Path, capfilt: Any, sections: dict[str, Any], said: str
) -> None:
    done = capfilt("show", recipe(tmp_path, **{**SECTIONS, **sections}))
    assert done.code == 2
    assert said in done.err


def test_the_recipe_teaches_a_captioner_and_fine_tunes_a_filter() -> None:
    config = configs.read(presets.find("pipelines", "vlm-captioner", within="bootstrap"), BootstrapConfig)
    assert isinstance(config.captioner, TaughtConfig)
    assert config.trainings.keys() == {"pretrain", "filter"}


def test_an_endpoint_is_a_role_of_its_own_name(recipe: Write, tmp_path: Path) -> None:
    path = recipe(tmp_path, captioner={"endpoint": "http://127.0.0.1:8000/v1#some/model"}, annotate={})
    config = configs.read(path, BootstrapConfig)
    assert config.captioner == PretrainedConfig(pretrained="openai:http://127.0.0.1:8000/v1#some/model")
