"""Shards that img2dataset fetches through our client, beside those of img2dataset alone: same list, same server."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.downloading import plans
from capfilt.downloading.fetch import (
    ImageCheck,
    PictureConfig,
    Resized,
    fetch,
    import_img2dataset,
    indented,
    make_resizer,
    urlopen_by,
)
from capfilt.downloading.finalize import finalize
from capfilt.downloading.http.client import Limits, SafeHttpClient
from capfilt.downloading.http.politeness import PoliteClient, Politeness
from capfilt.downloading.plans import ShardLayout
from capfilt.downloading.url_lists.files import find_files
from capfilt.downloading.url_lists.tables import Columns
from capfilt.runs.tally import Tally

# img2dataset's border is albumentations' `value`, which wants to be called `fill`.
pytestmark = pytest.mark.filterwarnings("ignore:value is deprecated")


class NoRateLimit:
    """Lets every host be asked at once."""

    def acquire(self, name: str) -> tuple[float, float]:
        return 0.0, 0.0

    def pause(self, name: str, seconds: float) -> None:
        """Nothing waits."""


def polite_client(**limits: Any) -> PoliteClient:
    client = SafeHttpClient(Limits(allow_private=("127.0.0.0/8",), **limits), "tester/1")
    return PoliteClient(client, NoRateLimit(), Politeness(deadline=5), False, frozenset(), "capfilt")


def run(rows: pa.Table, folder: Path, config: PictureConfig, size: int = 10) -> tuple[list[Path], Tally]:
    """Fetch and finalize one shard."""
    import_img2dataset()
    (folder / "tmp").mkdir(parents=True)
    layout = ShardLayout(size=size)
    raw = fetch(rows, 0, folder / "tmp", config, polite_client(), 4, layout)
    return finalize(raw, rows, folder, layout)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


# ---- img2dataset itself ----

MODES: dict[str, tuple[dict[str, Any], PictureConfig]] = {
    "as served": ({"resize_mode": "no", "disable_all_reencoding": True}, PictureConfig()),
    "border": ({"resize_mode": "border", "image_size": 48}, PictureConfig(resize_mode="border", image_size=48)),
}


@pytest.fixture(scope="module")
def server(hostile_kind: Any) -> Any:
    made = hostile_kind.Hostile()
    yield made
    made.close()


@pytest.fixture(scope="module")
def rows(server: Any) -> pa.Table:
    paths = [*(f"/ok?seed={i}" for i in range(6)), "/status/404", "/html", "/ok?seed=1"]
    return pa.table(
        {
            "uid": [f"{i:032x}" for i in range(9)],
            "score": [i / 4 for i in range(9)],
            "caption": [f"text {i}, é" if i != 3 else None for i in range(9)],
            "url": [server.url(path) for path in paths],
        }
    )


@pytest.fixture(scope="module")
def theirs(rows: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of MODES, as `img2dataset.download` leaves it."""
    home = tmp_path_factory.mktemp("img2dataset")
    pq.write_table(rows.rename_columns(["uid", "score", "text", "link"]), home / "list.parquet")
    common = {
        "url_list": str(home / "list.parquet"), "input_format": "parquet", "url_col": "link", "caption_col": "text",
        "save_additional_columns": ["uid", "score"], "output_format": "webdataset", "processes_count": 1,
        "thread_count": 4, "number_sample_per_shard": 10,
    }  # fmt: skip
    calls = [{**common, **given, "output_folder": str(home / mode)} for mode, (given, _) in MODES.items()]
    # One process in place of its pool, whose start takes longer than all else here.
    program = f"""
import sys
import img2dataset
main = sys.modules["img2dataset.main"]  # by its name, `img2dataset` has a function
def one_by_one(_, downloader, reader, *others):
    for shard in reader:
        downloader(shard)
if __name__ == "__main__":
    main.multiprocessing_distributor = one_by_one
    for call in {calls!r}:
        main.download(**call)
"""
    (home / "fetch.py").write_text(program)
    quiet = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    subprocess.run([sys.executable, str(home / "fetch.py")], check=True, env=quiet, capture_output=True, timeout=100)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_member_by_member_it_is_what_img2dataset_writes(
    rows: pa.Table, theirs: Path, tmp_path: Path, mode: str
) -> None:
    [tar, parquet, stats], tally = run(rows, tmp_path, MODES[mode][1])
    ours, other = members(tar), members(theirs / mode / "00000.tar")
    html = "000007" if mode == "as served" else ""  # to img2dataset a page is a picture, where it does not decode
    assert sorted(ours) == sorted(name for name in other if name.partition(".")[0] != html)
    for name, data in ours.items():
        if not name.endswith(".json"):
            assert data == other[name], name
            continue
        mine, its = json.loads(data), json.loads(other[name])
        assert list(mine) == list(its), "the same keys in the same order, the list's own uid among them"
        if mode == "as served":
            assert its["width"] is None
            mine |= dict.fromkeys(("width", "height", "original_width", "original_height"))
        assert mine == its
    table, its_table = pq.read_table(parquet), pq.read_table(theirs / mode / "00000.parquet").sort_by("key")
    assert table.schema.equals(its_table.schema)
    compared = ["uid", "score", "caption", "url", "key", "exif", "sha256"]
    keep = pa.array([key != html for key in table["key"].to_pylist()])
    assert table.select(compared).filter(keep).equals(its_table.select(compared).filter(keep))
    assert table.filter(keep)["status"] == its_table.filter(keep)["status"]
    assert table["error_message"].to_pylist()[6:8] == [
        "http-404",
        "not-an-image: 56 bytes: b'<!DOCTYPE ht'...",
    ]
    counted, its_counted = json.loads(stats.read_text()), json.loads((theirs / mode / "00000_stats.json").read_text())
    assert list(counted) == list(its_counted) or set(counted) == set(its_counted)
    assert counted["count"] == its_counted["count"] == 9
    assert counted["status_dict"] == {"success": 7, "http-404": 1, "not-an-image": 1}
    assert tally.samples == {"in": 9, "kept": 7, "failed": 2}


