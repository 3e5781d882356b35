"""What counts as a text, and where each comes from, through all stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capfilt.data import shards
from capfilt.data.sample import Sample


def models(story: Path) -> list[str]:
    return ["--captioner", str(story / "round-1/captioner"), "--filter", str(story / "round-1/filter")]


def result(done: Any) -> Any:
    assert done.code == 0, done.err
    return json.loads(done.out)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def samples_of(path: Path) -> list[Sample]:
    found = list(shards.read(str(path)))
    assert all(isinstance(item, Sample) for item in found)
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, picture: Any) -> Path:
    """40 pictures; every other one has no text, or a txt of punctuation."""
    texts = ["", "a red picture", "...", "a green one"]
    made = [Sample(f"{k:03d}", picture("PNG", seed=k), "png", texts[k % 4]) for k in range(40)]
    path = tmp_path_factory.mktemp("half") / "half.tar"
    shards.write(path, made)
    return path


@pytest.fixture(scope="module")
def annotated(half: Path, story: Path, capfilt: Any) -> Path:
    out = half.parent / "a"
    told = result(capfilt("annotate", half, *models(story), "--out", out, "--json"))
    assert told["texts"] == {
        "in": {"web": 40, "synthetic": 40},
        "kept": {"web": 20, "synthetic": 40},
        "dropped": {"web: no text": 20},
    }
    return out


def test_what_is_no_text_has_a_row_and_no_score(annotated: Path) -> None:
    rows = [row for row in rows_of(annotated / "annotations/half.parquet") if row["source"] == "web"]
    assert len(rows) == 40
    for row in rows:
        bare = row["text"] in ("", "...")
        assert (row["itm"] is None, row["itc"] is None) == (bare, bare)
        assert (row["status"], row["reason"]) == ("ok", "no text" if bare else "")


def test_a_share_of_the_texts_is_a_share_of_what_can_be_read(
    half: Path, annotated: Path, capfilt: Any, tmp_path: Path
) -> None:
    """24 of 60: 20 of the web, 40 written; 12 were kept while empty texts filled the quota."""
    words = ("--set", "threshold=keep-rate", "--set", "keep_rate=0.4")
    told = result(capfilt("select", half, "--annotations", annotated, "--out", tmp_path / "b", *words, "--json"))
    assert sum(told["texts"]["kept"].values()) == 24
    assert told["texts"]["in"] == {"web": 40, "synthetic": 40}
    assert told["texts"]["dropped"]["web: no text"] == 20
    judged = rows_of(tmp_path / "b/dataset/half.parquet")
    assert {row["why"] for row in judged if row["text"] in ("", "...")} == {"no text"}
    for sample in samples_of(tmp_path / "b/dataset/half.tar"):
        assert len(sample.text) > 3
    assert capfilt("verify", tmp_path / "b", address=None).code == 0
    report = result(capfilt("report", tmp_path / "b", "--json", address=None))
    assert report["texts"] == 60


def test_pictures_without_a_text_are_left_out_of_trainings_and_figures(
    half: Path, story: Path, capfilt: Any, tmp_path: Path, model_yaml: Path
) -> None:
    few = ("--set", "train.steps=2", "--set", "train.loader.batch_size=8", "--set", f"model={model_yaml}")
    words = ("pretrain", "blip-tiny", "--out", tmp_path / "p", *few, "--set", f"data={half}")
    done = capfilt(*words)
    assert done.code == 0, done.err
    assert "20 pictures have no text: they are not trained on" in done.err
    assert result(capfilt(*words, "--json"))["without_text"] == 20, "a rerun says so too"
    capfilt("report", tmp_path / "p", address=None)
    assert "20 pictures have no text: they were not trained on." in (tmp_path / "p/report.html").read_text()
    told = result(capfilt("evaluate", story / "round-1/pretrain", half, "--json"))
    assert told["without_text"] == 20
    assert told["retrieval"].keys() >= {"tr@1", "ir@1"}
