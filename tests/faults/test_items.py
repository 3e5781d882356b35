"""Samples that hang and samples that kill."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest


def test_a_sample_kills_its_worker(
    nodes: Any, web: Path, driver: Any, survives: Any, tmp_path: Path, spoiled: Any, choice: int
) -> None:
    survived = survives("a sample that kills its worker")
    chance = random.Random(choice)
    shard, place = chance.randrange(40), chance.randrange(5)
    folder = spoiled({shard: {place: "die"}})
    run = driver("--address", nodes.address, shards=folder)
    answer = json.loads(run.run())
    assert answer["samples"] == {"in": 200, "kept": 199, "dropped": 0, "failed": 1}
    assert answer["failed"] == {"killed its worker": 1}
    [record] = (run.out / "poison/toy").iterdir()
    assert record.name == f"{shard:05d}.json"
    assert json.loads(record.read_bytes())["samples"].keys() == {str(place)}
    # The same in one process, which would not live through it, with what is known by now.
    again = driver(shards=folder, out="again")
    shutil.copytree(run.out / "poison", again.out / "poison")
    again.run("--unlocked")
    survived(run, expected=again.outputs())


@pytest.mark.slow
def test_a_sample_hangs(nodes: Any, driver: Any, spoiled: Any, record: Any, undisturbed: Any, choice: int) -> None:
    shard = random.Random(choice).randrange(40)
    run = driver("--address", nodes.address, "--limit", "2", shards=spoiled({shard: {2: "hang"}}))
    row = record.begin("a job that hangs (its shard fails with a reason, the others are done)")
    code, _, err = run.start().end()
    assert code == 1
    assert "took longer than 2 s, twice" in err
    failed = json.loads((run.out / "ledger/toy.failed.jsonl").read_bytes())
    assert failed["shard"] == f"{shard:05d}"
    made = run.outputs()
    row.survived += len(made) == 78
    tables = {name: made[name] for name in made if name.startswith("annotations")}
    row.equal += all(undisturbed[name] == data for name, data in tables.items())
    assert len(tables) == 39
    assert all(undisturbed[name] == data for name, data in tables.items())
