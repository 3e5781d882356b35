"""Samples put together from members, against a slow reading of the same rules; and every member accounted for."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import tarfile
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import tar_of
from webdataset.tariterators import group_by_keys, tar_file_iterator

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards import gather, scattered
from capfilt.data.shards.members import MemberCounts

File = tuple[str, bytes]
IMAGES = ("jpg", "png")


def read(path: Path, extras: bool = True) -> tuple[list[Sample | FailedSample], MemberCounts]:
    members = MemberCounts()
    found = list(shards.read(str(path), members=members, extras=extras))
    assert members["in"] == members.total() - members["in"], "every member has one end"
    return found, members


@pytest.fixture
def of(tmp_path: Path):  # type: ignore[no-untyped-def]
    def reading(*files: File, extras: bool = True) -> tuple[list[Sample | FailedSample], MemberCounts]:
        (tmp_path / "00000.tar").write_bytes(tar_of(*files))
        return read(tmp_path / "00000.tar", extras)

    return reading


def pair(name: str, text: str = "") -> list[File]:
    return [(f"{name}.jpg", name.encode()), (f"{name}.txt", (text or name).encode())]


def sample(key: str, text: str, image: str = "", **more: object) -> Sample:
    return Sample(key, (image or key).encode(), "jpg", text, **more)  # type: ignore[arg-type]


# The rules of `scattered.py` once more, without streaming, in the plainest words: what a shard of such files comes to.
def by_the_rules(files: Sequence[File]) -> Counter[str]:
    members = [(name, *name.partition(".")[::2], data) for name, data in files]
    runs: list[list[tuple[str, str, str, bytes]]] = []
    for member in members:
        if not runs or runs[-1][0][1] != member[1] or member[2] in [other[2] for other in runs[-1]]:
            runs.append([])
        runs[-1].append(member)
    outcomes: list[Sample | FailedSample] = []
    seen, pool = set(), []
    for run in runs:
        parts = {extension: data for _, _, extension, data in run}
        plain = [kind for kind in IMAGES if kind in parts]
        own = any(kind in (*IMAGES, "gif") and dot and f"{more}.txt" in parts for more, dot, kind in split(parts))
        has_text = "txt" in parts or b"caption" in parts.get("json", b"")
        if (not plain and "gif" not in parts) or own or not has_text:
            pool += run
            continue
        outcomes.append(one(run[0][1], parts, "duplicate key" if run[0][1] in seen else ""))
        seen.add(run[0][1])
    return Counter(map(repr, [*outcomes, *pooled(pool, seen)]))


def split(names: object) -> list[tuple[str, str, str]]:
    return [name.rpartition(".") for name in names]  # type: ignore[attr-defined]


def one(key: str, parts: dict[str, bytes], problem: str = "") -> Sample | FailedSample:
    images = [kind for kind in IMAGES if kind in parts]
    if not problem and not images:
        problem = "gif is not read (jpg, jpeg, png, webp are)" if "gif" in parts else "no image"
    if problem or len(images) > 1:
        return FailedSample(key, problem or "more than one image")
    meta = json.loads(parts.get("json", b"{}"))
    text = parts["txt"].decode() if "txt" in parts else meta.get("caption", "")
    extras = {kind: data for kind, data in parts.items() if kind not in (*IMAGES, "txt", "json")}
    return Sample(key, parts[images[0]], images[0], text, meta, extras)


def pooled(pool: list[tuple[str, str, str, bytes]], settled: set[str]) -> list[Sample | FailedSample]:
    stems = {name: name.rpartition(".")[0] for name, *_ in pool}
    pictures = [m for m in pool if m[0].rpartition(".")[2] in (*IMAGES, "gif")]
    texts = [stems[name] for name, _, extension, _ in pool if extension.endswith(".txt")]
    plain = {key for _, key, extension, _ in pictures if "." not in extension}
    keys: dict[str, set[str]] = {}
    groups: dict[str, list[dict[str, bytes]]] = {}
    problems: dict[str, str] = {}

    def put(key: str, extension: str, data: bytes) -> None:
        for parts in groups.setdefault(key, []):
            if extension not in parts:
                parts[extension] = data
                return
        groups[key].append({extension: data})

    for name, key, extension, data in pictures:
        carried = "." in extension and stems[name] not in texts
        if carried and key in settled and key not in plain:
            continue
        own = key if "." not in extension or (carried and key in plain) else stems[name]
        keys.setdefault(key, set()).add(own)
        put(own, name.removeprefix(f"{own}."), data)
    lone = []
    for name, key, extension, data in [m for m in pool if m not in pictures]:
        longest = max((k for k in keys.get(key, ()) if name.startswith(f"{k}.")), key=len, default=None)
        if longest is not None:
            put(longest, name.removeprefix(f"{longest}."), data)
        elif key not in settled:
            lone.append((name, key, extension, data))
    left = []
    for name, key, extension, data in lone:
        own = next(iter(keys[key])) if len(keys.get(key, ())) == 1 else None
        if own is None or any(extension in parts for parts in groups[own]):
            left.append((name, key, extension, data))
        else:
            put(own, extension, data)
    whole = {key for _, key, extension, _ in left if extension in ("txt", "json")}
    for name, key, _, data in left:
        own = key if key in whole else stems[name]
        wanted = [n for n, k, *_ in left if (k if k in whole else stems[n]) == own]
        if any(n.endswith((".txt", ".json")) for n in wanted):
            put(own, name.removeprefix(f"{own}."), data)
            if len(keys.get(key, ())) > 1:
                problems[own] = "belongs to more than one image"
    again = {
        (key, i): "duplicate key" if i or key in settled else "" for key in groups for i in range(len(groups[key]))
    }
    return [one(key, groups[key][i], problems.get(key, why)) for (key, i), why in again.items()]


NAMES = [
    f"{stem}.{kind}"
    for stem in ("a", "b", "a.1", "a.2", "a.x y", "c")
    for kind in ("jpg", "txt", "json", "npy", "png", "mask.png", "gif")
]


@settings(max_examples=250, deadline=None)
@given(
    names=st.lists(st.sampled_from(NAMES), max_size=14),
    ordered=st.sampled_from([None, False, True]),
    captions=st.integers(0, 2**14),
    side=st.sampled_from([2, 256]),
    near=st.sampled_from([0, 1500, 2**24]),
    packed=st.booleans(),
)
def test_any_order_of_members_is_read_by_the_rules(
    names: list[str], ordered: bool | None, captions: int, side: int, near: int, packed: bool
) -> None:
    if ordered is not None:  # by their names, as tar does; or images first, then texts
        names.sort(key=str if ordered else lambda name: (name.rpartition(".")[2] not in IMAGES, name))
    files = [
        (name, json.dumps({"caption": f"c{i}"} if captions >> i & 1 else {}).encode()) for i, name in enumerate(names)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "MAX_ADJACENT", (2**26, side))
        patch.setattr(scattered, "NEAR", near)
        data = gzip.compress(tar_of(*files), 1) if packed else tar_of(*files)
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            found, _ = read(Path(file.name))
            bare, _ = read(Path(file.name), extras=False)
    assert Counter(map(repr, found)) == by_the_rules(files)
    assert [(type(item), item.key) for item in bare] == [(type(item), item.key) for item in found]


def test_dots_in_names_are_samples(of) -> None:  # type: ignore[no-untyped-def]
    """What webdataset takes for extensions of one key, `IMG` and `22`, are images with texts."""
    names = ["22.05 track 1", "22.05 track 2", "IMG.3", "IMG.4", "a/b.c/k", "plain", "v1.0.2"]
    found, members = of(*[file for name in names for file in pair(name)])
    assert found == [sample(name, name) for name in names]
    assert members == {"in": 14, "used": 14}
    assert [item.key for item in of(*[(f"scan.{i:04d}.jpg", b"i") for i in range(600)])[0]] == [
        f"scan.{i:04d}" for i in range(600)
    ]


def test_one_image_of_a_key_has_its_text_under_any_name(of) -> None:  # type: ignore[no-untyped-def]
    found, _ = of(("k.input.jpg", b"i"), ("k.txt", b"t"), ("k.json", b"{}"), ("k.npy", b"n"))
    assert found == [sample("k.input", "t", "i", extras={"npy": b"n"})]
    found, members = of(("k.input.jpg", b"i"), ("k.target.jpg", b"j"), ("k.txt", b"t"), *pair("l"))
    assert set(map(repr, found)) == {
        repr(sample("k.input", "", "i")),
        repr(sample("k.target", "", "j")),
        repr(FailedSample("k", "belongs to more than one image")),
        repr(sample("l", "l")),
    }
    assert members == {"in": 5, "used": 4, "of a sample that failed": 1}


def test_what_lies_beside_an_image_is_carried(of) -> None:  # type: ignore[no-untyped-def]
    files = [*pair("k"), ("k.mask.png", b"m"), ("k.syn.json", b"{"), ("k.cls", b"3"), ("k.npy", b"n"), *pair("l")]
    extras = {"mask.png": b"m", "syn.json": b"{", "cls": b"3", "npy": b"n"}
    found, members = of(*files)
    assert found == [sample("k", "k", extras=extras), sample("l", "l")]
    assert members == {"in": 8, "used": 4, "carried": 4}
    unread, same = of(*files, extras=False)
    assert unread == [sample("k", "k"), sample("l", "l")]
    assert same == members
    assert of(("k.cond.png", b"m"), *pair("k"))[0] == [sample("k", "k", extras={"cond.png": b"m"})]


def test_a_picture_with_a_text_of_its_own_is_a_sample_beside_a_plain_one(of) -> None:  # type: ignore[no-untyped-def]
    files = [*pair("IMG"), *pair("IMG.1"), ("IMG.2.jpg", b"no text")]
    found = sorted(of(*files)[0], key=lambda item: item.key)
    assert found == [sample("IMG", "IMG", extras={"2.jpg": b"no text"}), sample("IMG.1", "IMG.1")]


@pytest.mark.parametrize("order", [("jpg", "txt", "json"), ("txt", "json", "jpg"), ("json", "jpg", "txt")])
@pytest.mark.parametrize("near", [0, 2**24])
def test_scattered_members_are_one_sample_each(
    of, order: tuple[str, ...], near: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(scattered, "NEAR", near)
    data = {"jpg": "%s", "txt": "text %s", "json": '{"n": "%s"}'}
    files = [(f"{i:03d}.{kind}", (data[kind] % i).encode()) for kind in order for i in range(40)]
    found, members = of(*files)
    assert sorted(found, key=lambda item: item.key) == [
        sample(f"{i:03d}", f"text {i}", f"{i}", meta={"n": f"{i}"}) for i in range(40)
    ]
    assert members == {"in": 120, "used": 120}


def test_scattered_images_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scattered, "NEAR", 2**17)
    monkeypatch.setattr(gather, "MAX_ADJACENT", (2**17, 16))
    images = [(f"s.{i:03d}.jpg", random.Random(i).randbytes(2**17)) for i in range(150)]
    (tmp_path / "0.tar").write_bytes(tar_of(*images, *[(f"s.{i:03d}.txt", b"t%d" % i) for i in range(150)]))
    del images
    tracemalloc.start()
    texts = [item.text for item in shards.read(str(tmp_path / "0.tar")) if isinstance(item, Sample)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == [f"t{i}" for i in range(150)]
    assert peak < 4 * 2**20, "of 19 MiB"


def test_texts_too_far_from_their_images_are_named(of, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(scattered, "NEAR", 0)
    monkeypatch.setattr(scattered, "MAX_HELD", 2**20)
    files = [(f"{i}.jpg", b"i") for i in range(3)] + [(f"{i}.txt", b"t" * 500_000) for i in range(3)]
    found, members = of(*files, ("0.npy", b"n" * 2**20))
    assert [type(item) for item in found] == [Sample, Sample, FailedSample]
    assert found[2] == FailedSample("2", "its txt lies too far from its image (more than 1 MiB of such)")
    assert members == {"in": 7, "used": 4, "of a sample that failed": 2, "lies too far from its image": 1}


def test_two_tars_in_one_file_are_read_whole(tmp_path: Path) -> None:
    one, two = tar_of(*pair("0"), *pair("1")), tar_of(*pair("2"), *pair("1"))
    for name, data in (("a.tar", one + two), ("b.tar.gz", gzip.compress(one) + gzip.compress(two))):
        (tmp_path / name).write_bytes(data)
        found, members = read(tmp_path / name)
        again = FailedSample("1", "duplicate key")
        assert found == [sample("0", "0"), sample("1", "1"), sample("2", "2"), again]
        assert members == {"in": 8, "used": 6, "of a sample that failed": 2}


@pytest.mark.parametrize("kind", ["bmp", "avif", "gif", "tiff", "heic"])
def test_a_picture_that_is_not_read_is_a_row(of, kind: str) -> None:  # type: ignore[no-untyped-def]
    why = f"{kind} is not read (jpg, jpeg, png, webp are)"
    found, members = of((f"a.{kind}", b"i"), (f"b.{kind}", b"i"), ("b.txt", b"t"), *pair("c"), (f"c.{kind}", b"x"))
    assert found[:2] in (
        [FailedSample("a", why), FailedSample("b", why)],
        [FailedSample("b", why), FailedSample("a", why)],
    )
    assert found[2:] == [sample("c", "c", extras={kind: b"x"})]
    assert members == {"in": 6, "used": 2, "carried": 1, "of a sample that failed": 3}


@pytest.mark.parametrize(
    "name",
    [
        "فارسی\u200cنام",
        "Screenshot at 3\u202fPM",
        "emoji👨\u200d👩\u200d👧",
        "a\u00a0b",
        "全角\u3000空白",
        "cafe\u0301",
        "\u200eWhatsApp",
        "x\ue000",
    ],
)
def test_names_of_people_are_ordinary(of, name: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found, _ = of(*pair(name))
    assert found == [sample(name, name)]
    shards.write(tmp_path / "out.tar", found)
    assert list(shards.read(str(tmp_path / "out.tar"))) == found


@pytest.mark.parametrize("mark", ["\u202e", "\u202a", "\u2066", "\u2069", "\x1b", "\x85", "\u2028"])
def test_what_disguises_a_name_is_refused(of, mark: str) -> None:  # type: ignore[no-untyped-def]
    why = "unsafe key (control characters, or such as turn the direction of writing)"
    assert of(*pair(f"a{mark}b"))[0] == [FailedSample(f"a{mark}b", why)]


def test_what_a_mac_adds_is_passed_over(of) -> None:  # type: ignore[no-untyped-def]
    beside = [("._a.jpg", b"m"), ("./._a.txt", b"m"), ("__MACOSX/._b.jpg", b"m"), ("__MACOSX/c.jpg", b"m")]
    found, members = of(*beside, *pair("a"), ("README", b"r"), (".DS_Store", b"d"), ("all.csv", b"c"))
    assert found == [sample("a", "a")]
    assert members == {
        "in": 9, "used": 2, "AppleDouble": 4, "a name without key or extension": 2, "belongs to no image": 1,
    }  # fmt: skip


def test_members_behind_a_sample_that_is_whole_are_named(of) -> None:  # type: ignore[no-untyped-def]
    found, members = of(*pair("a"), *pair("b"), ("a.json", b"{}"), ("a.mask.png", b"m"), ("c.jpg", b"i"))
    assert found == [sample("a", "a"), sample("b", "b"), sample("c", "", "i")]
    assert members == {"in": 7, "used": 5, "lies apart from its sample": 2}


def test_a_cut_takes_the_sample_that_it_went_through_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    data = tar_of(*[(f"s.{i}.{kind}", b"x" * 600) for i in range(4) for kind in ("jpg", "txt")])
    for length in range(600, 8 * 1536, 100):
        path.write_bytes(data[:length])
        *before, last = read(path)[0]
        assert [item.key for item in before] == [f"s.{i}" for i in range(len(before))]
        assert isinstance(last, FailedSample)
        assert last.reason == f"shard cut at byte {length}"
        assert len(before) * 3072 <= length < len(before) * 3072 + 3072 + 512
        assert last.key in (f"s.{len(before)}", "00000")


def test_what_others_read_of_what_we_write(of, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """webdataset, and open_clip with it, cut a name at its first dot; the key as it was stays in the json."""
    found, _ = of(*pair("22.05 track 1"), *pair("22%2E05 track 1", "takes the name"), *pair("a/b.c/k"), ("k.jpg", b"i"))
    assert [type(item) for item in found] == [Sample, FailedSample, Sample, Sample]
    shards.write(tmp_path / "0.tar", [item for item in found if isinstance(item, Sample)])
    with (tmp_path / "0.tar").open("rb") as stream:
        theirs = list(group_by_keys([{**file, "__url__": ""} for file in tar_file_iterator(stream)]))
    assert [one["__key__"] for one in theirs] == ["22%2E05 track 1", "a/b.c/k", "k"]
    assert [one["txt"] for one in theirs] == [b"22.05 track 1", b"a/b.c/k", b""]
    assert json.loads(theirs[0]["json"]) == {"original_key": "22.05 track 1"}
    assert [item.key for item in shards.read(str(tmp_path / "0.tar"))] == ["22%2E05 track 1", "a/b.c/k", "k"]


def test_a_bomb_ends_its_shard_at_once_and_says_so(tmp_path: Path) -> None:
    for name, member in (("read.tar.gz", "000.jpg"), ("skipped.tar.gz", "000.bin")):
        with gzip.open(tmp_path / name, "wb", 1) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
            for key in ("a.jpg", "a.txt"):
                header = tarfile.TarInfo(key)
                header.size = 1
                tar.addfile(header, io.BytesIO(b"a"))
            header = tarfile.TarInfo(member)
            header.size = 2**28 - 2**20
            tar.addfile(header, io.BufferedReader(Zeros(), 2**20))  # type: ignore[type-var]
        begun = time.monotonic()
        found, _ = read(tmp_path / name, extras=False)
        assert time.monotonic() - begun < 10  # a tenth of a second on a quiet machine
        assert found[0] == sample("a", "a", "a")
        assert [item.key for item in found[1:]] == ["000"]
        assert isinstance(found[1], FailedSample)
        assert re.match(r"shard cut at byte \d+: a bomb: \d+ packed bytes unpack to \d+ and more", found[1].reason)


class Zeros(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        buffer[:] = bytes(len(buffer))
        return len(buffer)


def test_a_member_that_cannot_be_read_takes_its_own_sample_only(tmp_path: Path) -> None:
    sparse = tarfile.TarInfo("b.jpg")
    sparse.size, sparse.pax_headers = 700, {"GNU.sparse.map": "0,1"}
    large = tarfile.TarInfo("c.npy")
    large.pax_headers = {"comment": "c" * 2_000_000}
    broken = [header.tobuf(tarfile.PAX_FORMAT) + bytes(-(-header.size // 512) * 512) for header in (sparse, large)]
    parts = [tar_of(*pair("a")), broken[0], tar_of(("b.txt", b"t"), ("c.jpg", b"i"), ("c.txt", b"c")), broken[1]]
    (tmp_path / "0.tar").write_bytes(b"".join([*parts, tar_of(*pair("d"))]))
    found, members = read(tmp_path / "0.tar")
    why = "a sparse file (write it whole: tar without --sparse)"
    assert found == [sample("a", "a"), FailedSample("b", why), sample("c", "c", "i"), sample("d", "d")]
    assert members == {"in": 9, "used": 6, "of a sample that failed": 2, "too large a header": 1}
