"""Tables with a picture in each row: Parquet, what `datasets` saves, Lance; hostile ones end as failed rows."""

from __future__ import annotations

import io
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.members import MemberCounts
from capfilt.data.shards.sources import parquet, view
from capfilt.errors import NoShardError, ShardError

UID = "0123456789abcdef" * 2


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (colour, 0, 0)).save(file, "png")
    return file.getvalue()


def rows(count: int = 7) -> dict[str, list[Any]]:
    """Pictures as `datasets` has them, one text each, and two single values."""
    return {
        "image": [{"bytes": png(number), "path": f"{number}.png"} for number in range(count)],
        "caption": [f"text {number}" for number in range(count)],
        "width": [8] * count,
        "uid": [f"{number:032x}" for number in range(count)],
    }


def read(spec: Path | str) -> list[Sample | FailedSample]:
    return [item for url in shards.expand(str(spec)) for item in shards.read(url)]


def facts(items: list[Sample | FailedSample]) -> list[Any]:
    return [(i.image, i.uid, i.captions, i.meta["width"]) if isinstance(i, Sample) else i.reason for i in items]


def expected(count: int = 7) -> list[Any]:
    return [(png(n), f"{n:032x}", [{"text": f"text {n}", "source": "web"}], 8) for n in range(count)]


def test_parquet_is_read_row_by_row_and_split_at_its_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.b.parquet"
    pq.write_table(pa.table(rows()), path, row_group_size=2)
    (url,) = shards.expand(str(path))
    assert (url, shards.name(url)) == (f"{path}#rows=0-6", "a.b-000000")
    members = MemberCounts()
    items = list(shards.read(url, members=members))
    assert facts(items) == expected()
    assert [item.key for item in items][-1] == "a.b-00000006"
    assert members == {"in": 7, "used": 7}
    assert shards.read_input(url).bytes == shards.stat(url)["size"] > 0
    monkeypatch.setattr(view, "EACH", 3)
    urls = shards.expand(str(path))
    assert [url.rpartition("=")[2] for url in urls] == ["0-3", "4-6"]
    assert facts([item for url in urls for item in shards.read(url)]) == expected()
    assert shards.expand(urls) == urls
    monkeypatch.setattr(view, "LARGEST", 1)
    assert len(shards.expand(str(path))) == 7
    assert facts(read(path)) == expected()


def test_parquet_on_a_store_is_read_alike(tmp_path: Path, store: Any) -> None:
    pq.write_table(pa.table(rows()), tmp_path / "a.parquet", row_group_size=2)
    for name in ("data/train-0.parquet", "data/test-0.parquet"):
        (store / name).write_bytes((tmp_path / "a.parquet").read_bytes())
    assert facts(read(f"{store}#split=train")) == facts(read(f"{store}/data/train-*.parquet")) == expected()
    (url,) = shards.expand(f"{store}/data/train-0.parquet")
    assert shards.read_input(url).bytes == shards.stat(url)["size"] > 0


def test_shares_of_a_file_change_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(rows()), path)
    (url,) = shards.expand(str(path))
    before = shards.stat(url), shards.read_input(url).sha256
    changed = rows()
    changed["caption"][3] = "TEXT 3"
    pq.write_table(pa.table(changed), path)
    assert shards.stat(url)["version"] != before[0]["version"]
    assert shards.read_input(url).sha256 != before[1]


def test_what_datasets_saves_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the library that writes such folders is not installed")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    given = datasets.Dataset.from_dict({name: rows()[name] for name in features}, features=features)
    wanted = [(png(n), [{"text": f"text {n}", "source": "web"}]) for n in range(7)]

    def said(spec: Path | str) -> list[Any]:
        return [(item.image, item.captions) for item in read(spec) if isinstance(item, Sample)]

    given.save_to_disk(tmp_path / "saved", num_shards=2)
    assert said(tmp_path / "saved") == wanted
    splits = datasets.DatasetDict({"train": given, "test": given.select(range(2))})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(NoShardError, match=r"has several splits: train, test. Choose one, as in .*#split=test"):
        read(tmp_path / "splits")
    assert said(f"{tmp_path / 'splits'}#split=test") == wanted[:2]
    assert said(tmp_path / "splits/train") == wanted
    (tmp_path / "hub/data").mkdir(parents=True)
    (tmp_path / "hub/figure.png").write_bytes(png(0))
    splits["train"].to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    splits["test"].to_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet")
    with pytest.raises(NoShardError, match=r"has several splits: test, train"):
        read(tmp_path / "hub")
    assert said(f"{tmp_path / 'hub'}#split=train") == said(tmp_path / "hub/data/train-*.parquet") == wanted


