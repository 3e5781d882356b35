from __future__ import annotations

import json
import math
import shutil
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import capfilt as api
from capfilt.cluster.session import num_threads
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.pipelines.estimate import sample, verb


def roles(run: Path) -> dict[str, Path]:
    return {role: run / "round-1" / role for role in ("captioner", "filter")}


SETTINGS = {"decode.max_length": 12, "decode.min_length": 3, "batch_size": 8}


@pytest.fixture(scope="module")
def estimated(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("estimate") / "e"
    options: dict[str, Any] = {"settings": SETTINGS, "keep_rate": 0.5, "price": "cpu=1.0", "address": "local"}
    return api.estimate(finished_run / "data/web", out=out, **roles(finished_run), sample=40, workers=3, **options)


def test_every_figure_is_there_with_its_ends(estimated: Any) -> None:
    figures = estimated.figures
    assert {"samples", "kept_images", "failed", "kept_texts.web", "noise_ratio.synthetic", "hours", "usd"} <= set(
        figures
    )
    assert figures["samples"] == {"value": 60, "low": 60, "high": 60}
    assert estimated.record["drawn"] == {"drawn": 40, "shards_read": 3, "shards": 3, "seed": 0}
    for name in ("kept_images", "kept_texts.web", "failed", "images_per_second_per_worker.annotate"):
        assert figures[name]["low"] <= figures[name]["value"] <= figures[name].get("high", math.inf), name
    assert figures["failed"]["value"] == 0
    kept = figures["kept_texts.web"]["value"]
    assert figures["noise_ratio.web"]["value"] == pytest.approx(1 - kept)
    hourly = 3 * num_threads()
    assert figures["usd"]["value"] == pytest.approx(hourly * figures["hours"]["value"], rel=1e-3), "three such workers"
    assert figures["bytes_out"]["value"] > 0
    assert json.loads((estimated.out / "estimate.json").read_text()) == estimated.record
    assert b"<html" in estimated.report.read_bytes()


def test_the_sample_keeps_what_the_whole_keeps(estimated: Any, finished_run: Path, tmp_path: Path) -> None:
    """A picture of the sample has the texts, the scores and the verdict that it has in the run itself."""
    data, at_half = finished_run / "data/web", {"threshold": 0.4, "address": "local"}
    whole = api.annotate(data, out=tmp_path / "a", **roles(finished_run), settings=SETTINGS, address="local")
    done = api.select(data, annotations=whole, out=tmp_path / "s", **at_half)
    every = api.estimate(data, out=tmp_path / "e", **roles(finished_run), sample=60, settings=SETTINGS, **at_half)
    share = done.samples.kept / done.samples.num_in
    assert every.figures["kept_images"] == pytest.approx({"value": share, "low": share, "high": share}, rel=1e-4)
    scores = {(row.uid, row.source): (row.text, row.itm) for row in whole.rows()}
    drawn = api.read_annotations(estimated.out / "annotated")
    rows = {(row.uid, row.source): (row.text, row.itm) for row in drawn}
    assert rows.keys() < scores.keys()
    for key, (text, itm) in rows.items():
        assert scores[key][0] == text
        assert scores[key][1] == pytest.approx(itm, abs=1e-4)


def test_the_same_call_goes_on_and_another_is_refused(estimated: Any, finished_run: Path) -> None:
    data, again = finished_run / "data/web", {"settings": SETTINGS, "keep_rate": 0.5, "address": "local"}
    same = api.estimate(data, out=estimated.out, **roles(finished_run), sample=40, workers=3, price="cpu=1.0", **again)
    assert same.record == estimated.record
    with pytest.raises(api.RunError, match="other data, sample or seed"):
        api.estimate(data, out=estimated.out, **roles(finished_run), sample=40, seed=1, **again)


def test_a_recipe_names_its_data_and_its_models(finished_run: Path, recipe: Any, tmp_path: Path, capfilt: Any) -> None:
    data = {split: str(finished_run / "data" / split) for split in ("web", "human")}
    trained = recipe(tmp_path, data=data)
    done = capfilt("estimate", trained, "--out", tmp_path / "e")
    assert (done.code, done.line[:6]) == (2, "error:")
    assert "trains its captioner, which is not there yet: give --captioner" in done.line
    models = {role: {"pretrained": str(folder)} for role, folder in roles(finished_run).items()}
    done = capfilt("estimate", recipe(tmp_path, data=data, **models), "--out", tmp_path / "e", "--sample", "16")
    assert done.code == 0, done.err
    assert "16 samples drawn from 3 of 3 shards (seed 0)" in done.out
    assert "samples                                60 (exactly)" in done.out
    done = capfilt("estimate", trained, "--out", tmp_path / "f", "--keep-rate", "0.5")
    assert done.line.endswith("which says this itself: leave out --keep-rate.")
    assert capfilt("estimate", "demo", "--out", tmp_path / "f", "--captioner", "c", "--filter", "f").code == 2
    assert not (tmp_path / "f").exists()


def test_what_cannot_be_read_is_counted_and_same_keys_do_not_collide(
    finished_run: Path, tmp_path: Path, picture: Any, monkeypatch: Any
) -> None:
    """Shards of one's own making, in which every shard has the same keys; and only some of them are read."""
    monkeypatch.setattr(verb, "MAX_SHARDS", 4)
    for shard in range(6):
        images = [picture("PNG", seed=10 * shard + number) for number in range(5)] + [b"no picture"]
        made = [Sample(f"{number:03d}", image, "png", "red", {}) for number, image in enumerate(images)]
        shards.write(tmp_path / "web" / f"{shard:05d}.tar", made)
    result = api.estimate(
        tmp_path / "web", out=tmp_path / "e", **roles(finished_run), sample=18, settings=SETTINGS, threshold="none",
        address="local",
    )  # fmt: skip
    record = json.loads((tmp_path / "e/sample.json").read_text())
    assert len(record["clusters"]) == 18
    assert len(set(record["clusters"].values())) == 4
    rows = list(sample.verdicts(tmp_path / "e", record))
    share = sum(row.failed for row in rows) / 18
    assert result.figures["failed"]["value"] == pytest.approx(share, rel=1e-4)
    assert share > 0
    assert result.figures["samples"]["value"] == pytest.approx(36, rel=0.01)
    assert result.record["drawn"]["shards_read"] == 4


def test_clicks_end_the_review_and_give_precision_and_recall(estimated: Any, tmp_path: Path, monkeypatch: Any) -> None:
    out = Path(shutil.copytree(estimated.out, tmp_path / "e"))
    monkeypatch.setattr(verb, "CLICKS", 6)

    def person(url: str) -> None:
        home, _, token = url.partition("?")
        headers = {"Content-Type": "application/json", "Origin": home.rstrip("/")}
        for row in range(6):
            label = {"look": 0, "row": row, "verdict": "right" if row % 2 else "wrong", "at_random": True}
            request = urllib.request.Request(f"{home}labels?{token}", json.dumps(label).encode(), headers)
            assert urllib.request.urlopen(request, timeout=20).status == 200

    figures = verb.clicks(out, lambda url: threading.Thread(target=person, args=[url], daemon=True).start())
    assert (figures["labels"], figures["right"]) == (6, 3)
    assert 0 <= figures["recall_interval"][0] <= figures["recall"] <= figures["recall_interval"][1] <= 1


def test_a_picture_that_came_without_a_text_is_no_noise(tmp_path: Path) -> None:
    columns = {
        "key": ["a", "a", "b", "b"], "source": ["web", "synthetic"] * 2, "verdict": ["dropped", "kept"] * 2,
        "why": ["no text", "", "itm below threshold", ""],
    }  # fmt: skip
    (tmp_path / "clean/dataset").mkdir(parents=True)
    pq.write_table(pa.table(columns), tmp_path / "clean/dataset/00000.parquet")
    rows = sample.verdicts(tmp_path, {"failed": [], "pieces": {"00000": 2}, "clusters": {}})
    assert [row.texts for row in rows] == [{"synthetic": 1}, {"web": 1, "synthetic": 1}]
