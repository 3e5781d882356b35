from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.downloading import plans
from capfilt.downloading.plans import ALL_KINDS, Pass, ShardLayout, passes, plan_list, plan_retry
from capfilt.downloading.url_lists.files import find_files
from capfilt.downloading.url_lists.tables import Columns
from capfilt.errors import DataError

TEXT = Columns(caption_col="text")


def write(path: Path, count: int, start: int = 0) -> None:
    path.write_text("url,text\n" + "".join(f"u{i},t{i}\n" for i in range(start, start + count)))


def urls(folder: Path, shard: str) -> list[str]:
    return plans.read(folder, shard)["url"].to_pylist()


def test_a_list_is_cut_into_shards_and_every_file_begins_one(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", 7)
    write(tmp_path / "b.csv", 3, start=7)
    folder = tmp_path / "plan"
    made = plan_list(
        folder, find_files([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]), TEXT, ShardLayout(size=5, digits=3)
    )
    assert made == Pass(number=0, first=0, shards=3, rows=10)
    assert passes(folder) == [made]
    assert [urls(folder, f"00{i}") for i in range(3)] == [
        [f"u{i}" for i in range(5)], ["u5", "u6"], ["u7", "u8", "u9"],
    ]  # fmt: skip


def test_the_same_list_gives_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", 7)
    for name in ("one", "two"):
        plan_list(tmp_path / name, find_files([str(tmp_path / "a.csv")]), TEXT, ShardLayout(size=5))
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_a_column_that_widens_later_has_one_type_in_all_shards(tmp_path: Path) -> None:
    for name, value in (("a", 1), ("b", 2.5), ("c", 3)):
        (tmp_path / f"{name}.csv").write_text(f"url,n\nu,{value}\n")
    folder = tmp_path / "plan"
    plan_list(
        folder,
        find_files([str(tmp_path)], "csv"),
        Columns(save_additional_columns=("n",)),
        ShardLayout(size=5),
    )
    assert [plans.read(folder, f"0000{i}")["n"].to_pylist() for i in range(3)] == [[1.0], [2.5], [3.0]]
    assert {plans.read(folder, f"0000{i}").schema.field("n").type for i in range(3)} == {pa.float64()}


def test_rows_that_are_none_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,text\nu,t\nv\nw,t\n")
    made = plan_list(tmp_path / "plan", find_files([str(tmp_path / "a.csv")]), TEXT, ShardLayout(size=5))
    assert (made.rows, made.unreadable) == (2, 1)


def test_bad_rows_of_all_files_are_counted_together(tmp_path: Path) -> None:
    for name in ("a.tsv", "b.tsv", "c.jsonl"):
        (tmp_path / name).write_text("url\ttext\nu\tt\nv\nw\tt\n" if name != "c.jsonl" else '{"url": "x"}\n7\n')
    made = plan_list(tmp_path / "plan", find_files([str(tmp_path)]), Columns(), ShardLayout(size=5))
    assert (made.rows, made.unreadable) == (5, 3)


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("url,text\n")
    with pytest.raises(DataError, match="the list has no rows"):
        plan_list(tmp_path / "plan", find_files([str(tmp_path / "empty.csv")]), TEXT, ShardLayout(size=5))
    write(tmp_path / "a.csv", 101)
    with pytest.raises(DataError, match=r"more than 10 shards.*--shard-size.*--oom-shard-count"):
        plan_list(tmp_path / "plan", find_files([str(tmp_path / "a.csv")]), TEXT, ShardLayout(size=10, digits=1))
    (tmp_path / "a.txt").write_text("http://h/1\n")
    with pytest.raises(DataError, match="a txt list has URLs alone"):
        plan_list(tmp_path / "plan", find_files([str(tmp_path / "a.txt")]), TEXT, ShardLayout(size=5))
    assert passes(tmp_path / "plan") == []


def outcome(folder: Path, shard: str, ends: Sequence[str]) -> None:
    """What a shard's Parquet says: "" is a success, anything else the failure's message."""
    table = pa.table(
        {
            "caption": [f"t{i}" for i in range(len(ends))],
            "url": [f"{shard}-{i}" for i in range(len(ends))],
            "error_message": pa.array([end or None for end in ends], pa.string()),
        }
    )
    pq.write_table(table, folder / f"{shard}.parquet")


class TestRetry:
    BEFORE = Pass(number=0, first=0, shards=2, rows=6)

    def plan(self, folder: Path, before: list[Pass], kinds: Sequence[str]) -> Pass | None:
        return plan_retry(folder / "plan", before, folder, TEXT, kinds, ShardLayout(size=3, digits=2))

    def test_only_what_failed_is_tried_again_and_only_once_a_pass(self, tmp_path: Path) -> None:
        outcome(tmp_path, "00", ["", "timeout: slow", "http-404: "])
        outcome(tmp_path, "01", ["timeout: slow", "placeholder: the same bytes", "dns: none"])
        second = self.plan(tmp_path, [self.BEFORE], [ALL_KINDS])
        assert second is not None
        assert (second.first, second.shards, second.rows) == (2, 2, 4)
        assert second.retried == {"timeout": 2, "http-404": 1, "dns": 1}
        assert urls(tmp_path / "plan", "02") == ["00-1", "00-2", "01-0"]
        assert urls(tmp_path / "plan", "03") == ["01-2"]
        outcome(tmp_path, "02", ["", "http-404: ", ""])
        outcome(tmp_path, "03", ["dns: none"])
        third = self.plan(tmp_path, [self.BEFORE, second], [ALL_KINDS])
        assert third is not None
        assert third.retried == {"http-404": 1, "dns": 1}
        assert urls(tmp_path / "plan", "04") == ["02-1", "03-0"]
        assert passes(tmp_path / "plan") == [second, third]

    def test_it_goes_on_where_the_digits_of_names_end(self, tmp_path: Path) -> None:
        """At the defaults a list of 10^9 rows has used them up, and its failures can be tried again all the same."""
        layout, outcomes = ShardLayout(size=3, digits=1), {f"{shard}": ["timeout: slow"] for shard in range(10)}
        for shard, ends in outcomes.items():
            outcome(tmp_path, shard, ends)
        before = [Pass(number=0, first=0, shards=10, rows=10)]
        again = plan_retry(tmp_path / "plan", before, tmp_path, TEXT, [ALL_KINDS], layout)
        assert again is not None
        assert (again.first, again.shards, again.rows) == (10, 4, 10)
        assert urls(tmp_path / "plan", "10") == ["0-0", "1-0", "2-0"]

    def test_kinds_can_be_chosen(self, tmp_path: Path) -> None:
        outcome(tmp_path, "00", ["", "timeout: slow", "http-404: "])
        outcome(tmp_path, "01", ["timeout: slow", "", "dns: none"])
        second = self.plan(tmp_path, [self.BEFORE], ["dns"])
        assert second is not None
        assert second.retried == {"dns": 1}
        outcome(tmp_path, "02", ["timeout: slow"])
        third = self.plan(tmp_path, [self.BEFORE, second], [ALL_KINDS])
        assert third is not None
        assert third.retried == {"timeout": 3, "http-404": 1}, "the dns failure was tried again already"

    def test_nothing_failed(self, tmp_path: Path) -> None:
        for shard in ("00", "01"):
            outcome(tmp_path, shard, ["", "", ""])
        assert self.plan(tmp_path, [self.BEFORE], [ALL_KINDS]) is None
        assert passes(tmp_path / "plan") == []
