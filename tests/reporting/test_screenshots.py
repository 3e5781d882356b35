"""The script of docs/report.md takes every screenshot that the page shows."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.reporting import screenshots

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
def test_the_page_shows_what_the_script_takes(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no chromium is installed")
    words = ("--annotations", finished_run / "round-1", "--set", "threshold=0.3", "--out", tmp_path / "clean")
    assert capfilt("select", finished_run / "data/web", *words).code == 0
    (tmp_path / "img").mkdir()
    screenshots.main(str(finished_run), str(tmp_path / "clean"), str(tmp_path / "img"))
    taken = {path.name: Image.open(io.BytesIO(path.read_bytes())).width for path in (tmp_path / "img").iterdir()}
    assert set(taken.values()) == {1280, 390}
    assert set(taken) == set(re.findall(r"\(img/([\w-]+\.png)\)", (DOCS / "report.md").read_text("utf-8")))
    assert all((DOCS / "img" / name).is_file() for name in taken)
