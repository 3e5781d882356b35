"""Two runs side by side."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import capfilt
import capfilt.data.annotations as tables
from capfilt.data.annotations import Annotation
from capfilt.data.policy import PolicyConfig
from capfilt.errors import RunError, UsageError
from capfilt.pipelines.inspect import report
from capfilt.reporting.comparison.collect import collect_comparison
from capfilt.reporting.comparison.join import DROPPED, KEPT, join
from capfilt.reporting.comparison.page import render_comparison
from capfilt.reporting.sampling import RoundSample, RoundSource
from tests.reporting.test_page import HOSTILE, await_text

Make = Callable[..., Path]


def row(number: int, source: str = "web", text: str = "a dog", itm: float | None = 0.5, **more: Any) -> Annotation:
    known: dict[str, Any] = {"key": f"{number:05d}", "uid": f"{number:032x}", "sha256": "", "candidate": 0}
    models = {"captioner": "", "filter": "", "seed": 0, "round": 0}
    return Annotation(source=source, text=text, itm=itm, itc=0.1, **{**known, **models, **more})


@pytest.fixture
def annotated(tmp_path: Path) -> Make:
    """A run folder of `annotate` with these rows in each of its shards; its pictures are gone."""

    def make(name: str, shards: Sequence[Sequence[Annotation]], recipe: str = "{}") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for number, rows in enumerate(shards):
            tables.write(folder / "annotations" / f"{name}-{number}.parquet", rows)
        (folder / "plan.json").write_text(json.dumps({"verb": "annotate", "shards": [str(tmp_path / "gone.tar")]}))
        (folder / "recipe.yaml").write_text(recipe)
        return folder

    return make


def two(annotated: Make, texts: Sequence[str] = ("a dog",)) -> tuple[Path, Path]:
    """Ten images in both runs, in other shards and under other keys in the second; two only in one of them."""
    first = [row(n, text=texts[n % len(texts)], itm=n / 10) for n in range(11)]
    first += [row(n, "synthetic", text=f"first {n}", itm=0.9) for n in range(11)]
    second = [row(n, text=texts[n % len(texts)], itm=1 - n / 10, key=f"k{n}") for n in range(10)]
    second += [
        row(n, "synthetic", text=f"first {n}" if n < 3 else f"second {n}", itm=0.2, key=f"k{n}") for n in range(10)
    ]
    second += [row(77, key="k77")]
    one = annotated("one", [first[:8] + first[11:19], first[8:11] + first[19:]], "captions: 1\n")
    return one, annotated("other", [second], "captions: 2\n")


def data_of(html: str) -> dict[str, Any]:
    (island,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    found: dict[str, Any] = json.loads(island)
    return found


def test_the_same_images_are_joined_on_uid(annotated: Make) -> None:
    joined = collect_comparison(two(annotated)).joined
    assert sorted(int(image.first.uid, 16) for image in joined.images) == list(range(10))
    assert (joined.candidates, joined.whole) == ((11, 11), True)
    of_image = {int(image.first.uid, 16): image.texts for image in joined.images}
    (web, own, theirs) = of_image[8]
    assert web.both is not None
    first, second = web.both
    assert [(round(side.row.itm or 0, 3), side.verdict) for side in (first, second)] == [(0.8, KEPT), (0.2, DROPPED)]
    assert second.reason == "itm below threshold"
    assert (own.text, own.sides[1]) == ("first 8", None)
    assert (theirs.text, theirs.sides[0]) == ("second 8", None)
    assert [text.both is not None for text in of_image[2]] == [True, True], "the same caption is one text"


def test_a_sample_joins_whatever_shards_the_images_lie_in(tmp_path: Path) -> None:
    """Both samples hold the images of the smallest hashes: all of those below both limits are joined."""
    samples = []
    for name, number, size in (("a", 50, 200), ("b", 10, 300)):
        for shard in range(number):
            rows = [row(n) for n in range(600) if n % number == shard]
            tables.write(tmp_path / name / f"{shard:05d}.parquet", rows)
        source = RoundSource(0, tmp_path / name, None, PolicyConfig().rule(0.5), "itm", 0.5, "", "")
        samples.append(RoundSample(source, size))
        for shard in range(number):
            samples[-1].add(f"{shard:05d}", {}, sample=True)
        assert samples[-1].counts.images == 600
    joined = join(*samples)
    assert 190 <= len(joined.images) <= 200
    assert joined.candidates == (len(joined.images), len(joined.images)), "who is in one is in the other"
    assert not joined.whole


def test_the_tables_say_what_changed(annotated: Make, tmp_path: Path) -> None:
    folders = two(annotated)
    record = report.compare(*folders, tmp_path / "page.html")
    assert (record["joined"], record["texts"]) == (10, 10 + 3 + 7 + 7)
    html = (tmp_path / "page.html").read_text("utf-8")
    assert '<th scope="row">captions</th><td>1</td><td>2</td>' in html, "a setting that differs"
    assert '<th scope="row">web texts</th><td>11</td><td>11</td><td>0</td>' in html
    assert '<th scope="row">web, itm</th><td>10</td><td>0.450</td><td>0.550</td><td>+0.100</td>' in html
    # Of the web texts 0.5 to 0.9 pass in the first, 0 to 0.5 in the second: 0.5 in both.
    assert "<td>10</td><td>1 (10.0%)</td><td>4 (40.0%)</td><td>5 (50.0%)</td><td>0 (0.0%)</td>" in html
    assert "No policy has run on one" in html
    assert "kept" not in re.sub("<script.*?</script>|<style>.*?</style>", "", html, flags=re.DOTALL)


def test_runs_that_share_no_image_are_compared_by_their_totals(annotated: Make, tmp_path: Path, capfilt: Any) -> None:
    one, other = annotated("one", [[row(1)]]), annotated("other", [[row(2), row(3)]])
    done = capfilt("report", one, other)
    assert done.code == 0, done.err
    assert "share no image" in done.out + done.err
    html = (one / "comparison.html").read_text("utf-8")
    assert "These runs share no image (joined on uid), so only their totals are compared." in html
    assert '<th scope="row">images</th><td>1</td><td>2</td><td>+1</td>' in html
    assert 'id="gallery"' not in html


def test_what_cannot_be_compared_is_refused(annotated: Make, tmp_path: Path, capfilt: Any) -> None:
    one = annotated("one", [[row(1)]])
    with pytest.raises(UsageError, match="compared with itself"):
        collect_comparison((one, one))
    empty = annotated("empty", [])
    with pytest.raises(RunError, match="a run of annotate without annotations"):
        collect_comparison((one, empty))
    done = capfilt("report", one, one)
    assert done.code == 2
    assert "give two run folders" in done.line
    assert capfilt("report", one, tmp_path / "nowhere").code != 0


def test_a_bootstrap_and_a_select_side_by_side(finished_run: Path, tmp_path: Path, capfilt_cli: Any) -> None:
    words = ("--annotations", finished_run / "round-1", "--set", "threshold=0.3", "--out", tmp_path / "clean")
    assert capfilt_cli("select", finished_run / "data/web", *words).code == 0
    result = capfilt.report(finished_run, tmp_path / "clean", out=tmp_path / "page.html")
    assert (result.joined, result.texts) == (60, 120)
    html = (tmp_path / "page.html").read_text("utf-8")
    data = data_of(html)
    assert all(thumbnail for _, thumbnail in data["images"])
    assert data["rows"]["itmA"] == data["rows"]["itmB"], "the same annotations"
    assert [side["decided"] for side in data["sides"]] == [True, True]
    assert "images kept" in html
    assert f"<h1>{finished_run.name}, round 1" in html


@pytest.fixture(scope="session")
def capfilt_cli(capfilt: Any) -> Any:
    """The command line, where the module's name is taken."""
    return capfilt