def test_lance_is_read_by_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lance = pytest.importorskip("lance", reason="the extra `lance` is not installed")
    table = pa.table({**rows(), "image": [png(n) for n in range(7)]})
    lance.write_dataset(table, tmp_path / "a.lance", max_rows_per_file=3)
    assert facts(read(tmp_path / "a.lance")) == expected()
    (url,) = shards.expand(str(tmp_path / "a.lance"))
    before = shards.stat(url)
    lance.write_dataset(table.slice(0, 2), tmp_path / "a.lance", mode="append")
    assert shards.stat(url) != before
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(NoShardError, match=r"pip install 'capfilt\[lance\]'"):
        read(tmp_path / "a.lance")


def test_columns_are_known_by_name_or_said(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"JPG": [png(0)], "thumb": [png(1)], "TEXT": [["one", "two"]], "__key__": ["k"]}), path)
    (item,) = read(path)
    assert isinstance(item, Sample)
    assert (item.key, item.image, [one["text"] for one in item.captions]) == ("k", png(0), ["one", "two"])
    (item,) = read(f"{path}#image=thumb&text=")
    assert isinstance(item, Sample)
    assert (item.image, item.captions) == (png(1), [])
    pq.write_table(pa.table({"front": [png(0)], "back": [png(1)], "says": ["x"]}), path)
    with pytest.raises(NoShardError, match=r"holds the pictures: front, back\? Write .*#image=front"):
        read(path)
    with pytest.raises(NoShardError, match=r"holds the texts: says\? Write .*#text=says, or .*#text= for none"):
        read(f"{path}#image=back")
    with pytest.raises(NoShardError, match=r"has no column 'bak'. Did you mean 'back'"):
        read(f"{path}#image=bak")
    with pytest.raises(NoShardError, match=r"column 'says' is string, not bytes"):
        read(f"{path}#image=says")
    (item,) = read(f"{path}#image=back&text=says")
    assert isinstance(item, Sample)
    assert (item.image, item.text) == (png(1), "x")


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        (("id", "url", "text", "width"), " --caption-col text"),  # COYO
        (("SAMPLE_ID", "URL", "TEXT", "HEIGHT"), " --url-col URL --caption-col TEXT"),  # LAION
        (("uid", "url", "text"), " --caption-col text --save-additional-columns uid"),  # DataComp
        (("url", "width"), ""),
    ],
)
def test_a_table_of_urls_names_the_command_that_fetches_them(
    tmp_path: Path, names: tuple[str, ...], flags: str
) -> None:
    from capfilt.downloading.url_lists.files import find_files
    from capfilt.downloading.url_lists.tables import Columns, check_columns

    path = tmp_path / "part-0.parquet"
    pq.write_table(pa.table({name: ["x"] for name in names}), path)
    with pytest.raises(NoShardError, match=f"`capfilt download {path}{flags} --out SHARDS`"):
        read(path)
    words = flags.split()
    given = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    if "save_additional_columns" in given:
        given["save_additional_columns"] = (given["save_additional_columns"],)  # type: ignore[assignment]
    check_columns(find_files([str(path)])[0], Columns(**given))  # raises where download would


def test_rows_without_a_usable_picture_fail_by_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    images = [None, {"bytes": b"", "path": "/etc/passwd"}, {"bytes": b"GIF89a", "path": None}, {"bytes": b"?"}]
    table = pa.table({"image": [*images, *[{"bytes": png(n)} for n in range(4)]]})
    texts = pa.array([b"a", b"b", b"c", b"d", b"\xff", b"f", b"g", b"h"])
    keys = pa.array([*"0123", "4", "../5", "6", "6"])
    table = table.append_column("text", pa.Array.from_buffers(pa.string(), 8, texts.buffers()))
    pq.write_table(table.append_column("__key__", keys), path)
    items = read(path)
    assert [item.reason if isinstance(item, FailedSample) else item.key for item in items] == [
        "no image", "no image: the table has its path and not its bytes", GIF, UNKNOWN, "text is not UTF-8",
        "unsafe key (absolute, '..', empty or metadata name)", "6", "duplicate key",
    ]  # fmt: skip


