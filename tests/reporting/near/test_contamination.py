"""The section of a page about held-out pictures; records and tables may come from someone else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capfilt.errors import RunError
from capfilt.reporting import page
from capfilt.reporting.near import contamination
from capfilt.reporting.page_data import PageData
from capfilt.stages.near.decontaminate import rows
from capfilt.stages.near.decontaminate.rows import Suspect

EVIL = "</script><script>alert(1)</script>\u202e"


def record(**more: Any) -> dict[str, Any]:
    return {
        "command": "decontaminate",
        "by": "sha256,phash:6",
        "samples": {"in": 30_000, "kept": 29_997, "dropped": 3, "failed": 0},
        "sets": {"test": {"pictures": 5_000, "texts": 25_000, "in_pool": 2, "samples": {"phash": 3}}},
        "self_test": {"phash": {"pictures": 200, "recall": {"jpeg 95": 1.0, "mirrored": 0.995}, "confused": 0.01}},
        "problems": {},
        **more,
    }


def shown(folder: Path, **more: Any) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(record(**more)))
    return page.render(PageData("a run", "decontaminate", contamination=contamination.read(folder)))


def test_what_was_found_what_would_have_been_and_examples(tmp_path: Path) -> None:
    suspect = Suspect("u", "k7", "00003", "held-out image v", "phash", "test", "v", "t1", "mirror image", 4.0)
    rows.write(tmp_path / rows.TABLE, [suspect] * 60)
    html = shown(tmp_path)
    assert 'href="#contamination"' in html
    for text in ("contaminated: 3 of 30,000 samples (sha256,phash:6); held-out pictures: 2 of test", "99.5%", "1.0%"):
        assert text in html
    assert html.count("t1, its mirror image") == contamination.MAX_EXAMPLES == 50


def test_a_page_without_a_decontamination_has_no_such_section(tmp_path: Path) -> None:
    assert contamination.read(tmp_path) is None
    assert "contamination" not in page.render(PageData("a run", "bootstrap"))


def test_texts_of_others_stay_texts(tmp_path: Path) -> None:
    suspect = Suspect(*[EVIL] * 9, 0.0)
    rows.write(tmp_path / rows.TABLE, [suspect])
    each = record()["sets"]["test"] | {"samples": {EVIL: 3}}
    html = shown(
        tmp_path, by=EVIL, sets={EVIL: each}, problems={"phash": EVIL}, self_test={EVIL: record()["self_test"]["phash"]}
    )
    assert "<script>alert" not in html
    assert "\u202e" not in html
    assert "&lt;script&gt;alert(1)" in html


@pytest.mark.parametrize(
    "more",
    [
        {"by": 3},
        {"samples": {"in": "many", "dropped": 0}},
        {"sets": {"test": {"pictures": 1, "in_pool": None, "samples": {}}}},
        {"self_test": {"phash": {"pictures": 1, "confused": 0, "recall": {"jpeg 95": "all"}}}},
        {"problems": {"phash": 1}},
    ],
)
def test_a_record_that_is_none_is_one_line(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no record of a decontamination"):
        shown(tmp_path, **more)


def test_a_table_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / rows.TABLE).write_bytes(b"PAR1")
    with pytest.raises(Exception, match=r"contaminated\.parquet"):
        shown(tmp_path)
