from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.runs.ledger import Ledger
from capfilt.runs.tally import Tally


def first_row(finished_run: Path) -> dict[str, Any]:
    row: dict[str, Any] = pq.read_table(finished_run / "round-1/dataset/00001.parquet").to_pylist()[0]
    return row


@pytest.mark.parametrize("column", ["key", "uid", "sha256"])
def test_every_text_with_scores_models_and_verdict(finished_run: Path, capfilt: Any, column: str) -> None:
    row = first_row(finished_run)
    done = capfilt("explain", finished_run, row[column], "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    [chapter] = answer["found"]
    assert (chapter["folder"], chapter["stage"], chapter["shard"]) == ("round-1", "select", "00001")
    assert [(r["source"], r["candidate"]) for r in chapter["rows"]] == [("synthetic", 0), ("web", 0)]
    assert chapter["rows"][0] == row
    assert {r["verdict"] for r in chapter["rows"]} <= {"kept", "dropped"}
    assert all((r["verdict"] == "dropped") == bool(r["why"]) for r in chapter["rows"])
    assert answer["models"] == {
        chapter["rows"][0]["captioner"]: "round-1/captioner/checkpoint",
        chapter["rows"][0]["filter"]: "round-1/filter/checkpoint",
    }


def test_a_person_reads_it(finished_run: Path, capfilt: Any) -> None:
    row = first_row(finished_run)
    done = capfilt("explain", finished_run, row["key"])
    assert done.out.splitlines()[0] == "round-1  shard 00001  (select: dataset/00001.parquet)"
    assert f"key {row['key']}  uid {row['uid']}  sha256 {row['sha256']}  round 1" in done.out
    assert "written by round-1/captioner/checkpoint (blip-" in done.out
    assert "scored by round-1/filter/checkpoint (blip-" in done.out
    assert f"itm {row['itm']:.4f}  itc {row['itc']:.4f}" in done.out
    assert repr(row["text"]) in done.out


def test_a_model_from_elsewhere_is_named_by_its_family(run_copy: Path, capfilt: Any) -> None:
    (run_copy / "round-1/ledger/filter/model.json").unlink()
    done = capfilt("explain", run_copy, first_row(run_copy)["key"])
    assert "scored by a model of blip from elsewhere (blip-" in done.out


def test_before_there_is_a_verdict(run_copy: Path, capfilt: Any) -> None:
    shutil.rmtree(run_copy / "round-1/ledger/select")
    done = capfilt("explain", run_copy, first_row(run_copy)["key"])
    assert done.code == 0, done.err
    assert "(annotate: annotations/00001.parquet)" in done.out
    assert "no verdict yet" in done.out


def test_tables_of_stages_that_it_does_not_know(run_copy: Path, capfilt: Any) -> None:
    """What a downloader would leave, say."""
    row = first_row(run_copy)
    table = run_copy / "shards/00001.parquet"
    table.parent.mkdir()
    pq.write_table(pa.table({"key": [row["key"], "x"], "url": ["http://a/1.jpg", ""], "jpg": [b"1", b""]}), table)
    Ledger(run_copy, "download").commit("00001", "f", [table], Tally.zero())
    answer = json.loads(capfilt("explain", run_copy, row["key"], "--json").out)
    assert [chapter["stage"] for chapter in answer["found"]] == ["download", "select"]
    assert answer["found"][0]["rows"] == [{"key": row["key"], "url": "http://a/1.jpg"}]
    assert "  url: http://a/1.jpg\n" in capfilt("explain", run_copy, row["key"]).out


def test_an_image_that_is_not_there(finished_run: Path, capfilt: Any) -> None:
    done = capfilt("explain", finished_run, "nobody")
    assert done.code == 1
    assert "no image is called 'nobody'" in done.line
    assert "9 tables were read" in done.line