GIF = "gif is not read (jpg, jpeg, png, webp are)"
UNKNOWN = "what these bytes are is not read (jpg, jpeg, png, webp are)"


def test_damaged_tables_fail_every_row_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(rows(20)), path, row_group_size=5, compression="zstd")
    data = bytearray(path.read_bytes())
    at = pq.read_metadata(path).row_group(2).column(0).data_page_offset
    data[at : at + 300] = bytes(300)
    path.write_bytes(data)
    items = read(path)
    assert facts(items[:10]) == expected(10)
    assert [item.key for item in items[10:]] == [f"a-{number:08d}" for number in range(10, 20)]
    assert {item.reason.partition(":")[0] for item in items[10:] if isinstance(item, FailedSample)} == {
        "damaged Parquet"
    }
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ShardError, match=r"is no Parquet that can be read"):
        read(path)
    (tmp_path / "empty.parquet").write_bytes(b"")
    with pytest.raises(ShardError, match=r"is no Parquet that can be read"):
        read(tmp_path / "empty.parquet")


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """Some kB of zeros that a row group unpacks to 70 MB; and a picture of 4 MB to which 3000 rows refer."""
    path = tmp_path / "a.parquet"
    zeros = pa.array([bytes(2**20)] * 70)
    pq.write_table(pa.table({"image": zeros}), path, compression="zstd", use_dictionary=False)
    assert {item.reason for item in read(path) if isinstance(item, FailedSample)} == {
        "a row group that unpacks to more than 100 times its bytes"
    }
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([b"\x89PNG" + bytes(2**22)]))
    options: dict[str, Any] = {"compression": "none", "dictionary_pagesize_limit": 2**26, "store_schema": False}
    pq.write_table(pa.table({"image": one}), path, **options)
    before = pa.total_allocated_bytes()
    for batch in islice(parquet.read(str(path), ["image"], 0, 2999), 50):
        assert not isinstance(batch, str)
        assert len(batch.column("image")[0].as_py()) == 2**22 + 4
        assert pa.total_allocated_bytes() - before < 60 * 2**20, "50 of them are 200 MiB"


def test_arrow_files_are_checked_before_they_are_read(tmp_path: Path, store: Any) -> None:
    path = tmp_path / "a.arrow"
    table = pa.table(rows())

    def write(**options: Any) -> None:
        with pa.ipc.new_stream(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as file:
            for batch in table.to_batches(max_chunksize=3):
                file.write(batch)

    write()
    assert facts(read(path)) == expected()
    whole = path.read_bytes()
    (store / "a.arrow").write_bytes(whole)
    with pytest.raises(NoShardError, match=r"Arrow files are read from a disk; copy it there, or save it as Parquet"):
        read(str(store / "a.arrow"))
    write(compression="zstd")
    with pytest.raises(ShardError, match=r"has compressed batches; save it with Dataset.save_to_disk, or as Parquet"):
        read(path)
    for broken in (b"", whole[:200], whole[: len(whole) // 2], b"ARROW1\0\0" + whole):
        path.write_bytes(broken)
        with pytest.raises(ShardError, match=r"is no stream of Arrow's"):
            read(path)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../a.arrow"}]}))
    with pytest.raises(NoShardError, match=r"is not what Dataset.save_to_disk writes: .* leads out of the folder"):
        read(saved)


def test_offsets_that_lead_out_of_an_arrow_file_are_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    table = pa.table({"image": [png(0), png(1)], "text": ["0123456789", "abcdef"]})
    with pa.ipc.new_stream(path, table.schema) as file:
        file.write_table(table)
    offsets = b"\0\0\0\0\x0a\0\0\0\x10\0\0\0"
    data = path.read_bytes()
    assert data.count(offsets) == 1
    path.write_bytes(data.replace(offsets, b"\0\0\0\0\x0a\0\0\0\0\0\0\x7f"))
    assert {item.reason.partition(":")[0] for item in read(path) if isinstance(item, FailedSample)} == {
        "damaged Arrow file"
    }
    assert len(read(path)) == 2


def test_a_storage_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(rows()), path)
    (url,) = shards.expand(str(path))

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(parquet.pq.ParquetFile, "iter_batches", fail)
    with pytest.raises(ShardError, match=r"The storage failed: run again"):
        list(shards.read(url))
