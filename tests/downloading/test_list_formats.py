"""Rows of lists that were lost, or read as what they are not: quotes, pandas' shapes, Hive's folders, several texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.downloading import list_formats, plans, url_lists
from capfilt.downloading.url_lists import Columns, find
from capfilt.errors import DataError

TEXTS = Columns(caption_col="caption")


def rows_of(path: Path | str, columns: Columns = TEXTS) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of a list, and what is no row."""
    bad: list[str] = []
    types: Any = {}
    found = [table for source in find([str(path)]) for table in url_lists.tables(source, columns, types, bad)]
    return pa.concat_tables(found).to_pylist(), bad


def captions_of(path: Path | str) -> list[str]:
    return [row["caption"] for row in rows_of(path)[0]]


class TestQuotes:
    def write(self, path: Path, marked: dict[int, tuple[str, str]], count: int = 60) -> Path:
        """A list of so many rows, with something before and behind some of the captions."""
        sign = "\t" if path.suffix == ".tsv" else ","
        marks = [marked.get(i, ("", "")) for i in range(count)]
        lines = [f"{a}caption {i}{b}{sign}http://h.test/{i}.jpg\n" for i, (a, b) in enumerate(marks)]
        path.write_text(f"caption{sign}url\n" + "".join(lines))
        return path

    @pytest.mark.parametrize("marks", [{3: ('"', "")}, {3: ('"', ""), 40: ("", '"')}, {3: ('"', '"')}])
    def test_a_tsv_has_none(self, tmp_path: Path, marks: dict[int, tuple[str, str]]) -> None:
        path = self.write(tmp_path / "list.tsv", marks)
        expected = [f"{marks.get(i, ('', ''))[0]}caption {i}{marks.get(i, ('', ''))[1]}" for i in range(60)]
        assert captions_of(path) == expected
        planned = plans.plan_list(tmp_path / "plan", find([str(path)]), TEXTS, 100, 5)
        assert (planned.rows, planned.unreadable) == (60, 0)

    @pytest.mark.parametrize(
        ("marks", "said"),
        [
            ({3: ('"', "")}, "never closes"),
            ({59: ('"', "")}, "never closes"),
            ({3: ('"', ""), 40: ('"', "")}, "closes 37 lines later in the middle of a field"),
            ({3: ('"', ""), 40: ("", '"')}, "closes 37 lines later, behind lines that are rows"),
            ({3: ('"', ""), 4: ("", '"')}, "closes 1 lines later, behind lines that are rows"),
        ],
    )
    def test_one_of_a_csv_that_swallows_rows_is_named(
        self, tmp_path: Path, marks: dict[int, tuple[str, str]], said: str
    ) -> None:
        """The header is line 1, so row i lies in line i + 2."""
        path = self.write(tmp_path / "list.csv", marks)
        line = min(marks) + 2
        with pytest.raises(
            DataError, match=f"list.csv: line {line} opens a quote that {said}: '\"caption {min(marks)},"
        ):
            rows_of(path)

    def test_a_quoted_field_is_bounded(self, tmp_path: Path) -> None:
        path = tmp_path / "list.csv"
        path.write_text(f'caption,url\na,http://h/1\n"{"x" * 140_000}",http://h/2\n')
        with pytest.raises(DataError, match="line 3 has a field of more than 131072 characters"):
            rows_of(path)
        path.write_text('caption,url\n"' + "x,\n" * 11_000 + '",http://h/2\n')
        with pytest.raises(DataError, match="line 2 opens a quote that never closes within 10000 lines"):
            rows_of(path)

    def test_what_stays_in_its_line_harms_no_other(self, tmp_path: Path) -> None:
        path = tmp_path / "list.csv"
        path.write_text('caption,url\n"a" cat,u1\nsay "hi",u2\n"b ""c"", d",u3\n"two\r\nlines",u4\n\n"e,u5"\nf,u6\n')
        found, bad = rows_of(path)
        assert [(row["caption"], row["url"]) for row in found] == [
            ("a cat", "u1"), ('say "hi"', "u2"), ('b "c", d', "u3"), ("two\r\nlines", "u4"), ("f", "u6"),
        ]  # fmt: skip
        assert len(bad) == 1

    def test_other_encodings_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_bytes("caption,url\nschön,u1\n".encode("latin-1"))
        with pytest.raises(DataError, match="cannot be read: 'utf-8' codec can't decode"):
            rows_of(tmp_path / "list.csv")

    def test_a_tsv_that_is_called_csv_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("caption\turl\na\tu\n")
        with pytest.raises(DataError, match=r"list.csv: its first line has tabs and no commas; say --input-format tsv"):
            rows_of(tmp_path / "list.csv")

    def test_lines_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(list_formats, "MAX_LINE", 100)
        for form in ("csv", "jsonl", "txt"):
            (tmp_path / f"list.{form}").write_text("x" * 101)
            with pytest.raises(DataError, match="line 1 has more than 100 characters"):
                rows_of(tmp_path / f"list.{form}", Columns() if form == "txt" else TEXTS)


CELLS = [{"url": f"http://h/{i}", "caption": f"text {i}"} for i in range(3)]
SHAPES: dict[str, Any] = {
    "records": CELLS,
    "list": {name: [row[name] for row in CELLS] for name in ("url", "caption")},
    "columns": {name: {str(i): row[name] for i, row in enumerate(CELLS)} for name in ("url", "caption")},
    "index": {str(i): row for i, row in enumerate(CELLS)},
    "split": {"columns": ["url", "caption"], "index": [0, 1, 2], "data": [list(row.values()) for row in CELLS]},
    "table": {"schema": {"fields": []}, "data": CELLS},
}


