from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from capfilt.downloading import list_formats, url_lists
from capfilt.downloading.column_types import Clash, Types
from capfilt.downloading.url_lists import Columns, Source, find, identity
from capfilt.errors import DataError

ROWS = [{"url": f"http://h.test/{i}.jpg?a=1,2", "text": f'a "text" {i}, é', "n": i} for i in range(5)]
COLUMNS = Columns(caption_col="text", save_additional_columns=("n",))


def write_csv(path: Path) -> None:
    pyarrow.csv.write_csv(pa.Table.from_pylist(ROWS), path)


def write_tsv(path: Path) -> None:
    lines = ["\t".join(ROWS[0]), *("\t".join(map(str, row.values())) for row in ROWS)]
    path.write_text("\n".join(lines) + "\n")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "csv": write_csv,
    "tsv": write_tsv,
    "json": lambda path: path.write_text(json.dumps(ROWS)),
    "jsonl": lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)),
    "parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


def read(path: Path | Source, columns: Columns = COLUMNS, types: Types | None = None) -> pa.Table:
    source = path if isinstance(path, Source) else find([str(path)])[0]
    bad: list[str] = []
    table = pa.concat_tables(list(url_lists.tables(source, columns, {} if types is None else types, bad)))
    assert bad == []
    return table


def pack(path: Path, how: str) -> Path:
    packed = path.with_name(f"{path.name}.{how}")
    if how == "gz":  # two members, as parallel packers write
        data = path.read_bytes()
        packed.write_bytes(gzip.compress(data[:40]) + gzip.compress(data[40:]))
    else:
        with pa.CompressedOutputStream(str(packed), "zstd") as out:
            out.write(path.read_bytes())
    return packed


class TestFormats:
    @pytest.mark.parametrize(
        ("form", "how"),
        [("parquet", ""), *((form, how) for form in WRITERS if form != "parquet" for how in ("", "gz", "zst"))],
    )
    def test_all_say_the_same(self, tmp_path: Path, form: str, how: str) -> None:
        path = tmp_path / f"list.{form}"
        WRITERS[form](path)
        table = read(pack(path, how) if how else path)
        assert table.column_names == ["n", "caption", "url"], "img2dataset's order"
        assert table.schema.types == [pa.int64(), pa.string(), pa.string()]
        assert table.to_pylist() == [{"n": row["n"], "caption": row["text"], "url": row["url"]} for row in ROWS]

    def test_txt_has_urls_alone_one_a_line(self, tmp_path: Path) -> None:
        path = tmp_path / "list.txt"
        path.write_bytes("\ufeffhttp://h/1,2\r\n\n  http://h/é \nhttp://h/3".encode())
        assert read(path, Columns())["url"].to_pylist() == ["http://h/1,2", "http://h/é", "http://h/3"]
        assert read(pack(path, "zst"), Columns()).num_rows == 3

    def test_a_csv_cell_may_have_lines(self, tmp_path: Path) -> None:
        (tmp_path / "list.csv").write_text('url,text,n\nhttp://h/1,"two\nlines",1\n')
        assert read(tmp_path / "list.csv")["caption"].to_pylist() == ["two\nlines"]

    def test_rows_that_are_none_are_put_aside(self, tmp_path: Path) -> None:
        (tmp_path / "list.tsv").write_text("url\ttext\nhttp://h/1\ta\nhttp://h/2\nhttp://h/3\ta\tb\nhttp://h/4\td\n")
        (tmp_path / "list.jsonl").write_text(
            '{"url": "http://h/1", "text": "a"}\n{"url": \n7\n\n{"url": "http://h/4"}\n'
        )
        for name, num_bad in (("list.tsv", 2), ("list.jsonl", 2)):
            bad: list[str] = []
            source = find([str(tmp_path / name)])[0]
            table = pa.concat_tables(list(url_lists.tables(source, Columns(caption_col="text"), {}, bad)))
            assert table["url"].to_pylist() == ["http://h/1", "http://h/4"]
            assert len(bad) == num_bad

    @pytest.mark.parametrize("block", [1, 7, 64])
    def test_json_is_decoded_as_it_comes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
        monkeypatch.setattr(list_formats, "BLOCK", block)
        path = tmp_path / "list.json"
        path.write_text(" [ " + " ,\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n]\n")
        assert read(path).num_rows == len(ROWS)
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
        assert read(path).num_rows == len(ROWS), "one object a line, although it is called .json"

    @pytest.mark.parametrize("text", ["[1, 2]", '[{"url": "x"}', '[["x"]]', "[{'url': 1}]", "nothing"])
    def test_other_json_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(DataError, match=r"list\.json cannot be read: (this is no JSON|allowed are an array)"):
            read(tmp_path / "list.json", Columns())


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
        with pytest.raises(Clash) as caught:
            read(tmp_path / "b.csv", columns, types)
        assert (caught.value.column, caught.value.wider) == ("n", wider)

    def test_a_json_column_of_many_kinds_is_text(self, tmp_path: Path) -> None:
        (tmp_path / "list.json").write_text('[{"url": "u", "n": 1}, {"url": "v", "n": "x"}]')
        with pytest.raises(Clash):
            read(tmp_path / "list.json", Columns(save_additional_columns=("n",)))
        made = read(tmp_path / "list.json", Columns(save_additional_columns=("n",)), {"n": pa.string()})
        assert made["n"].to_pylist() == ["1", "x"]

    def test_half_a_character_can_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "list.json").write_text('[{"url": "u", "text": "a\\ud800b"}]')
        assert read(tmp_path / "list.json", Columns(caption_col="text"))["caption"].to_pylist() == ["a?b"]


