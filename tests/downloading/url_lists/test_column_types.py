"""One type for each column of a list, and lists of texts."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.downloading import plans
from capfilt.downloading.plans import ShardLayout
from capfilt.downloading.url_lists.column_types import TypeClash, Types
from capfilt.downloading.url_lists.files import BadRows, find_files
from capfilt.downloading.url_lists.tables import Columns, read_tables
from capfilt.errors import DataError

TEXTS = Columns(caption_col="caption")


def read(path: Path, columns: Columns = TEXTS, types: Types | None = None) -> pa.Table:
    bad_rows = BadRows()
    types = {} if types is None else types
    table = pa.concat_tables(
        [table for file in find_files([str(path)]) for table in read_tables(file, columns, types, bad_rows)]
    )
    assert bad_rows.count == 0
    return table


class TestTypes:
    def test_of_a_csv(self, tmp_path: Path) -> None:
        path = tmp_path / "list.csv"
        path.write_text("url,i,f,b,s,none,when\n1,1,1.5,true,a,,2020-01-01\n2,,NaN,false,,,2020-01-02\n")
        columns = Columns(save_additional_columns=("i", "f", "b", "s", "none", "when"))
        assert read(path, columns).to_pylist() == [
            {"i": 1, "f": 1.5, "b": True, "s": "a", "none": "", "when": "2020-01-01", "url": "1"},
            {"i": None, "f": None, "b": False, "s": "", "none": "", "when": "2020-01-02", "url": "2"},
        ]

    def test_what_json_cannot_say_becomes_text(self, tmp_path: Path) -> None:
        rows = [{"url": "u", "when": date(2020, 1, 2), "price": Decimal("1.50"), "tags": ["a"], "d": {"x": 1}}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
        columns = Columns(save_additional_columns=("when", "price", "tags", "d"))
        [row] = read(tmp_path / "list.parquet", columns).to_pylist()
        assert row == {"when": "2020-01-02", "price": "1.50", "tags": ["a"], "d": {"x": 1}, "url": "u"}
        json.dumps(row)

    def test_bytes_are_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"url": ["u"], "raw": [b"x"]}), tmp_path / "list.parquet")
        with pytest.raises(DataError, match="column 'raw' holds bytes"):
            read(tmp_path / "list.parquet", Columns(save_additional_columns=("raw",)))

    def test_dictionaries_and_large_strings_are_text(self, tmp_path: Path) -> None:
        table = pa.table(
            {"url": pa.array(["u", "v"], pa.large_string()), "kind": pa.array(["a", "a"]).dictionary_encode()}
        )
        pq.write_table(table, tmp_path / "list.parquet")
        made = read(tmp_path / "list.parquet", Columns(save_additional_columns=("kind",)))
        assert made.schema.types == [pa.string(), pa.string()]

    @pytest.mark.parametrize(
        ("first", "later", "wider"),
        [
            ("1", "1.5", pa.float64()),
            ("1", "x", pa.string()),
            ("true", "maybe", pa.string()),
            ("1.5", "x", pa.string()),
        ],
    )
    def test_a_later_row_that_does_not_fit_is_a_clash(
        self, tmp_path: Path, first: str, later: str, wider: pa.DataType
    ) -> None:
        for name, value in (("a", first), ("b", later)):
            (tmp_path / f"{name}.csv").write_text(f"url,n\nu,{value}\n")
        types: Types = {}
        columns = Columns(save_additional_columns=("n",))
        read(tmp_path / "a.csv", columns, types)
        with pytest.raises(TypeClash) as caught:
            read(tmp_path / "b.csv", columns, types)
        assert (caught.value.column, caught.value.wider) == ("n", wider)

    def test_a_json_column_of_many_kinds_is_text(self, tmp_path: Path) -> None:
        (tmp_path / "list.json").write_text('[{"url": "u", "n": 1}, {"url": "v", "n": "x"}]')
        with pytest.raises(TypeClash):
            read(tmp_path / "list.json", Columns(save_additional_columns=("n",)))
        made = read(tmp_path / "list.json", Columns(save_additional_columns=("n",)), {"n": pa.string()})
        assert made["n"].to_pylist() == ["1", "x"]

    def test_half_a_character_can_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "list.json").write_text('[{"url": "u", "text": "a\\ud800b"}]')
        assert read(tmp_path / "list.json", Columns(caption_col="text"))["caption"].to_pylist() == ["a?b"]


class TestSeveralTexts:
    TWO: list[Any] = [["one", "two"], [], None, ["", "three"], "four"]

    def check(self, table: pa.Table) -> None:
        assert table.column_names == ["caption", "captions", "url"]
        assert table["caption"].to_pylist() == ["one", None, None, "three", "four"]
        assert table["captions"].to_pylist() == [
            [{"text": "one", "source": "web"}, {"text": "two", "source": "web"}],
            None,
            None,
            [{"text": "three", "source": "web"}],
            [{"text": "four", "source": "web"}],
        ]

    def test_of_a_json(self, tmp_path: Path) -> None:
        rows = [{"url": "u", "caption": caption} for caption in self.TWO]
        (tmp_path / "list.json").write_text(json.dumps(rows))
        plans.plan_list(tmp_path / "plan", find_files([str(tmp_path / "list.json")]), TEXTS, ShardLayout(size=10))
        self.check(plans.read(tmp_path / "plan", "00000"))

    def test_of_a_parquet(self, tmp_path: Path) -> None:
        rows = [{"url": "u", "caption": [c] if isinstance(c, str) else c} for c in self.TWO]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
        plans.plan_list(tmp_path / "plan", find_files([str(tmp_path / "list.parquet")]), TEXTS, ShardLayout(size=10))
        self.check(plans.read(tmp_path / "plan", "00000"))

    def test_that_come_late_are_in_every_shard(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("caption,url\nplain,u\n")
        (tmp_path / "b.jsonl").write_text('{"url": "v", "caption": ["x", "y"]}\n')
        plans.plan_list(tmp_path / "plan", find_files([str(tmp_path)]), TEXTS, ShardLayout(size=10))
        first, second = (plans.read(tmp_path / "plan", shard) for shard in ("00000", "00001"))
        assert first.schema == second.schema
        assert first["captions"].to_pylist() == [[{"text": "plain", "source": "web"}]]
        assert second["caption"].to_pylist() == ["x"]

    @pytest.mark.parametrize(
        ("row", "said"),
        [
            (
                {"url": "u", "caption": {"en": "a"}},
                r"a caption is \{\"en\": \"a\"\}; allowed is a text and a list of texts",
            ),
            ({"url": "u", "caption": [{"x": 1}]}, r"a caption is \{\"x\": 1\}; allowed are a text and a list of texts"),
            ({"url": ["u", "v"], "caption": "a"}, r"a url is \[\"u\", \"v\"\]; allowed is a text"),
        ],
    )
    def test_other_nesting_is_refused(self, tmp_path: Path, row: Any, said: str) -> None:
        (tmp_path / "list.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=said):
            read(tmp_path / "list.jsonl")