class TestPandas:
    @pytest.mark.parametrize("orient", SHAPES)
    def test_each_shape_is_read(self, tmp_path: Path, orient: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(list_formats, "BLOCK", 16)
        (tmp_path / "list.json").write_text(json.dumps(SHAPES[orient]))
        assert rows_of(tmp_path / "list.json") == ([{"caption": r["caption"], "url": r["url"]} for r in CELLS], [])

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ([["http://h/1", "a"]], "allowed are an array of objects.*this holds an array"),
            ({"url": ["u", "v"], "caption": ["a"]}, r"not of one length \(url: 2, caption: 1\)"),
            ({"columns": ["url"], "data": [["u", "a"]]}, "row 1 of the table has not 1 cells"),
            ({"url": {"0": "u"}, "caption": {"1": "a"}}, "not the same labels"),
            ({"images": [{"id": 1}], "info": {}}, "no column 'caption'.*Columns: images, info"),
        ],
    )
    def test_what_is_no_table_is_told(self, tmp_path: Path, value: Any, said: str) -> None:
        (tmp_path / "list.json").write_text(json.dumps(value))
        with pytest.raises(DataError, match=said):
            rows_of(tmp_path / "list.json")

    def test_an_object_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(list_formats, "BLOCK", 100)
        monkeypatch.setattr(list_formats, "MAX_OBJECT", 1000)
        (tmp_path / "list.json").write_text(json.dumps({"url": ["http://h/1"] * 1000}))
        with pytest.raises(DataError, match="one value of more than 1000 characters; write jsonl or Parquet"):
            rows_of(tmp_path / "list.json", Columns())


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
        plans.plan_list(tmp_path / "plan", find([str(tmp_path / "list.json")]), TEXTS, 10, 5)
        self.check(plans.read(tmp_path / "plan", "00000"))

    def test_of_a_parquet(self, tmp_path: Path) -> None:
        rows = [{"url": "u", "caption": [c] if isinstance(c, str) else c} for c in self.TWO]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
        plans.plan_list(tmp_path / "plan", find([str(tmp_path / "list.parquet")]), TEXTS, 10, 5)
        self.check(plans.read(tmp_path / "plan", "00000"))

    def test_that_come_late_are_in_every_shard(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("caption,url\nplain,u\n")
        (tmp_path / "b.jsonl").write_text('{"url": "v", "caption": ["x", "y"]}\n')
        plans.plan_list(tmp_path / "plan", find([str(tmp_path)]), TEXTS, 10, 5)
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
            rows_of(tmp_path / "list.jsonl")


class TestNames:
    @pytest.mark.parametrize("name", ["list [2].csv", "what?.csv", "{a,b}.csv", "x{.csv", "part*.csv"])
    def test_one_that_is_there_is_no_pattern(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("url\nhttp://h/1\n")
        (tmp_path / "list 2.csv").write_text("url\nhttp://h/2\n")
        [source] = find([str(tmp_path / name)])
        assert rows_of(source.url, Columns()) == ([{"url": "http://h/1"}], [])

    def test_a_folder_with_signs_is_no_pattern(self, tmp_path: Path) -> None:
        (tmp_path / "run [1]").mkdir()
        (tmp_path / "run [1]" / "a [2].csv").write_text("url\nhttp://h/1\n")
        for spec in ("run [1]", "run [1]/a [2].csv", "run*", "*/*.csv"):
            assert [Path(source.url).name for source in find([str(tmp_path / spec)])] == ["a [2].csv"], spec

    def test_bad_braces_are_told(self) -> None:
        with pytest.raises(DataError, match=r"braces in '/none/\{a.csv'"):
            find(["/none/{a.csv"])

    def test_the_folders_of_hive_are_columns(self, tmp_path: Path) -> None:
        places = {"lang=en/year=2020": 1, "lang=de%20AT/year=2021": 2, "lang=__HIVE_DEFAULT_PARTITION__/year=2021": 3}
        for place, number in places.items():
            (tmp_path / "base" / place).mkdir(parents=True)
            rows = pa.table({"url": [f"http://h/{number}"], "caption": ["a"]})
            pq.write_table(rows, tmp_path / "base" / place / "part-0.parquet")
            (tmp_path / "base" / place / "_SUCCESS.json").touch()
        (tmp_path / "base" / "other").mkdir()
        (tmp_path / "base" / "other" / "not-a-list.csv").touch()
        columns = Columns(save_additional_columns=("lang", "year"))
        found, bad = rows_of(tmp_path / "base", columns)
        assert sorted((row["url"], row["lang"], row["year"]) for row in found) == [
            ("http://h/1", "en", 2020), ("http://h/2", "de AT", 2021), ("http://h/3", None, 2021),
        ]  # fmt: skip
        assert bad == []
        for spec in ("base/lang=en", "base/lang=e*/*/*.parquet"):
            assert rows_of(tmp_path / spec, columns)[0] == [{"lang": "en", "year": 2020, "url": "http://h/1"}]
        with pytest.raises(DataError, match=r"no column 'land'. Did you mean 'lang'?"):
            rows_of(tmp_path / "base", Columns(save_additional_columns=("land",)))
