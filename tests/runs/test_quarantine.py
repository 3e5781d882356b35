from __future__ import annotations

import json
from pathlib import Path

import pytest

from capfilt.errors import RunError
from capfilt.runs import quarantine, stage_status
from capfilt.runs.ledger import Ledger


def test_what_is_marked_is_read_until_it_is_forgotten(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "annotate")
    assert quarantine.read(ledger, "00000", "f") == {}
    quarantine.add(ledger, "00000", "f", 17, "2 times")
    quarantine.add(ledger, "00000", "f", 3, "2 times")
    assert quarantine.read(ledger, "00000", "f") == {3: "killed its worker: 2 times", 17: "killed its worker: 2 times"}
    assert quarantine.read(ledger, "00001", "f") == {}
    assert stage_status.find_ledgers(tmp_path) == [], "no stage is called poison"
    quarantine.clear(ledger, "00000")
    assert quarantine.read(ledger, "00000", "f") == {}


def test_another_version_of_the_shard_is_another_matter(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "annotate")
    quarantine.add(ledger, "00000", "f", 17, "2 times")
    assert quarantine.read(ledger, "00000", "g") == {}
    quarantine.add(ledger, "00000", "g", 1, "2 times")
    assert quarantine.read(ledger, "00000", "g").keys() == {1}


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"fingerprint": "f", "samples": [1]})])
def test_a_torn_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "poison/annotate/00000.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(RunError, match="cannot be read"):
        quarantine.read(Ledger(tmp_path, "annotate"), "00000", "f")
