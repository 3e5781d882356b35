"""Parquet that unpacks to gigabytes, or whose values no writer of ours gives: one line, in bounded memory."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.data import annotations, parquet
from capfilt.data.policy import PolicyConfig
from capfilt.errors import DataError
from capfilt.pipelines.inspect import explain
from capfilt.reporting import sampling

ROW = {
    "key": "00000", "uid": "0" * 32, "sha256": "0" * 64, "source": "web", "candidate": 0, "text": "a dog", "itm": 0.5,
    "itc": 0.1, "captioner": "", "filter": "f", "seed": 0, "round": 0, "status": "ok", "reason": "",
}  # fmt: skip
MEGABYTES = 600


@pytest.fixture(autouse=True)
def cheap() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


def references(values: dict[str, Any], count: int, path: Path) -> None:
    """A row of annotations, many times, its texts stored once."""
    zeros = np.zeros(count, np.int32)
    columns = {
        name: pa.DictionaryArray.from_arrays(zeros, [value])
        if isinstance(value, str)
        else pa.array(np.full(count, value)).cast(annotations.SCHEMA.field(name).type)
        for name, value in values.items()
    }
    fields = [pa.field(f.name, columns[f.name].type, f.nullable) for f in annotations.SCHEMA]
    pq.write_table(pa.table(list(columns.values()), pa.schema(fields)), path, store_schema=False, compression="zstd")


def long_text(path: Path) -> None:
    """20 GB."""
    references({**ROW, "text": "a" * 10**6}, 20_000, path)


def many_rows(path: Path) -> None:
    references(ROW, parquet.MAX_ROWS + 1, path)


def packed_pages(path: Path) -> None:
    """240 MB that are stored once each, and packed."""
    table = pa.Table.from_pylist([{**ROW, "text": "x" * 10**6}] * 10, annotations.SCHEMA)
    with pq.ParquetWriter(path, annotations.SCHEMA, use_dictionary=False, compression="zstd") as file:
        for _ in range(24):
            file.write_table(table)


@pytest.mark.parametrize("bomb", [long_text, many_rows, packed_pages])
def test_a_bomb_is_one_line(bomb: Any, tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    bomb(path)
    assert path.stat().st_size < 200_000
    for read in (annotations.read, lambda path: explain.read(path, "00000")):
        with pytest.raises(DataError, match="more than 300,000 rows or 192 MiB") as answer:
            read(path)
        assert "\n" not in str(answer.value)


def test_a_bomb_of_lists_is_one_line(tmp_path: Path) -> None:
    captions = pa.list_(pa.struct([("text", pa.string())]))
    rows = pa.array([[{"text": "x" * 10**6}] * 25] * 10, captions)
    pq.write_table(pa.table({"key": ["a"] * 10, "captions": rows}), tmp_path / "a.parquet", compression="zstd")
    with pytest.raises(DataError, match="192 MiB"):
        explain.read(tmp_path / "a.parquet", "a")


def test_other_rows_than_the_wanted_ones_cost_nothing(tmp_path: Path) -> None:
    long_text(tmp_path / "a.parquet")
    assert explain.read(tmp_path / "a.parquet", "00001") == []


@pytest.mark.parametrize("values", [
    {"source": "x\x1b[2J"}, {"status": "fine"}, {"itm": float("nan")}, {"itm": 1.5}, {"itc": -2.0}, {"candidate": -1},
], ids=str)  # fmt: skip
def test_values_that_break_the_contract_are_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    pq.write_table(pa.Table.from_pylist([ROW, {**ROW, **values}], annotations.SCHEMA), path)
    with pytest.raises(DataError, match=f"has a row whose {next(iter(values))} no annotation has"):
        annotations.read(path)


def test_text_that_is_no_utf8_is_one_line(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([ROW], annotations.SCHEMA)
    texts = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    table = table.set_column(5, annotations.SCHEMA.field("text"), texts)
    pq.write_table(table, tmp_path / "00000.parquet")
    with pytest.raises(DataError, match="Invalid UTF8"):
        annotations.read(tmp_path / "00000.parquet")


def test_all_scores_may_be_missing_and_a_table_empty(tmp_path: Path) -> None:
    for count in (0, 2):
        table = pa.Table.from_pylist([{**ROW, "itm": None, "itc": None}] * count, annotations.SCHEMA)
        pq.write_table(table, tmp_path / "00000.parquet")
        assert annotations.read(tmp_path / "00000.parquet").equals(table)


def test_columns_of_every_kind_are_read_as_they_are(tmp_path: Path) -> None:
    captions = pa.list_(pa.struct([("text", pa.string()), ("source", pa.string())]))
    table = pa.table({
        "key": ["a", "b"], "day": [date(2026, 1, 1), None], "data": [b"1", b"\xff"],
        "large": pa.array(["x", None], pa.large_string()), "a.b": [1, None],
        "captions": pa.array([[{"text": "q", "source": "web"}] * 3, None], captions), "flag": [True, None],
        "floats": pa.array([[1.0, 2.0], None], pa.list_(pa.float32())), "nothing": pa.nulls(2),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    assert parquet.read(tmp_path / "a.parquet").equals(table)
    (result,) = explain.read(tmp_path / "a.parquet", "a")
    assert list(result) == [name for name in table.column_names if name != "data"]
    assert json.loads(json.dumps(result))["day"] == "2026-01-01"


def test_a_column_whose_values_have_no_bound_is_refused(tmp_path: Path) -> None:
    wide = pa.array([None], pa.binary(2**20))
    pq.write_table(pa.table({"key": ["a"], "wide": wide}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a column that no table here has: 'wide'"):
        parquet.read(tmp_path / "a.parquet")
    assert explain.read(tmp_path / "a.parquet", "a") == [{"key": "a"}]


def test_an_image_of_too_many_texts_makes_no_page_of_them(tmp_path: Path) -> None:
    rows = [annotations.Annotation(**{**ROW, "candidate": i}) for i in range(sampling.MAX_TEXTS_OF_IMAGE + 50)]
    annotations.write(tmp_path / "annotations/00000.parquet", rows)
    rule = PolicyConfig().rule(0.5)
    sample = sampling.RoundSample(
        sampling.RoundSource(0, tmp_path / "annotations", None, rule, "itm", 0.5, "", ""), 20_000
    )
    sample.add("00000", {}, sample=True)
    assert (sample.num_rows, sample.counts.totals["web"]) == (
        sampling.MAX_TEXTS_OF_IMAGE,
        sampling.MAX_TEXTS_OF_IMAGE + 50,
    )


def test_what_could_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_ROWS", 1)
    with pytest.raises(DataError, match="make smaller shards"):
        annotations.write(tmp_path / "a.parquet", [annotations.Annotation(**{**ROW, "candidate": i}) for i in range(2)])
    assert list(tmp_path.iterdir()) == []
