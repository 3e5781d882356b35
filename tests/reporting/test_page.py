from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capfilt.data import labels
from capfilt.reporting import page, sections
from capfilt.reporting.charts import Histogram
from capfilt.reporting.page_data import COLUMNS, AnnotatedRound, PageData, Training

HOSTILE = [
    "<script>alert('script')</script>",
    "</script><script>alert('out of the island')</script>",
    "<!--<script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }} {% raw %} ${alert(1)} `",
    "javascript:alert(1)",
    "שלום עולם \u202e evil \u2028 \u0000 \ufeff",
    "'quotes' \"and\" \\backslashes\\ &amp; &lt;",
    "x" * 600,
]

ROUNDS: list[dict[str, Any]] = [
    {"round": 0, "seconds": 57.0, "retrieval": {"tr@1": 19.5, "ir@1": 20.3}, "captioning": {"cider": 214.6}},
    {
        "round": 1,
        "seconds": 153.0,
        "samples_in": 4000,
        "kept": {"web": 1357, "synthetic": 1958},
        "noise_ratio": {"web": 0.6608, "synthetic": 0.5105},
        "dropped": {"web: itm below threshold": 2600, "web: no text": 43},
        "failed": {"truncated image": 3},
        "filter": {"auc": 0.945, "precision": 0.879, "recall": 0.738, "threshold": 0.5},
        "retrieval": {"tr@1": 21.6, "ir@1": 19.0},
        "captioning": {"cider": 261.0, "repeated": 0.6, "distinct2": 0.02},
    },
]


