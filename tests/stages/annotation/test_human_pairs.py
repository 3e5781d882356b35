"""A filter before human pairs and shuffled ones, where nobody knows which web texts are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.errors import DataError
from capfilt.evaluation import evaluate
from capfilt.evaluation.eval_set import encode_pairs
from capfilt.evaluation.known_truth import says_truth
from capfilt.inference.filters import local_filter
from capfilt.inference.local_model import LocalModel
from capfilt.models.checkpoints import store

CPU = torch.device("cpu")


def pairs_of(run: Path) -> list[str]:
    return sorted(str(path) for path in (run / "data/val").glob("*.tar"))


def words(run: Path) -> list[str]:
    models = ("--captioner", run / "round-1/captioner", "--filter", run / "round-1/filter")
    return [str(run / "data/web"), *map(str, models), "--set", "decode.max_length=12"]


def filter_of(run: Path) -> Any:
    return local_filter(LocalModel.load(store.find(str(run / "round-1/filter")), CPU))


def test_the_auc_is_that_of_a_calibration_on_the_same_pairs(colours: Path) -> None:
    filter_ = filter_of(colours)
    pairs = encode_pairs(filter_.local, [str(colours.parent / "val/00000.tar")], 8, CPU)
    figures = evaluate.human_pairs(filter_, pairs, 8)
    assert (figures["images"], figures["texts"]) == (32, 32)
    assert figures == evaluate.human_pairs(filter_, pairs, 8)
    calibration = json.loads((colours / "round-1/calibration.json").read_text())
    assert set(figures["auc"]) == {"itm", "itc"}
    assert figures["auc"][calibration["score"]] == pytest.approx(calibration["auc"], abs=1e-3)  # other batches
    assert figures["auc"][calibration["score"]] > 0.6
    wrong = evaluate.shuffled(pairs)
    assert sorted(map(str, wrong)) == sorted(map(str, pairs.texts))
    assert all(mine is not other for mine, other in zip(pairs.texts, wrong, strict=True))


def test_one_image_cannot_be_shuffled(finished_run: Path) -> None:
    filter_ = filter_of(finished_run)
    pairs = encode_pairs(filter_.local, pairs_of(finished_run)[:1], 8, CPU)
    one = replace(pairs, tokens=pairs.tokens[:1], uids=pairs.uids[:1], texts=pairs.texts[:1])
    with pytest.raises(DataError, match="cannot be shuffled"):
        evaluate.human_pairs(filter_, one, 8)


def test_annotate_measures_its_filter_also_afterwards(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    out, val = tmp_path / "a", finished_run / "data/val"
    assert capfilt("annotate", *words(finished_run), "--out", out).code == 0
    assert not (out / "human_pairs.json").exists(), "what was not measured is absent"
    plan, table = (out / "plan.json").read_bytes(), next((out / "annotations").glob("*.parquet"))
    before = table.stat()
    done = capfilt("annotate", *words(finished_run), "--out", out, "--val", val, "--json")
    assert done.code == 0, done.err
    figures = json.loads((out / "human_pairs.json").read_text())
    assert json.loads(done.out)["human_pairs"] == figures
    assert (out / "plan.json").read_bytes() == plan
    assert table.stat().st_mtime_ns == before.st_mtime_ns, "nothing is annotated again"
    assert capfilt("verify", out).code == 0
    page = tmp_path / "page.html"
    assert capfilt("report", out, "--out", page).code == 0
    html = page.read_text("utf-8")
    for score, area in figures["auc"].items():
        assert f"<b>AUC of {score}, human pairs</b><strong>{area:.3f}</strong>" in html


def test_a_malformed_record_is_refused_in_one_line(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    out = tmp_path / "a"
    assert capfilt("annotate", *words(finished_run), "--out", out).code == 0
    for auc in ("[]", '{"itm": "high"}', "null"):
        (out / "human_pairs.json").write_text(f'{{"auc": {auc}}}')
        done = capfilt("report", out)
        assert done.code == 1
        assert "human_pairs.json has an `auc` that is not a number" in done.line


def test_a_bootstrap_on_real_data_measures_each_round(
    finished_run: Path, tmp_path: Path, recipe: Any, capfilt: Any
) -> None:
    """Where the web's truth is not known, and the threshold is not calibrated, which would have measured it."""
    for split in ("web", "human", "val", "test"):
        for path in (finished_run / "data" / split).glob("*.tar"):
            samples = [item for item in shards.read(str(path)) if isinstance(item, Sample)]
            bare = [replace(s, meta={k: v for k, v in s.meta.items() if k != "truth"}) for s in samples]
            shards.write(tmp_path / split / path.name, bare)
    assert says_truth(str(next((finished_run / "data/web").glob("*.tar"))))
    assert not says_truth(str(next((tmp_path / "web").glob("*.tar"))))
    data = {split: str(tmp_path / split) for split in ("web", "human", "val", "test")}
    done = capfilt("bootstrap", recipe(tmp_path, data=data), "--out", tmp_path / "run")
    assert done.code == 0, done.err
    _, entry = json.loads((tmp_path / "run/summary.json").read_text())["rounds"]
    assert entry["human_pairs"] == json.loads((tmp_path / "run/round-1/human_pairs.json").read_text())
    assert "auc" not in entry["filter"]
    html = (tmp_path / "run/report.html").read_text("utf-8")
    assert "<b>Filter&#39;s AUC</b>" in html
    assert '<th scope="col">AUC, human pairs</th>' in html
    assert not (finished_run / "round-1/human_pairs.json").exists(), "where the truth is known it says more"
