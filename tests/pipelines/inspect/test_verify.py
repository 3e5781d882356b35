from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Bytes = dict[str, bytes]


def outputs(run: Path) -> Bytes:
    """What a run is for: everything but its logs and Ray's own files."""
    skip = ("log.jsonl", "summary.json", "report.html", ".plan.jsonl", ".pace.json", ".usage.jsonl")
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and not path.name.endswith(skip) and "/ray/" not in str(path)
    }


def flip(path: Path) -> None:
    """Change a byte in the middle; the size stays, and so does the time of writing."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_sound_run_holds(finished_run: Path, capfilt: Any, snapshot: Any) -> None:
    before = snapshot(finished_run)
    done = capfilt("verify", finished_run, "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["broken"] == []
    assert (answer["shards"], answer["undone"]) == (32, 0)
    assert answer["files"] > 20
    assert snapshot(finished_run) == before
    assert "everything is as it was committed" in capfilt("verify", finished_run).out


def test_a_changed_byte_is_found_and_just_that_is_done_again(
    run_copy: Path, finished_run: Path, capfilt: Any, snapshot: Any
) -> None:
    flip(run_copy / "round-1/annotations/00001.parquet")
    done = capfilt("verify", run_copy)
    assert done.code == 1
    assert "round-1: annotate, shard 00001: " in done.out
    assert "does not have the bytes that were committed" in done.out
    assert f"1 are not as committed: `capfilt verify {run_copy} --mend`, then the same command" in done.out
    done = capfilt("verify", run_copy, "--mend")
    assert done.code == 0
    assert "1 withdrawn" in done.out
    before = snapshot(run_copy)
    again = capfilt("bootstrap", finished_run.parent / "mine.yaml", "--out", run_copy)
    assert again.code == 0, again.err
    after = snapshot(run_copy)
    written = {name for name in after if after[name] != before.get(name)}
    assert written == {
        "round-1/annotations/00001.parquet", "round-1/ledger/annotate/00001.json",
        "report.html", "summary.json",
    }  # fmt: skip
    assert outputs(run_copy) == outputs(finished_run)
    assert capfilt("verify", run_copy).code == 0


def test_every_kind_of_damage_is_named(run_copy: Path, capfilt: Any) -> None:
    home = run_copy / "round-1"
    (home / "annotations/00000.parquet").unlink()
    with (home / "dataset/00000.tar").open("r+b") as tar:
        tar.truncate(1000)
    torn = home / "ledger/annotate/00002.json"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    (home / "ledger/select/00002.json").rename(home / "ledger/select/00009.json")
    answer = json.loads(capfilt("verify", run_copy, "--json").out)
    result = {(piece["stage"], piece["shard"]): piece["why"] for piece in answer["broken"]}
    assert result.keys() == {("annotate", "00000"), ("annotate", "00002"), ("select", "00000"), ("select", "00009")}
    assert "is not there" in result["annotate", "00000"]
    assert result["annotate", "00002"] == "its completion cannot be read"
    assert "has 1000 bytes" in result["select", "00000"]
    assert result["select", "00009"] == "its completion is that of shard 00002"


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda tally: tally["samples"].update({"in": 21}), "samples: 21 in, but"),
        (lambda tally: tally["samples"].update({"in": 19, "kept": 0, "dropped": 19}), "20 samples were annotated, 19"),
        (
            lambda tally: tally["texts"].update({"in": {"web": 20}, "kept": {"web": 20}, "dropped": {}}),
            "20 synthetic texts were annotated, 0 have a verdict",
        ),
    ],
)
def test_what_got_lost_is_named(run_copy: Path, capfilt: Any, edit: Callable[[Any], None], why: str) -> None:
    path = run_copy / "round-1/ledger/select/00001.json"
    tree = json.loads(path.read_bytes())
    edit(tree["tally"])
    path.write_text(json.dumps(tree))
    done = capfilt("verify", run_copy)
    assert done.code == 1
    assert f"round-1: select, shard 00001: {why}" in done.out


def test_a_run_that_is_not_over_holds(run_copy: Path, capfilt: Any) -> None:
    (run_copy / "round-1/ledger/select/00001.json").unlink()
    done = capfilt("verify", run_copy)
    assert done.code == 0
    assert "1 shards are not done yet" in done.out


def test_inputs_are_compared_with_what_was_read(run_copy: Path, capfilt: Any) -> None:
    def inputs() -> tuple[int, dict[str, Any]]:
        done = capfilt("verify", run_copy, "--inputs", "--json")
        return done.code, json.loads(done.out)["inputs"]

    assert inputs() == (0, {"compared": 6, "unrecorded": 0, "changed": []})
    web = run_copy / "data/web/00001.tar"
    recorded = json.loads((run_copy / "round-1/ledger/annotate/00001.json").read_bytes())
    digest = hashlib.sha256(web.read_bytes()).hexdigest()
    assert recorded["input"] == {
        "bytes": web.stat().st_size, "sha256": digest, "version": str(web.stat().st_mtime),
    }  # fmt: skip
    old = run_copy / "round-1/ledger/select/00002.json"
    old.write_text(json.dumps({key: value for key, value in json.loads(old.read_bytes()).items() if key != "input"}))
    assert inputs() == (0, {"compared": 5, "unrecorded": 1, "changed": []})
    flip(web)
    (run_copy / "data/web/00000.tar").unlink()
    code, answer = inputs()
    assert code == 1
    gone, other = "the run does not name such a shard any more", "it does not have the bytes that were read"
    result = {(piece["stage"], piece["shard"]): piece["why"] for piece in answer["changed"]}
    stages = ("annotate", "select")
    assert result == {(stage, shard): why for stage in stages for shard, why in (("00000", gone), ("00001", other))}
