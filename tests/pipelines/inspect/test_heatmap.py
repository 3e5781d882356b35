"""explain --heatmap: a picture of an image and of each of its texts, by the filter that scored them."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import capfilt as package
from capfilt.pipelines.inspect.heatmap import LABEL, SIDE, overlay

GAP = 4


@pytest.fixture
def row(finished_run: Path) -> dict[str, Any]:
    first: dict[str, Any] = pq.read_table(finished_run / "round-1/dataset/00001.parquet").to_pylist()[0]
    return first


def test_an_image_and_each_of_its_texts(run_copy: Path, row: dict[str, Any], capfilt: Any) -> None:
    done = capfilt("explain", run_copy, row["key"], "--heatmap", "--json")
    assert done.code == 0, done.err
    path = run_copy / f"heatmap-{row['key']}.png"
    assert json.loads(done.out)["heatmap"] == str(path)
    sheet = Image.open(path)
    assert sheet.size == (3 * (SIDE + GAP), SIDE + LABEL + GAP), "the image, its synthetic text and its web text"
    tiles = [np.asarray(sheet)[:SIDE, x * (SIDE + GAP) :][:, :SIDE] for x in range(3)]
    assert not np.array_equal(tiles[0], tiles[1])
    assert not np.array_equal(tiles[1], tiles[2]), "two texts, two maps"


def test_what_is_drawn_is_what_the_python_api_gives(
    finished_run: Path, row: dict[str, Any], capfilt: Any, tmp_path: Path
) -> None:
    out = tmp_path / "drawn.png"
    done = capfilt("explain", finished_run, row["key"], "--heatmap", "--out", out)
    assert done.out.splitlines()[-1] == f"heatmap: {out}"
    assert not list(finished_run.glob("heatmap*"))
    heat = heatmap_of(finished_run, row)
    picture = Image.fromarray(np.asarray(Image.open(out))[:SIDE, :SIDE])
    drawn = np.asarray(Image.open(out))[:SIDE, SIDE + GAP :][:, :SIDE]
    assert np.array_equal(drawn, np.asarray(overlay(picture, heat)))


def heatmap_of(run: Path, row: dict[str, Any]) -> np.ndarray:
    shard = run / "data/web" / "00001.tar"
    (image,) = [sample.image for sample in package.read_shards(shard) if sample.key == row["key"]]
    heat = package.load_model(run / "round-1/filter", device="cpu", precision="fp32").heatmap(image, row["text"])
    assert heat.shape == (2, 2)
    assert (heat.dtype, heat.max()) == (np.float32, 1.0)
    return heat


def shown_in(page: Path) -> dict[str, Any]:
    """What the script of a page reads."""
    html = page.read_text()
    data: dict[str, Any] = json.loads(html[html.index('id="data">') + len('id="data">') :].split("</script>")[0])
    return data


def test_the_report_draws_those_nearest_to_the_threshold(finished_run: Path, capfilt: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = capfilt("report", finished_run, "--heatmaps", 2, "--out", page, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["heatmaps"] == 4
    shown = shown_in(page)
    (look,) = shown["looks"]
    texts, threshold = look["texts"], look["threshold"]
    drawn = {int(row): url for row, url in look["heat"].items()}
    assert len(set(drawn.values())) == 4
    for kept in (True, False):
        of_kind = [row for row, score in enumerate(texts[look["score"]]) if (score >= threshold) == kept]
        farthest = max(abs(texts[look["score"]][row] - threshold) for row in drawn if row in of_kind)
        nearer = [row for row in of_kind if abs(texts[look["score"]][row] - threshold) < farthest]
        assert sum(row in of_kind for row in drawn) == 2
        assert set(nearer) < drawn.keys()
    row = min(drawn)
    (shard, _), (key, _) = shown["identities"][texts["image"][row]], shown["images"][texts["image"][row]]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn[row].partition(",")[2]))).convert("RGB"))
    (image,) = [each.image for each in package.read_shards(finished_run / f"data/web/{shard}.tar") if each.key == key]
    heat = package.load_model(finished_run / "round-1/filter", device="cpu").heatmap(image, texts["text"][row])
    expected = overlay(Image.open(io.BytesIO(image)).convert("RGB").resize((SIDE, SIDE)), heat)
    assert np.abs(pixels.astype(int) - np.asarray(expected).astype(int)).mean() < 8, "as WebP holds it"


@pytest.mark.parametrize(
    ("words", "why"),
    [(("--filter", "x"), "say --heatmaps N too"), (("--heatmaps", 2), "of the page of one run")],
)
def test_a_report_with_options_that_do_not_fit(
    finished_run: Path, capfilt: Any, words: tuple[object, ...], why: str
) -> None:
    done = capfilt("report", finished_run, finished_run.parent, *words)
    assert done.code == 2
    assert why in done.line


def test_a_filter_that_is_gone_is_named_or_given(
    run_copy: Path, row: dict[str, Any], capfilt: Any, tmp_path: Path
) -> None:
    """It is another one that is refused."""
    shutil.move(run_copy / "round-1/filter/checkpoint", tmp_path / "elsewhere")
    words = ("explain", run_copy, row["key"], "--heatmap")
    done = capfilt(*words)
    assert done.code == 1
    assert "the filter that scored the texts (round-1/filter/checkpoint) is neither in" in done.line
    assert capfilt(*words, "--filter", tmp_path / "elsewhere").code == 0
    other = capfilt(*words, "--filter", run_copy / "round-1/captioner")
    assert other.code == 2
    assert "scored the texts; give that" in other.line


def test_shards_that_are_gone(run_copy: Path, row: dict[str, Any], capfilt: Any) -> None:
    shutil.rmtree(run_copy / "data/web")
    done = capfilt("explain", run_copy, row["key"], "--heatmap")
    assert done.code in (1, 2)
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "why"),
    [(("--out", "x.png"), "say --heatmap too"), (("--heatmap", "--out", "x.jpg"), "a name that ends in .png")],
)
def test_options_that_do_not_fit(
    finished_run: Path, row: dict[str, Any], capfilt: Any, words: tuple[str, ...], why: str
) -> None:
    done = capfilt("explain", finished_run, row["key"], *words)
    assert done.code == 2
    assert why in done.line


def test_the_hottest_patch_is_red_and_the_coldest_blue() -> None:
    picture = Image.new("RGB", (64, 32), "black")
    drawn = np.asarray(overlay(picture, np.array([[1.0, 0.0], [0.0, 0.0]]))).astype(int)
    assert drawn.shape == (32, 64, 3)
    assert drawn[2, 4, 0] > drawn[2, 4, 2]
    assert drawn[-2, -4, 2] > drawn[-2, -4, 0]
