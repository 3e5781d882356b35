"""Takes the screenshots of docs/img from the pages of two annotated runs.

    python tests/reporting/screenshots.py runs/a runs/b docs/img

`annotate-*` is the page of the second run, `two-runs-*` both side by side; desktop is 1280 pixels wide, phone 390.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import capfilt

WIDTHS = {"desktop": (1280, 1000), "phone": (390, 844)}
"""Name, and width and height in pixels."""


@dataclass(frozen=True)
class Shot:
    """A picture of a page from a section on, in the light or the dark."""

    name: str
    page: str
    section: str
    widths: tuple[str, ...] = ("desktop", "phone")
    dark: bool = False


SHOTS = (
    Shot("annotate", "annotate", ""),
    Shot("annotate-thresholds", "annotate", "#thresholds", ("desktop",)),
    Shot("annotate-gallery", "annotate", "#gallery", ("phone",), dark=True),
    Shot("annotate-enlarged", "annotate", "#viewer", ("phone",)),
    Shot("two-runs", "two-runs", ""),
    Shot("two-runs-gallery", "two-runs", "#gallery"),
)


def take(pages: dict[str, Path], out: Path) -> Iterator[Path]:
    """Every shot at each of its widths, as OUT/NAME-WIDTH.png."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for shot in SHOTS:
            for name in shot.widths:
                width, height = WIDTHS[name]
                context = browser.new_context(
                    viewport={"width": width, "height": height},
                    color_scheme="dark" if shot.dark else "light",
                    reduced_motion="reduce",
                )
                view = context.new_page()
                view.goto(pages[shot.page].absolute().as_uri())
                view.wait_for_selector(".card")
                show(view, shot.section)
                path = out / f"{shot.name}-{name}.png"
                view.screenshot(path=path)
                context.close()
                yield path
        browser.close()


def show(view: Any, section: str) -> None:
    """Go to a section; #viewer enlarges the first picture."""
    if section == "#viewer":
        view.locator("#cards .enlarge").first.click()
        view.locator("#viewer").wait_for(state="visible")
    elif section:
        view.evaluate("section => document.querySelector(section).scrollIntoView()", section)
    view.wait_for_timeout(300)


def main(first: str, second: str, out: str) -> None:
    """Write the pages, and take the shots."""
    with tempfile.TemporaryDirectory() as folder:
        pages = {name: Path(folder, f"{name}.html") for name in ("annotate", "two-runs")}
        capfilt.report(second, out=pages["annotate"])
        capfilt.report(first, second, out=pages["two-runs"])
        for path in take(pages, Path(out)):
            sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
