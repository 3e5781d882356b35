"""Lists as json and jsonl: decoded in parts, in every shape that pandas writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from capfilt.downloading.url_lists import files, json_reader
from capfilt.downloading.url_lists.files import BadRows, find_files
from capfilt.downloading.url_lists.tables import Columns, read_tables
from capfilt.errors import DataError

TEXTS = Columns(caption_col="caption")


def rows_of(path: Path | str, columns: Columns = TEXTS) -> tuple[list[dict[str, Any]], int]:
    """All rows of a list, and how many rows cannot be read."""
    bad_rows = BadRows()
    types: Any = {}
    found = [table for file in find_files([str(path)]) for table in read_tables(file, columns, types, bad_rows)]
    return pa.concat_tables(found).to_pylist(), bad_rows.count


CELLS = [{"url": f"http://h/{i}", "caption": f"text {i}"} for i in range(3)]
SHAPES: dict[str, Any] = {
    "records": CELLS,
    "list": {name: [row[name] for row in CELLS] for name in ("url", "caption")},
    "columns": {name: {str(i): row[name] for i, row in enumerate(CELLS)} for name in ("url", "caption")},
    "index": {str(i): row for i, row in enumerate(CELLS)},
    "split": {"columns": ["url", "caption"], "index": [0, 1, 2], "data": [list(row.values()) for row in CELLS]},
    "table": {"schema": {"fields": []}, "data": CELLS},
}


class TestJson:
    @pytest.mark.parametrize("block", [1, 7, 64])
    def test_json_is_decoded_as_it_comes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
        monkeypatch.setattr(files, "BLOCK", block)
        path = tmp_path / "list.json"
        path.write_text(" [ " + " ,\n".join(json.dumps(row, ensure_ascii=False) for row in CELLS) + "\n]\n")
        assert len(rows_of(path)[0]) == len(CELLS)
        path.write_text("\n".join(json.dumps(row) for row in CELLS))
        assert len(rows_of(path)[0]) == len(CELLS), "one object a line, although it is called .json"

    @pytest.mark.parametrize("text", ["[1, 2]", '[{"url": "x"}', '[["x"]]', "[{'url': 1}]", "nothing"])
    def test_other_json_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(DataError, match=r"list\.json cannot be read: (this is no JSON|allowed are an array)"):
            rows_of(tmp_path / "list.json", Columns())


class TestPandas:
    @pytest.mark.parametrize("orient", SHAPES)
    def test_each_shape_is_read(self, tmp_path: Path, orient: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "BLOCK", 16)
        (tmp_path / "list.json").write_text(json.dumps(SHAPES[orient]))
        assert rows_of(tmp_path / "list.json") == ([{"caption": r["caption"], "url": r["url"]} for r in CELLS], 0)

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
    def test_what_is_no_table_is_reported(self, tmp_path: Path, value: Any, said: str) -> None:
        (tmp_path / "list.json").write_text(json.dumps(value))
        with pytest.raises(DataError, match=said):
            rows_of(tmp_path / "list.json")

    def test_an_object_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "BLOCK", 100)
        monkeypatch.setattr(json_reader, "MAX_OBJECT", 1000)
        (tmp_path / "list.json").write_text(json.dumps({"url": ["http://h/1"] * 1000}))
        with pytest.raises(DataError, match="one value of more than 1000 characters; write jsonl or Parquet"):
            rows_of(tmp_path / "list.json", Columns())
