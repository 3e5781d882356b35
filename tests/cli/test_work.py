from __future__ import annotations

import pytest

from capfilt.cli.work import print_rounds


def test_the_table_has_a_dash_for_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {
        "round": 1,
        "seconds": 61.7,
        "kept": {"web": 30, "synthetic": 0},
        "noise_ratio": {"web": 0.25, "synthetic": 1.0},
        "filter": {"auc": 0.98765, "precision": 0.9},
        "retrieval": {"tr@1": 12.34, "ir@1": 5.0},
        "captioning": {"cider": 40.06},
    }
    print_rounds({"rounds": [{"round": 0, "seconds": 9.0}, measured]})
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    assert cells == [
        ["0", *"--------", "9"],
        ["1", "30 (75%)", "0 (0%)", "0.988", "0.900", "-", "12.3", "5.0", "40.1", "62"],
    ]
