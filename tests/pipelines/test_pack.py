"""Data that are no tars, through the verbs: annotated, selected and packed as the same samples in tars are."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import capfilt as api
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.errors import RunError

SCORED = ("uid", "source", "text", "status", "reason", "itm", "itc")


@pytest.fixture
def samples(finished_run: Path) -> list[Sample]:
    """Six samples of the embedded world."""
    items = [item for item in shards.read(str(finished_run / "data/web/00001.tar")) if isinstance(item, Sample)]
    return [replace(item, key=f"k{number}", meta={"uid": item.uid}) for number, item in enumerate(items[:6])]


@pytest.fixture
def sources(samples: list[Sample], tmp_path: Path) -> dict[str, Path]:
    """The same samples as a tar, as a folder of pictures, and as Parquet."""
    shards.write(tmp_path / "tars/00000.tar", samples)
    folder = tmp_path / "photos"
    folder.mkdir()
    for sample in samples:
        (folder / f"{sample.key}.{sample.extension}").write_bytes(sample.image)
    lines = [{"file_name": f"{s.key}.{s.extension}", "text": s.text, "uid": s.uid} for s in samples]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = {"image": [s.image for s in samples], "text": [s.text for s in samples], "uid": [s.uid for s in samples]}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    return {"tar": tmp_path / "tars", "folder": folder, "parquet": tmp_path / "pairs.parquet"}


def test_the_same_samples_have_the_same_scores_from_any_source(
    finished_run: Path, sources: dict[str, Path], tmp_path: Path, capfilt: Any
) -> None:
    models = ("--captioner", finished_run / "round-1/captioner", "--filter", finished_run / "round-1/filter")
    words = ("annotate", *sources.values(), *models, "--out", tmp_path / "a", "--address", "local", "--json")
    done = capfilt(*words)
    assert done.code == 0, done.err
    assert json.loads(done.out)["samples"] == {"in": 18, "kept": 18, "dropped": 0, "failed": 0}
    names = ("00000", "photos-000000", "pairs-000000")
    tables = [pq.read_table(tmp_path / f"a/annotations/{name}.parquet").to_pylist() for name in names]
    scored = [[[row[name] for name in SCORED] for row in table] for table in tables]
    assert scored[0] == scored[1] == scored[2]
    assert len(scored[0]) == 12

    before = {name: (tmp_path / f"a/ledger/annotate/{name}.json").stat().st_mtime_ns for name in names}
    lines = (sources["folder"] / "metadata.jsonl").read_text()
    (sources["folder"] / "metadata.jsonl").write_text(lines.replace('"text": "', '"text": "really ', 1))
    os.utime(sources["parquet"])  # a touch is no change
    done = capfilt(*words)
    assert done.code == 0, done.err
    rows = pq.read_table(tmp_path / "a/annotations/photos-000000.parquet").to_pylist()
    assert sum(row["text"].startswith("really ") for row in rows) == 1
    again = {name for name in names if (tmp_path / f"a/ledger/annotate/{name}.json").stat().st_mtime_ns > before[name]}
    assert again == {"photos-000000", "pairs-000000"}, "of the Parquet its new time of writing alone"

    select = ("select", *sources.values(), "--annotations", tmp_path / "a", "--threshold", "0", "--out", tmp_path / "s")
    done = capfilt(*select, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["samples"]["kept"] == 18
    found = capfilt("explain", tmp_path / "s", "pairs-00000002")
    assert found.code == 0
    assert "pairs-000000" in found.out


def test_packed_shards_have_the_bytes_uids_and_texts_of_what_they_were(
    samples: list[Sample], sources: dict[str, Path], tmp_path: Path, capfilt: Any
) -> None:
    (sources["folder"] / "gone.gif").write_bytes(b"GIF89a")
    done = capfilt("pack", sources["folder"], sources["parquet"], "--out", tmp_path / "p", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["samples"] == {"in": 13, "kept": 12, "dropped": 0, "failed": 1}
    assert answer["failed"] == {"gif is not read": 1}
    assert json.loads((tmp_path / "p/sizes.json").read_text()) == {"00000.tar": 6, "00001.tar": 6}
    wanted = [(sample.image, sample.uid, sample.sha256, sample.text) for sample in samples]
    for name in ("00000", "00001"):
        packed = [item for item in shards.read(str(tmp_path / f"p/{name}.tar")) if isinstance(item, Sample)]
        assert [(item.image, item.meta["uid"], item.meta["sha256"], item.text) for item in packed] == wanted
    rows = pq.read_table(tmp_path / "p/00000.parquet").to_pylist()
    assert [(row["key"], row["caption"], row["status"]) for row in rows[1:]] == [
        (sample.key, sample.text, "success") for sample in samples
    ]
    assert (rows[0]["key"], rows[0]["status"], rows[0]["uid"]) == ("gone", "failed", None)
    assert rows[0]["error_message"] == "gif is not read (jpg, jpeg, png, webp are)"
    assert shards.expand(str(tmp_path / "p")) == [str(tmp_path / f"p/{name}.tar") for name in ("00000", "00001")]

    kept = (tmp_path / "p/00000.tar").stat().st_mtime_ns, (tmp_path / "p/00000.tar").read_bytes()
    (tmp_path / "p/00001.tar").unlink()
    again = api.pack([sources["folder"], sources["parquet"]], out=tmp_path / "p", address="local")
    assert again.samples.kept == 12
    assert len(list(again.rows())) == 12
    assert ((tmp_path / "p/00000.tar").stat().st_mtime_ns, (tmp_path / "p/00000.tar").read_bytes()) == kept
    with pytest.raises(RunError, match="was planned otherwise"):
        api.pack(sources["tar"], out=tmp_path / "p", address="local")