def picture(size: int = 128) -> str:
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "WEBP", quality=40)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def an_annotated_round(num: int = 40, texts: list[str] | None = None, number: int = 1) -> AnnotatedRound:
    """`num` images with a web and a synthetic text each; the scores climb, web texts of odd images are wrong."""
    data = texts or [f"picture {i} of a dog" for i in range(num)]
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for i in range(num):
        for source in (0, 1):
            itm = float(f"{np.float32(i / num):.9g}")
            web = source == 0
            values = (i, source, 0, data[i % len(data)], itm, round(0.5 - itm, 6), -1, (1 - i % 2) if web else -1)
            for name, value in zip(COLUMNS, (*values, 0 if web and i % 2 else -1, -1), strict=True):
                columns[name].append(value)
    bars = Histogram(0.0, 1.0, {"wrong": [num // 4] * 2, "right": [num // 4] * 2})
    histograms = {"itm": {"web": bars, "synthetic": Histogram(0.0, 1.0, {"unknown": [num // 2] * 2})}}
    return AnnotatedRound(
        round=number,
        score="itm",
        threshold=0.5,
        select_command="capfilt select 'my shards' --annotations runs/x/round-1",
        out_prefix="'runs/x y'-round-1",
        totals={"web": num, "synthetic": num},
        histograms={**histograms, "itc": {"web": Histogram(-0.5, 0.5, {"unknown": [num]})}},
        lengths={"web": [0, 1, 5, 2], "synthetic": [0, 0, 3, 4]},
        diversity={"web": {"repeated": 0.1, "distinct2": 0.4, "texts": 40.0}},
        texts=columns,
    )


def page_data(shown: AnnotatedRound | None = None, **more: Any) -> PageData:
    shown = shown or an_annotated_round()
    images = [(f"{i:05d}", picture(16) if i % 2 else None) for i in range(max(shown.texts["image"]) + 1)]
    losses = [Training("pretrain", r, {"itm": [(20, 0.6), (40, 0.5 - r / 10)]}) for r in (0, 1)]
    known: dict[str, Any] = {"rounds": ROUNDS, "trainings": losses, "annotated_rounds": [shown], "images": images}
    return PageData("a run", "bootstrap", **{**known, "kinds": ["seo"], "seconds": 210.0, **more})


def await_text(opened: Any, selector: str, text: str) -> None:
    """Wait until the first such element says so; nothing is evaluated in the page, whose policy forbids it."""
    opened.locator(f"{selector} >> nth=0").filter(has_text=text).wait_for(state="attached", timeout=60_000)


def written(folder: Path, data: PageData) -> str:
    path = folder / "report.html"
    path.write_text(page.render(data), "utf-8")
    return path.as_uri()


# ---- what is in the file ----


def test_the_same_facts_give_the_same_page() -> None:
    assert page.render(page_data()) == page.render(page_data())


def test_nothing_is_loaded_from_elsewhere_and_only_its_own_script_may_run() -> None:
    html = page.render(page_data())
    assert not re.search(r"""(src|href|action)\s*=\s*["']?(https?:|//)""", html)
    assert html.count("<script") == 2
    assert "default-src &#39;none&#39;" in html
    assert "connect-src &#39;none&#39;" in html
    assert "unsafe" not in page.content_security_policy(False) + page.content_security_policy(True)


def test_the_data_cannot_leave_their_element() -> None:
    tree = {"texts": HOSTILE}
    text = str(page.json_for_script(tree))
    assert not set(text) & set("<>&\u2028")
    assert json.loads(text) == tree


def test_the_rounds_are_those_of_the_summary() -> None:
    headings, rows = sections.rounds_table(ROUNDS)
    told = dict(zip(headings, rows[1], strict=True))
    assert told["kept web"].text == "1,357 (33.9%)"
    assert (told["TR@1"].text, told["TR@1"].change, told["TR@1"].better) == ("21.6", "+2.1", True)
    assert (told["IR@1"].text, told["IR@1"].change, told["IR@1"].better) == ("19.0", "−1.3", False)
    assert rows[0][headings.index("kept web")].text == "–"
    assert "BLEU-4" not in headings, "what no round measured has no column"


def test_a_page_of_20_000_texts_is_small_enough() -> None:
    shown = an_annotated_round(10_000, ["a text as long as alt texts are on the web, some sixty characters"])
    thumb = "data:image/webp;base64," + "A" * 6_700  # 12 MB of thumbnails before base64, as the gallery allows
    images = [(f"{i:09d}", thumb if i < 2400 else None) for i in range(10_000)]
    assert len(page.render(page_data(shown, images=images)).encode()) < 25_000_000


@pytest.mark.parametrize("data", [PageData("x", "pretrain", trainings=[Training("pretrain", 0, {"lm": [(1, 2.0)]})])])
def test_a_run_without_rounds_or_annotations_has_a_page_too(data: PageData) -> None:
    html = page.render(data)
    assert "pretrain: lm" in html
    assert 'id="decide"' not in html


# ---- what a person sees ----


def test_it_opens_without_a_message_and_requests_nothing(tmp_path: Path, browser: Any) -> None:
    url = written(tmp_path, page_data())
    for dark, width in ((False, 1280), (True, 390)):
        opened = browser.open(url, width, dark)
        opened.wait_for_selector(".card")
        ground = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == dark
        assert opened.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
        assert opened.evaluate("[...document.images].every(image => image.alt)")
    assert [request for request in browser.requests if not request.startswith("data:")] == [url, url]


def test_the_slider_decides_again(tmp_path: Path, browser: Any) -> None:
    opened = browser.open(written(tmp_path, page_data()))
    live = opened.locator("#live")
    # itm is i / 40: twenty of forty reach 0.5, ten of them right; of the twenty right ones, ten.
    assert "web: 20 of 40 kept, 50.0 %" in live.inner_text()
    assert "precision 0.500, recall 0.500" in live.inner_text()
    before = float(opened.locator(".cut").first.get_attribute("x1"))
    opened.locator("#slider").fill("0.75")
    await_text(opened, "#live", "10 of 40")
    assert float(opened.locator(".cut").first.get_attribute("x1")) > before
    assert opened.locator("#command").inner_text() == (
        "capfilt select 'my shards' --annotations runs/x/round-1 --out 'runs/x y'-round-1-itm-0.750"
        " --score itm --threshold 0.75"
    )
    opened.locator("#slider").focus()
    opened.keyboard.press("ArrowRight")
    await_text(opened, "#command", "0.751")
    opened.get_by_role("button", name="Back to the run's").press("Enter")
    await_text(opened, "#command", "--threshold 0.5")
    opened.get_by_label("Judged by").select_option("itc")
    await_text(opened, "#command", "--score itc")
    assert "20 of 40 kept" in live.inner_text(), "another score begins where as many are kept"


def test_the_gallery_is_filtered_and_sorted(tmp_path: Path, browser: Any) -> None:
    opened = browser.open(written(tmp_path, page_data()))
    found = opened.locator("#found")
    assert opened.locator(".card figcaption").first.inner_text() == "00020", "the closest call comes first"
    assert opened.locator(".card").count() == 24
    opened.get_by_role("button", name="Show more").click()
    assert opened.locator(".card").count() == 40
    opened.get_by_label("Verdict").select_option("dropped")
    opened.get_by_label("Source").select_option("web")
    await_text(opened, "#found", "20 texts of 20 images")
    opened.locator("#truth").select_option("err")  # dropped though right
    await_text(opened, "#found", "10 texts")
    opened.get_by_label("Order").select_option("low")
    await_text(opened, ".card figcaption", "00000")
    opened.locator("#reason").select_option("itm below threshold")
    opened.get_by_label("Words").fill("PICTURE 12 ")
    await_text(opened, "#found", "1 texts")
    card = opened.locator(".card .text").first
    assert "✗ dropped" in card.inner_text()
    assert "truly right" in card.inner_text()
    opened.get_by_label("Words").fill("no such text")
    await_text(opened, "#found", "No text")
    assert found.get_attribute("role") == "status"


def test_captions_are_hostile(tmp_path: Path, browser: Any) -> None:
    """The browser's fixture fails the test if a script ran, was refused, or a dialog opened."""
    shown = replace(an_annotated_round(len(HOSTILE), HOSTILE), full_lengths={16: 10_000})
    images = [(text, None) for text in HOSTILE]
    reasons = [(HOSTILE[0], HOSTILE[1], True)]
    shown.texts["fixed"][0] = 0
    # Jinja's and the page's data places: name, kinds, notes, reasons, losses, commands.
    more: dict[str, Any] = {"images": images, "reasons": reasons, "kinds": [HOSTILE[3]], "notes": HOSTILE}
    failed = {**ROUNDS[1], "failed": {HOSTILE[1]: 1}}
    losses = [Training(HOSTILE[0], 0, {HOSTILE[3]: [(1, 2.0), (2, 1.0)]})]
    data = replace(page_data(shown, **more), name=HOSTILE[1], rounds=[ROUNDS[0], failed], trainings=losses)
    opened = browser.open(written(tmp_path, data), 390)
    opened.get_by_label("Order").select_option("random")
    await_text(opened, ".card figcaption", "alert")
    said = opened.locator(".card .said bdi").all_text_contents()
    assert set(said) == set(HOSTILE)
    assert opened.locator(".card img, #cards script").count() == 0
    assert "9,400 more characters" in opened.locator(".said", has_text="xxx").first.inner_text()
    assert opened.evaluate("document.documentElement.scrollWidth") == 390
    assert opened.locator("h1").inner_text() == HOSTILE[1]


def test_labels_have_intervals_and_only_those_at_random_count(tmp_path: Path, browser: Any) -> None:
    shown = an_annotated_round()
    # Web texts of images 20..29 are kept: eight right, two wrong; two right ones are dropped; one was no random pick.
    for image, code in [*((i, 1) for i in range(22, 30)), (20, 0), (21, 0), (3, 1), (4, 1), (5, 3)]:
        shown.texts["label"][2 * image] = code
    opened = browser.open(written(tmp_path, page_data(shown)))
    low, high = labels.wilson_interval(8, 10)
    await_text(opened, "#live", "random labels")
    told = opened.locator("#live").inner_text()
    assert f"12 random labels: precision 0.800 [{low:.2f}, {high:.2f}], recall 0.800 [{low:.2f}, {high:.2f}]" in told
    assert "1 labels given otherwise, not counted" in told


def test_nothing_is_asked_of_a_truth_that_nobody_knows(tmp_path: Path, browser: Any) -> None:
    shown = an_annotated_round()
    shown.texts["truth"][:] = [-1] * 80
    opened = browser.open(written(tmp_path, page_data(shown)))
    await_text(opened, "#live", "web:")
    assert not opened.locator("#truth").is_visible()
    assert "known truth" not in opened.locator("#live").inner_text()


def test_a_sample_says_that_it_is_one(tmp_path: Path, browser: Any) -> None:
    shown = replace(an_annotated_round(), totals={"web": 4000, "synthetic": 4000})
    opened = browser.open(written(tmp_path, page_data(shown, notes=["The gallery holds 80 of 8,000 texts."])))
    await_text(opened, "#live", "web: about 2,000 of 4,000 kept, 50.0 % (from 40 drawn at random)")
    assert "holds 80 of 8,000" in opened.locator("footer").inner_text()


def test_the_command_is_copied(tmp_path: Path, browser: Any) -> None:
    opened = browser.open(written(tmp_path, page_data()))
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.get_by_role("button", name="Copy").click()
    await_text(opened, "#copied", "Copied.")
    assert opened.evaluate("navigator.clipboard.readText()") == opened.locator("#command").inner_text()
