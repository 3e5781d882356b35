from __future__ import annotations

import dataclasses
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data import annotations
from capfilt.data.annotations import SCHEMA, Annotation
from capfilt.errors import DataError

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def row(**changes):
    plain = Annotation("k", "u", "s", "web", 0, "a dog", 0.5, -0.25, "", "blip:f", 7, 1)
    return dataclasses.replace(plain, **changes)


ROWS = st.builds(
    Annotation,
    key=TEXT,
    uid=TEXT,
    sha256=TEXT,
    source=st.sampled_from(annotations.SOURCES),
    candidate=st.integers(0, 2**15 - 1),
    text=TEXT,
    itm=st.none() | st.floats(0, 1, width=32),
    itc=st.none() | st.floats(-1, 1, width=32),
    captioner=TEXT,
    filter=TEXT,
    seed=st.integers(-(2**63), 2**63 - 1),
    round=st.integers(0, 2**15 - 1),
)


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    found=st.lists(ROWS, max_size=6, unique_by=lambda one: (one.key, one.source, one.candidate)),
)
def test_rows_come_back_sorted_and_the_bytes_do_not_depend_on_their_order(tmp_path_factory, data, found):
    folder = tmp_path_factory.mktemp("annotations")
    assert annotations.write(folder / "a.parquet", found) == len(found)
    table = annotations.read(folder / "a.parquet")
    assert list(annotations.rows(table)) == sorted(found, key=lambda one: (one.key, one.source, one.candidate))
    annotations.write(folder / "b.parquet", data.draw(st.permutations(found)))
    assert (folder / "a.parquet").read_bytes() == (folder / "b.parquet").read_bytes()


def test_the_columns_are_the_fields_in_the_contracts_types(tmp_path):
    assert [field.name for field in dataclasses.fields(Annotation)] == [*SCHEMA.names, "prompt", "scores"]
    types = {name: str(SCHEMA.field(name).type) for name in SCHEMA.names}
    numbers = {"candidate": "int16", "itm": "float", "itc": "float", "seed": "int64", "round": "int16"}
    assert types == {name: numbers.get(name, "string") for name in SCHEMA.names}
    annotations.write(tmp_path / "a.parquet", [row()])
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(0)
    assert column.compression == "ZSTD"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"itm": 1.1}, r"itm 1\.1; allowed is \[0, 1\]"),
        ({"itm": -0.1}, "itm"),
        ({"itm": math.nan}, "itm nan"),
        ({"itc": -1.1}, r"allowed is \[-1, 1\]"),
        ({"itc": math.inf}, "itc inf"),
        ({"source": "flickr"}, "allowed are web, synthetic, human"),
        ({"status": "done"}, "allowed are ok, failed"),
        ({"status": "failed"}, "without a reason"),
        ({"candidate": -1}, "count from 0"),
        ({"candidate": 2**15}, "do not fit"),
        ({"text": "\ud800"}, "do not fit"),
        ({"text": None}, "do not fit"),
        ({"seed": 2**63}, "do not fit"),
    ],
)
def test_a_row_that_breaks_the_contract_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        annotations.write(tmp_path / "a.parquet", [row(), row(key="l", **changes)])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_row_keeps_its_reason_and_no_scores(tmp_path):
    failed = row(itm=None, itc=None, status="failed", reason="truncated image")
    annotations.write(tmp_path / "a.parquet", [failed])
    assert list(annotations.rows(annotations.read(tmp_path / "a.parquet"))) == [failed]


def test_an_ok_row_may_carry_a_remark(tmp_path):
    annotations.write(tmp_path / "a.parquet", [row(reason="no text")])
    assert list(annotations.rows(annotations.read(tmp_path / "a.parquet"))) == [row(reason="no text")]


def test_reading_what_is_no_annotation_is_one_readable_error(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        annotations.read(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match="cannot read"):
        annotations.read(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"holds other columns .* key string"):
        annotations.read(tmp_path / "other.parquet")
