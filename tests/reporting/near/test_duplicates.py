"""The page of a deduplication."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from copied_pool import encoded
from tars import tar_of

from tests.reporting.test_page import await_text

HOSTILE = "0-small<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, capfilt: Any) -> Path:
    """The page of a pool in which one copy has a hostile key."""
    home = tmp_path_factory.mktemp("page")
    files = [(f"{key}.jpg", encoded(key)) for key in ("0", "1", "1-jpeg", "2", "2-same")]
    (home / "a.tar").write_bytes(tar_of(*files, (f"{HOSTILE}.jpg", encoded("0-small"))))
    assert capfilt("embed", home / "a.tar", "--out", home / "e").code == 0
    assert capfilt("dedup", home / "e", "--by", "sha256,phash:4", "--keep", "first", "--out", home / "d").code == 0
    done = capfilt("report", home / "d")
    assert done.code == 0, done.err
    assert capfilt("report", home / "e").code == 1, "embeddings have no page"
    return home / "d/report.html"


def test_the_page_counts_and_escapes(page: Path) -> None:
    html = page.read_text("utf-8")
    assert "<img src=x" not in html
    assert '<th scope="row">phash</th><td>2</td>' in html
    assert '<th scope="row">sha256</th><td>1</td>' in html
    assert "2 of 3 pairs are in this page" in html, "equal bytes need no look"
    assert "--by sha256,phash:4 --keep first --scope pool" in html


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("summary.json", {"pictures": "many"}),
        ("summary.json", {"groups": {"count": 1, "largest": 2, "sizes": [3]}}),
        ("plan.json", {"by": [{"kind": "looks"}]}),
        ("plan.json", {"keep": None}),
    ],
)
def test_a_record_that_is_none_is_one_line(
    name: str, change: dict[str, Any], page: Path, tmp_path: Path, capfilt: Any
) -> None:
    run = Path(shutil.copytree(page.parent, tmp_path / "d"))
    record = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(record | change))
    done = capfilt("report", run)
    assert done.code == 1
    assert f"{name} is no record of a deduplication: '{next(iter(change))}" in done.line


def test_the_slider_moves_the_radius(page: Path, browser: Any) -> None:
    for width in (1280, 390):
        view = browser.open(page.as_uri(), width)
        await_text(view, "#found", "2 of the 2 pictures that go by phash; 2 of these pairs are in this page")
        assert view.locator("article img").count() == 4
        slider = view.get_by_label("At most so far apart")
        slider.focus()
        view.keyboard.press("Home")
        await_text(view, "#found", "Within 0 bits: ")
        view.keyboard.press("End")
        await_text(view, "#found", "2 of the 2")
        view.locator(".enlarge").first.click()
        view.get_by_role("dialog").wait_for(state="visible")
        assert view.evaluate("document.documentElement.scrollWidth") == width