def test_columns_of_a_list_without_uid_or_texts(server: Any, tmp_path: Path) -> None:
    rows = pa.table({"url": [server.url("/ok?seed=1"), server.url("/status/410")]})
    [tar, parquet, _], tally = run(rows, tmp_path, PictureConfig())
    table = pq.read_table(parquet)
    assert table.column_names == [
        "url", "key", "status", "error_message", "width", "height", "original_width", "original_height", "exif",
        "sha256", "uid",
    ]  # fmt: skip
    assert table["uid"].to_pylist() == [table["sha256"][0].as_py()[:32], None]
    assert [*members(tar)] == ["000000.jpg", "000000.json"]
    written = members(tar)["000000.json"]
    assert json.loads(written)["uid"] == table["uid"][0].as_py()
    assert written == json.dumps(json.loads(written), indent=4).encode(), "as img2dataset would have written it"
    assert tally.texts["in"] == {}


def test_several_texts_of_a_row_are_captions_of_its_json(server: Any, tmp_path: Path) -> None:
    """From a list with lists of texts to what `annotate` reads, and once more for what failed."""
    rows = [{"url": server.url(path), "caption": texts} for path, texts in
            (("/ok", ["one", "two"]), ("/status/404", ["three", "four"]), ("/ok?seed=1", None))]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "list.parquet")
    columns = Columns(caption_col="caption")
    first = plans.plan_list(
        tmp_path / "plan", find_files([str(tmp_path / "list.parquet")]), columns, ShardLayout(size=10)
    )
    _, tally = run(plans.read(tmp_path / "plan", "00000"), tmp_path, PictureConfig())
    assert tally.texts["kept"] == {"web": 2}, "of two pictures, one of them without a text"
    found = {item.key: item for item in shards.read(str(tmp_path / "00000.tar")) if isinstance(item, Sample)}
    assert [(item.text, item.meta["captions"]) for item in found.values()] == [
        ("one", [{"text": "one", "source": "web"}, {"text": "two", "source": "web"}]),
        ("", None),
    ]
    assert found["000000"].captions == [{"text": "one", "source": "web"}, {"text": "two", "source": "web"}]
    again = plans.plan_retry(tmp_path / "plan", [first], tmp_path, columns, ["failed"], ShardLayout(size=10))
    assert again is not None
    [row] = plans.read(tmp_path / "plan", "00001").to_pylist()
    assert row == {
        "caption": "three",
        "captions": [{"text": "three", "source": "web"}, {"text": "four", "source": "web"}],
        "url": server.url("/status/404"),
    }


def test_the_same_rows_give_the_same_tar_in_the_order_of_keys(server: Any, tmp_path: Path) -> None:
    """The first picture comes last."""
    paths = ["/slow?s=0.3", *(f"/ok?seed={i}" for i in range(7))]
    rows = pa.table({"caption": [str(i) for i in range(8)], "url": [server.url(path) for path in paths]})
    made = [run(rows, tmp_path / name, PictureConfig())[0] for name in "ab"]
    assert made[0][0].read_bytes() == made[1][0].read_bytes()
    assert made[0][1].read_bytes() == made[1][1].read_bytes()
    with tarfile.open(made[0][0]) as tar:
        names = tar.getnames()
        assert {(entry.mtime, entry.uname, tuple(entry.pax_headers)) for entry in tar} == {(0, "", ())}
    assert names == [f"00000{i}.{part}" for i in range(8) for part in ("jpg", "json", "txt")]


