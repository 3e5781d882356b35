from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.runs import balance
from capfilt.runs.ledger import Ledger
from capfilt.runs.tally import Tally


def tally(kept: int, dropped: int = 0, failed: int = 0, texts: int | None = None) -> Tally:
    num = kept + dropped + failed
    made = Tally(samples=Counter({"in": num, "kept": kept, "dropped": dropped, "failed": failed}))
    made.failed.update({"no image": failed})
    made.texts["in"]["web"] = made.texts["kept"]["web"] = kept + dropped if texts is None else texts
    return made


@pytest.mark.parametrize(
    ("judged", "why"),
    [
        (tally(2, 2, 1), ""),
        (tally(2, 1, 1), "5 samples were annotated, 4 have a verdict"),
        (tally(2, 3, 0), "1 samples failed, 0 of them have a verdict"),
        (tally(2, 2, 1, texts=3), "4 web texts were annotated, 3 have a verdict"),
    ],
)
def test_what_was_annotated_has_a_verdict(tmp_path: Path, judged: Tally, why: str) -> None:
    scored, selected = Ledger(tmp_path, "annotate"), Ledger(tmp_path, "select")
    for shard in ("00000", "00001"):
        scored.commit(shard, "f", [], tally(4, 0, 1))
    selected.commit("00000", "f", [], tally(2, 2, 1))
    selected.commit("00001", "f", [], judged)
    if why:
        with pytest.raises(RunError, match=f"shard 00001: {why}"):
            balance.check(scored, selected, ["00000", "00001"])
    balance.check(scored, selected, ["00000"])


def test_annotations_from_elsewhere_have_no_ledger(tmp_path: Path) -> None:
    selected = Ledger(tmp_path, "select")
    selected.commit("00000", "f", [], tally(1))
    balance.check(Ledger(tmp_path / "elsewhere", "annotate"), selected, ["00000"])