# ---- what a person sees ----


def opened(browser: Any, folder: Path, folders: tuple[Path, Path], width: int, dark: bool = False) -> Any:
    path = folder / "page.html"
    path.write_text(render_comparison(collect_comparison(folders)), "utf-8")
    return browser.open(path.as_uri(), width, dark)


def test_the_gallery_shows_both_runs(annotated: Make, tmp_path: Path, browser: Any) -> None:
    for width, dark in ((1280, False), (390, True)):
        view = opened(browser, tmp_path, two(annotated), width, dark)
        assert view.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
        first = view.locator(".card").first
        assert first.locator("figcaption").inner_text() == "00000", "the largest change comes first"
        assert "A ✗ below" in first.inner_text()
        assert "B ✓ passes" in first.inner_text()
        assert "itm +1.000" in first.inner_text()
        view.locator("#verdicts").select_option("a")
        await_text(view, "#found", "7 texts of 7 images")  # web texts 6 to 9, captions 0 to 2
        view.locator("#presence").select_option("b")
        await_text(view, "#found", "No text")
        view.locator("#verdicts").select_option("")
        await_text(view, "#found", "7 texts of 7 images")
        view.get_by_label("Words").fill("second 5")
        await_text(view, "#found", "1 texts")


def test_its_texts_are_hostile_and_saved_as_csv(annotated: Make, tmp_path: Path, browser: Any) -> None:
    texts = ["=1+1", *(text.replace("\0", "") for text in HOSTILE)]
    folders = two(annotated, texts)
    named = tmp_path / "<img src=x onerror=alert(1)>"
    folders[1].rename(named)
    view = opened(browser, tmp_path, (folders[0], named), 390)
    assert {text for text in view.locator(".card .said bdi").all_text_contents() if " " not in text[:9]} >= {"=1+1"}
    assert view.locator("#cards img, #cards script").count() == 0
    view.locator("#source").select_option("web")
    view.get_by_label("Order").select_option("random")
    await_text(view, "#save", "Save 10 texts")
    with view.expect_download() as download:
        view.locator("#save").click()
    download.value.save_as(tmp_path / "texts.csv")
    with (tmp_path / "texts.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = {line["uid"]: line for line in csv.DictReader(file)}
    first = rows[f"{0:032x}"]
    assert (first["text"], first["itm_A"], first["itm_B"]) == ("'=1+1", "0", "1")
    assert (first["verdict_A"], first["verdict_B"], first["reason_A"]) == ("below", "passes", "itm below threshold")


@pytest.mark.slow
def test_a_page_of_hostile_runs_is_small(annotated: Make, tmp_path: Path) -> None:
    long = [row(n, text="<" * 100_000) for n in range(40)]
    recipe = "".join(f"key{n}: {'x' * 5000}\n" for n in range(300))
    folders = annotated("one", [long], recipe), annotated("other", [[replace(each, itm=0.1) for each in long]])
    record = report.compare(*folders, tmp_path / "page.html")
    assert record["joined"] == 40
    assert record["bytes"] < 1_000_000