def test_a_row_that_img2dataset_forgets_is_a_row_all_the_same(server: Any, tmp_path: Path) -> None:
    """It prints a traceback for what json cannot say, and goes on without the row; a plan has no such columns."""
    rows = pa.table({"when": [datetime(2020, 1, 1)] * 2, "url": [server.url("/ok"), server.url("/status/404")]})  # noqa: DTZ001
    [tar, parquet, _], tally = run(rows, tmp_path, PictureConfig())
    assert pq.read_table(parquet)["error_message"].to_pylist() == ["lost: img2dataset gave no answer", "http-404"]
    assert members(tar) == {}
    assert tally.failed == {"lost": 1, "http-404": 1}


def test_nothing_else_of_the_process_goes_through_our_client_afterwards(server: Any) -> None:
    before = urllib.request._opener  # type: ignore[attr-defined]
    with urlopen_by(polite_client()), urllib.request.urlopen(server.url("/ok")) as answer:
        assert answer.read()[:2] == b"\xff\xd8"
    assert urllib.request._opener is before  # type: ignore[attr-defined]


# ---- the check of a picture ----


def encoded(picture: Image.Image, form: str, **settings: Any) -> io.BytesIO:
    stream = io.BytesIO()
    picture.save(stream, form, **settings)
    return io.BytesIO(stream.getvalue())


def error(stream: io.BytesIO, **config: Any) -> str:
    answer = ImageCheck(PictureConfig(**config))(stream)
    assert answer[:5] == (None,) * 5
    assert answer[5] is not None
    return answer[5]


@pytest.mark.parametrize("more", [{}, {"captions": ["a", "b"]}, {"parts": np.arange(3)}, {"row": {"a": [1]}}])
def test_an_indented_json_is_that_of_python(more: dict[str, Any]) -> None:
    meta = {
        "url": 'http://a/"b\\',
        "caption": "é\n,\n    ",
        "width": 3,
        "share": 0.1,
        "none": None,
        "yes": True,
        **more,
    }
    plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in meta.items()}
    assert indented(meta) == json.dumps(plain, indent=4)


