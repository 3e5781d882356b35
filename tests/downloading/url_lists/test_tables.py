from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from capfilt.downloading.url_lists.column_types import Types
from capfilt.downloading.url_lists.files import BadRows, ListFile, find_files
from capfilt.downloading.url_lists.tables import Columns, read_tables
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


def read(path: Path | ListFile, columns: Columns = COLUMNS, types: Types | None = None) -> pa.Table:
    file = path if isinstance(path, ListFile) else find_files([str(path)])[0]
    bad_rows = BadRows()
    table = pa.concat_tables(list(read_tables(file, columns, {} if types is None else types, bad_rows)))
    assert bad_rows.count == 0
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
            bad_rows = BadRows()
            file = find_files([str(tmp_path / name)])[0]
            table = pa.concat_tables(list(read_tables(file, Columns(caption_col="text"), {}, bad_rows)))
            assert table["url"].to_pylist() == ["http://h/1", "http://h/4"]
            assert bad_rows.count == num_bad


class TestColumns:
    def test_a_missing_column_is_named_with_those_that_are_there(self, tmp_path: Path) -> None:
        for form, writer in WRITERS.items():
            writer(tmp_path / f"list.{form}")
            with pytest.raises(DataError, match=r"has no column 'txt'. Did you mean 'text'\? Columns: "):
                read(tmp_path / f"list.{form}", Columns(caption_col="txt"))

    def test_a_column_of_the_output_cannot_be_overwritten(self) -> None:
        with pytest.raises(ValidationError, match="status would overwrite a column of the output"):
            Columns(save_additional_columns=("uid", "status"))

    def test_a_column_is_named_once(self) -> None:
        with pytest.raises(ValidationError, match="'text' is named twice"):
            Columns(caption_col="text", save_additional_columns=("text",))


@pytest.mark.slow
def test_a_long_list_is_read_in_little_memory(tmp_path: Path) -> None:
    """Ten times the rows, no more memory: a process of its own says what its peak was."""
    script = """
import resource, sys
from pathlib import Path
from capfilt.downloading.url_lists.files import BadRows, find_files
from capfilt.downloading.url_lists.tables import Columns, read_tables
file = find_files([sys.argv[1]])[0]
rows = sum(table.num_rows for table in read_tables(file, Columns(caption_col="text"), {}, BadRows()))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peaks = {}
    for form in ("csv", "jsonl"):
        for count in (20_000, 200_000):
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
        assert peaks[form, 200_000] < peaks[form, 20_000] + 40, peaks