class TestFind:
    def test_folders_globs_braces_and_urls(self, tmp_path: Path) -> None:
        for name in ("b.csv", "a.csv", "c.json.gz", "notes.md", "d.ndjson"):
            (tmp_path / name).touch()
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "deep.csv").touch()

        def found(spec: str, form: str | None = None) -> list[tuple[str, str, str]]:
            return [(Path(source.url).name, source.form, source.packed) for source in find([spec], form)]

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
        [source] = find(["memory://lists/"])
        assert source.url == "memory:///lists/x.csv"
        assert read(source, Columns())["url"].to_pylist() == ["http://h/1"]

    @pytest.mark.parametrize(
        ("spec", "form", "said"),
        [
            ("absent.csv", None, "no list found at .*absent.csv"),
            ("*.csv", None, "no list found"),
            ("x.dat", None, "its name does not say what it is; say --input-format"),
            ("x.dat", "cvs", "input format 'cvs'.*Did you mean 'csv'"),
        ],
    )
    def test_what_is_not_there(self, tmp_path: Path, spec: str, form: str | None, said: str) -> None:
        (tmp_path / "x.dat").touch()
        with pytest.raises(DataError, match=said):
            find([str(tmp_path / spec)], form)

    def test_a_missing_column_is_named_with_those_that_are_there(self, tmp_path: Path) -> None:
        for form, writer in WRITERS.items():
            writer(tmp_path / f"list.{form}")
            with pytest.raises(DataError, match=r"has no column 'txt'. Did you mean 'text'\? Columns: "):
                read(tmp_path / f"list.{form}", Columns(caption_col="txt"))

    def test_an_own_column_cannot_be_overwritten(self) -> None:
        with pytest.raises(ValidationError, match="status would overwrite a column of the output"):
            Columns(save_additional_columns=("uid", "status"))

    def test_a_column_is_named_once(self) -> None:
        with pytest.raises(ValidationError, match="'text' is named twice"):
            Columns(caption_col="text", save_additional_columns=("text",))

    def test_a_list_is_known_by_its_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "a.csv"
        path.write_text("url\na\nb\n")
        before = identity(find([str(path)])[0], Columns())
        path.touch()
        assert identity(find([str(path)])[0], Columns()) == before
        path.write_text("url\nb\na\n")
        assert identity(find([str(path)])[0], Columns()) != before


def test_a_long_list_is_read_in_little_memory(tmp_path: Path) -> None:
    """Twenty times the rows, no more memory: a process of its own says what its peak was."""
    script = """
import resource, sys
from pathlib import Path
from capfilt.downloading import list_formats, url_lists
from capfilt.downloading.url_lists import Columns
source = url_lists.find([sys.argv[1]])[0]
rows = sum(table.num_rows for table in url_lists.tables(source, Columns(caption_col="text"), {}, []))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peaks = {}
    for form in ("csv", "jsonl"):
        for count in (20_000, 400_000):
            path = tmp_path / f"{count}.{form}"
            with path.open("w") as file:
                file.write("url,text\n" if form == "csv" else "")
                for i in range(count):
                    url, text = f"http://host.test/{i}/{i * 7919}/picture.jpg", f"a text of middling length, number {i}"
                    file.write(f'{url},"{text}"\n' if form == "csv" else f'{{"url": "{url}", "text": "{text}"}}\n')
            done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
            rows, peak = map(int, done.stdout.split())
            assert rows == count
            peaks[form, count] = peak
    for form in ("csv", "jsonl"):
        assert peaks[form, 400_000] < peaks[form, 20_000] + 60, peaks
