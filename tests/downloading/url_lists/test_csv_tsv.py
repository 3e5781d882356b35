"""Lists as csv and tsv: no quote swallows a row silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from capfilt.downloading import plans
from capfilt.downloading.plans import ShardLayout
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
        planned = plans.plan_list(tmp_path / "plan", find_files([str(path)]), TEXTS, ShardLayout(size=100))
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
        found, bad_rows = rows_of(path)
        assert [(row["caption"], row["url"]) for row in found] == [
            ("a cat", "u1"), ('say "hi"', "u2"), ('b "c", d', "u3"), ("two\r\nlines", "u4"), ("f", "u6"),
        ]  # fmt: skip
        assert bad_rows == 1

    def test_other_encodings_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_bytes("caption,url\nschön,u1\n".encode("latin-1"))
        with pytest.raises(DataError, match="cannot be read: 'utf-8' codec can't decode"):
            rows_of(tmp_path / "list.csv")

    def test_a_tsv_that_is_called_csv_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text("caption\turl\na\tu\n")
        with pytest.raises(DataError, match=r"list.csv: its first line has tabs and no commas; say --input-format tsv"):
            rows_of(tmp_path / "list.csv")
