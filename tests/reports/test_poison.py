from __future__ import annotations

import json
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.reports import poison, stages
from capfilt.reports.ledger import Ledger


def test_what_is_marked_is_read_until_it_is_forgotten(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "annotate")
    assert poison.read(ledger, "00000", "f") == {}
    poison.mark(ledger, "00000", "f", 17, "2 times")
    poison.mark(ledger, "00000", "f", 3, "2 times")
    assert poison.read(ledger, "00000", "f") == {3: "killed its worker: 2 times", 17: "killed its worker: 2 times"}
    assert poison.read(ledger, "00001", "f") == {}
    assert stages.find(tmp_path) == [], "no stage is called poison"
    poison.forget(ledger, "00000")
    assert poison.read(ledger, "00000", "f") == {}


def test_another_version_of_the_shard_is_another_matter(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "annotate")
    poison.mark(ledger, "00000", "f", 17, "2 times")
    assert poison.read(ledger, "00000", "g") == {}
    poison.mark(ledger, "00000", "g", 1, "2 times")
    assert poison.read(ledger, "00000", "g").keys() == {1}


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"fingerprint": "f", "samples": [1]})])
def test_a_torn_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "poison/annotate/00000.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(RunError, match="cannot be read"):
        poison.read(Ledger(tmp_path, "annotate"), "00000", "f")