class TestImageCheck:
    def test_bytes_pass_as_they_are_with_their_size(self, hostile_kind: Any) -> None:
        data = hostile_kind.jpeg()
        assert ImageCheck(PictureConfig())(io.BytesIO(data)) == (data, 80, 64, 80, 64, None)
        frames = hostile_kind.animation()
        assert ImageCheck(PictureConfig())(io.BytesIO(frames)) == (frames, 40, 30, 40, 30, None)

    def test_pixels_are_counted_before_any_is_decoded(self, hostile_kind: Any) -> None:
        """50,000 x 50,000 pixels would be 7.5 GB; the resizer, which is not there, is never asked."""
        wide = hostile_kind.png_of(50_000, 50_000)
        for mode in ("no", "border"):
            assert error(io.BytesIO(wide), resize_mode=mode).startswith(
                "too-many-pixels: too many pixels (50000 x 50000,"
            )

    def test_what_is_no_picture(self) -> None:
        assert error(io.BytesIO(b"<svg/>")).startswith("not-an-image: 6 bytes: b'<svg/>'")
        assert error(io.BytesIO(b"")).startswith("not-an-image: 0 bytes")
        assert error(io.BytesIO(b"\xff\xd8\xff\xe0rubbish")).startswith("broken-image: ")

    def test_what_has_no_end(self, hostile_kind: Any) -> None:
        picture = Image.new("RGB", (50, 40), "red")
        for form in ("JPEG", "PNG", "GIF", "WEBP"):
            data = encoded(picture, form).getvalue()
            assert ImageCheck(PictureConfig())(io.BytesIO(data))[5] is None, form
            # Of a WebP Pillow reads all before it tells the size.
            assert error(io.BytesIO(data[:-12])).startswith("broken-image" if form == "WEBP" else "truncated"), form
        assert ImageCheck(PictureConfig())(io.BytesIO(hostile_kind.jpeg() + b"a camera's own"))[5] is None

    def test_sides(self) -> None:
        picture = encoded(Image.new("RGB", (100, 20)), "PNG")
        assert error(picture, min_image_size=21).startswith("too-small: 100 x 20")
        assert error(picture, max_aspect_ratio=4.9).startswith("too-narrow: 100 x 20")
        assert ImageCheck(PictureConfig(min_image_size=20, max_aspect_ratio=5))(picture)[5] is None

    @pytest.mark.parametrize(
        ("size", "config", "said"),
        [
            ((1, 50_000), {"resize_mode": "keep_ratio"}, "1 x 50000 would become 256 x 12800000, limit 64000000"),
            ((50_000, 1), {"resize_mode": "center_crop"}, "50000 x 1 would become 12800000 x 256, limit"),
            ((2, 1000), {"resize_mode": "keep_ratio"}, "2 x 1000 would become 256 x 128000, a jpg has 65500 a side"),
            ((9, 1000), {"resize_mode": "keep_ratio", "encode_format": "webp"}, "a webp has 16383 a side at most"),
            ((40, 40), {"resize_mode": "border", "image_size": 9000}, "40 x 40 would become 9000 x 9000, limit"),
            ((40, 30), {"resize_mode": "keep_ratio_largest", "image_size": 90_000}, "would become 90000 x 67500"),
            ((20_000, 1), {"resize_mode": "border", "image_size": 30_000, "resize_only_if_bigger": True,
                           "encode_format": "webp"}, "a webp has 16383 a side at most"),
        ],
    )  # fmt: skip
    def test_what_resizing_would_blow_up_never_reaches_the_resizer(
        self, size: tuple[int, int], config: dict[str, Any], said: str
    ) -> None:
        said_of_it = error(encoded(Image.new("RGB", size), "PNG"), **config)
        assert said_of_it.startswith("too-many-pixels: ")
        assert said in said_of_it

    @pytest.mark.parametrize("mode", ["no", "border", "keep_ratio_largest", "keep_ratio", "center_crop"])
    @pytest.mark.parametrize("larger", [False, True])
    def test_what_it_makes_is_known_beforehand(self, mode: Any, larger: bool) -> None:
        import_img2dataset()
        config = PictureConfig(resize_mode=mode, image_size=24, resize_only_if_bigger=larger)
        for size in ((1, 300), (300, 2), (20, 20), (25, 24), (40, 31)):
            check = ImageCheck(config, None if mode == "no" else make_resizer(config))
            _, width, height, *_, failure = check(encoded(Image.new("RGB", size), "PNG"))
            assert failure is None
            assert width is not None
            assert height is not None
            expected = config.resized_size(*size) or size
            if mode == "center_crop" and (not larger or min(size) > 24):
                assert (width, height) == (24, 24)
                assert min(expected) == 24
            else:
                assert abs(width - expected[0]) <= 1
                assert abs(height - expected[1]) <= 1

    def test_a_rotated_photograph_and_16_bit_grey_are_mended_before_they_are_resized(self) -> None:
        """img2dataset leaves the one on its side and clips the other to white."""
        import_img2dataset()
        config = PictureConfig(resize_mode="border", image_size=32, encode_format="png", encode_quality=1)
        check = ImageCheck(config, make_resizer(config))
        turned = Image.new("RGB", (60, 30), "red")
        turned.paste("blue", (0, 0, 30, 30))  # the left half as stored, the upper half when upright
        exif = Image.Exif()
        exif[0x0112] = 6
        image, width, height, *original, failure = check(encoded(turned, "PNG", exif=exif))
        assert failure is None
        assert (width, height, original) == (32, 32, [30, 60])
        assert image is not None
        made = np.asarray(Image.open(io.BytesIO(image)))
        assert tuple(made[4, 16]) == (0, 0, 255)
        assert tuple(made[28, 16]) == (255, 0, 0)
        grey = Image.fromarray(np.full((30, 30), 257 * 100, np.uint16))
        image, *_, failure = check(encoded(grey, "PNG"))
        assert failure is None
        assert image is not None
        assert set(np.asarray(Image.open(io.BytesIO(image)).convert("L")).ravel()) == {100}

    @pytest.mark.parametrize("mode", ["border", "keep_ratio_largest", "keep_ratio", "center_crop"])
    def test_kept_transforms_make_the_pictures_of_new_ones(self, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """In turns over sizes and configurations: what is kept of one must not be taken for another."""
        import_img2dataset()
        import img2dataset.resizer

        noise = np.random.default_rng(0)
        sizes = [(40, 90), (90, 40), (20, 16)]
        streams = [encoded(Image.fromarray(noise.integers(0, 255, (*size, 3), np.uint8)), "PNG") for size in sizes]
        configs = [PictureConfig(resize_mode=mode, image_size=size) for size in (32, 24)]

        def resized() -> list[Resized]:
            return [make_resizer(config)(io.BytesIO(stream.getvalue())) for stream in streams for config in configs]

        kept = [*resized(), *resized()]
        monkeypatch.setattr(img2dataset.resizer, "A", sys.modules["albumentations"])
        assert kept == [*resized()] * 2
        assert len({made[0] for made in kept}) == 6

    def test_other_pictures_reach_the_resizer_as_they_are(self, hostile_kind: Any) -> None:
        seen: list[bytes] = []

        def resizer(stream: io.BytesIO, boxes: object) -> Resized:
            seen.append(stream.read())
            return None, None, None, None, None, "seen"

        check = ImageCheck(PictureConfig(resize_mode="border"), resizer)
        assert check(io.BytesIO(hostile_kind.jpeg()))[5] == "seen"
        assert seen == [hostile_kind.jpeg()]
