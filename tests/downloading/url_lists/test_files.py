"""Which files a list is made of, by every way to name them, and what tells one version from another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.downloading.url_lists import files
from capfilt.downloading.url_lists.files import BadRows, find_files, identity
from capfilt.downloading.url_lists.tables import Columns, read_tables
from capfilt.errors import DataError

TEXTS = Columns(caption_col="caption")


def rows_of(path: Path | str, columns: Columns = TEXTS) -> tuple[list[dict[str, Any]], int]:
    """All rows of a list, and how many rows cannot be read."""
    bad_rows = BadRows()
    types: Any = {}
    found = [table for file in find_files([str(path)]) for table in read_tables(file, columns, types, bad_rows)]
    return pa.concat_tables(found).to_pylist(), bad_rows.count


class TestFind:
    def test_folders_globs_braces_and_urls(self, tmp_path: Path) -> None:
        for name in ("b.csv", "a.csv", "c.json.gz", "notes.md", "d.ndjson"):
            (tmp_path / name).touch()
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "deep.csv").touch()

        def found(spec: str, form: str | None = None) -> list[tuple[str, str, str]]:
            return [(Path(file.url).name, file.format, file.compression) for file in find_files([spec], form)]

        csvs = [("a.csv", "csv", ""), ("b.csv", "csv", "")]
        everything = [*csvs, ("c.json.gz", "json", "gzip"), ("d.ndjson", "jsonl", "")]
        assert found(str(tmp_path)) == everything
        assert found(str(tmp_path), "csv") == csvs
        assert found(f"{tmp_path}/*.csv") == csvs
        assert found(f"{tmp_path}/{{a,b}}.csv") == csvs
        assert found(f"file://{tmp_path}/a.csv") == csvs[:1]
        assert found(f"{tmp_path}/notes.md", "txt") == [("notes.md", "txt", "")]

    def test_urls_of_other_storages(self) -> None:
        with fsspec.open("memory://lists/x.csv", "w") as file:
            file.write("url\nhttp://h/1\n")
        [file] = find_files(["memory://lists/"])
        assert file.url == "memory:///lists/x.csv"
        assert rows_of("memory://lists/x.csv", Columns()) == ([{"url": "http://h/1"}], 0)

    @pytest.mark.parametrize(
        ("spec", "form", "said"),
        [
            ("absent.csv", None, "no list found at .*absent.csv"),
            ("*.csv", None, "no list found"),
            ("x.dat", None, "its name does not say its format; give --input-format"),
            ("x.dat", "cvs", "input format 'cvs'.*Did you mean 'csv'"),
        ],
    )
    def test_what_is_not_there(self, tmp_path: Path, spec: str, form: str | None, said: str) -> None:
        (tmp_path / "x.dat").touch()
        with pytest.raises(DataError, match=said):
            find_files([str(tmp_path / spec)], form)

    def test_a_list_is_known_by_its_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text("url\na\nb\n")
        before = identity(find_files([str(path)])[0], Columns())
        path.touch()
        assert identity(find_files([str(path)])[0], Columns()) == before
        path.write_text("url\nb\na\n")
        assert identity(find_files([str(path)])[0], Columns()) != before


class TestNames:
    @pytest.mark.parametrize("name", ["list [2].csv", "what?.csv", "{a,b}.csv", "x{.csv", "part*.csv"])
    def test_one_that_is_there_is_no_pattern(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("url\nhttp://h/1\n")
        (tmp_path / "list 2.csv").write_text("url\nhttp://h/2\n")
        [file] = find_files([str(tmp_path / name)])
        assert rows_of(file.url, Columns()) == ([{"url": "http://h/1"}], 0)

    def test_a_folder_with_signs_is_no_pattern(self, tmp_path: Path) -> None:
        (tmp_path / "run [1]").mkdir()
        (tmp_path / "run [1]" / "a [2].csv").write_text("url\nhttp://h/1\n")
        for spec in ("run [1]", "run [1]/a [2].csv", "run*", "*/*.csv"):
            assert [Path(file.url).name for file in find_files([str(tmp_path / spec)])] == ["a [2].csv"], spec

    def test_bad_braces_are_reported(self) -> None:
        with pytest.raises(DataError, match=r"braces in '/none/\{a.csv'"):
            find_files(["/none/{a.csv"])

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
        found, bad_rows = rows_of(tmp_path / "base", columns)
        assert sorted((row["url"], row["lang"], row["year"]) for row in found) == [
            ("http://h/1", "en", 2020), ("http://h/2", "de AT", 2021), ("http://h/3", None, 2021),
        ]  # fmt: skip
        assert bad_rows == 0
        for spec in ("base/lang=en", "base/lang=e*/*/*.parquet"):
            assert rows_of(tmp_path / spec, columns)[0] == [{"lang": "en", "year": 2020, "url": "http://h/1"}]
        with pytest.raises(DataError, match=r"no column 'land'. Did you mean 'lang'?"):
            rows_of(tmp_path / "base", Columns(save_additional_columns=("land",)))


class TestText:
    def test_lines_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "MAX_LINE", 100)
        for form in ("csv", "jsonl", "txt"):
            (tmp_path / f"list.{form}").write_text("x" * 101)
            with pytest.raises(DataError, match="line 1 has more than 100 characters"):
                rows_of(tmp_path / f"list.{form}", Columns() if form == "txt" else TEXTS)
