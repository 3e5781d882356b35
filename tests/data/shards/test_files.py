from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards import files
from capfilt.errors import ShardError
from capfilt.runs.ledger import Input

KEYS = st.text(st.characters(codec="utf-8", exclude_characters="./"), min_size=1, max_size=130).filter(str.isprintable)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SAMPLES = st.lists(
    st.builds(
        Sample,
        key=KEYS,
        image=st.binary(max_size=1200),
        extension=st.sampled_from(["jpg", "jpeg", "png", "webp"]),
        text=st.text(st.characters(codec="utf-8"), max_size=50),
        meta=st.dictionaries(st.text(max_size=10), JSONS, max_size=4),
    ),
    max_size=5,
    unique_by=lambda sample: sample.key,
)


def some(count=3):
    return [Sample(f"{i:05}", b"image %d" % i, "jpg", f"text {i}", {"url": f"u{i}", "a": 1}) for i in range(count)]


def with_webdataset(path):
    """What plain webdataset makes of a shard: its own two functions, without its loader around them."""
    with open(path, "rb") as stream:
        files = [{**file, "__url__": str(path)} for file in tar_file_iterator(stream)]
    return list(group_by_keys(files))


@settings(max_examples=60, deadline=None)
@given(samples=SAMPLES)
def test_what_is_written_is_read_and_again_the_same_bytes(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("shards")
    assert shards.write(folder / "0.tar", samples) == len(samples)
    found = list(shards.read(str(folder / "0.tar")))
    assert found == samples
    shards.write(folder / "1.tar", found)
    assert (folder / "0.tar").read_bytes() == (folder / "1.tar").read_bytes()


@settings(max_examples=30, deadline=None)
@given(samples=SAMPLES)
def test_webdataset_reads_what_we_write(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("shards") / "0.tar"
    shards.write(path, samples)
    found = with_webdataset(path)
    assert [one["__key__"] for one in found] == [sample.key for sample in samples]
    for one, sample in zip(found, samples, strict=True):
        assert one[sample.extension] == sample.image
        assert one["txt"] == sample.text.encode()
        assert json.loads(one["json"]) == sample.meta


def test_the_tar_is_gnu_with_adjacent_members_no_times_and_no_owners(tmp_path):
    shards.write(tmp_path / "0.tar", [Sample("k" * 120, b"i", "png", "é", {"b": "é", "a": 1})])
    with tarfile.open(tmp_path / "0.tar", errorlevel=2) as tar:
        members = tar.getmembers()
        assert [member.name[120:] for member in members] == [".png", ".txt", ".json"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        assert tar.extractfile(members[2]).read() == '{"b":"é","a":1}'.encode()
    assert (tmp_path / "0.tar").read_bytes()[257:265] == b"ustar  \0"


def test_we_read_what_webdatasets_writer_writes(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for i in range(3):
            writer.write(
                {
                    "__key__": f"{i:05}",
                    "jpg": b"image %d" % i,
                    "txt": f"text {i}",
                    "json": {"i": i},
                    "npy": b"x",
                }
            )
    assert list(shards.read(str(tmp_path / "0.tar"))) == [
        Sample(f"{i:05}", b"image %d" % i, "jpg", f"text {i}", {"i": i}) for i in range(3)
    ]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_compressed_tars_and_upper_case_extensions_are_read(tmp_path, mode):
    with tarfile.open(tmp_path / "0.tar", mode) as tar:
        for name, data in (("./a/01.JPG", b"i"), ("./a/01.Txt", b"t")):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    assert list(shards.read(str(tmp_path / "0.tar"))) == [Sample("a/01", b"i", "jpg", "t", {})]


@pytest.mark.parametrize(
    "key",
    ["/a", "../a", "a/../b", "./a", "a//b", "", "a/", "a\n", "a\0", "k" * 1025, "__m__/a", "\ud800"],
)
def test_a_key_that_readers_would_take_for_another_is_not_written(tmp_path, key):
    with pytest.raises(ShardError, match="unsafe key"):
        shards.write(tmp_path / "0.tar", [Sample(key, b"", "jpg", "", {})])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (some(1) * 2, "duplicate key"),
        ([Sample("a", b"", "gif", "", {})], "allowed are jpg"),
        ([Sample("a", b"", "jpg", "\ud800", {})], "cannot be written"),
        ([Sample("a", b"", "jpg", "", {"set": {1}})], "cannot be written"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, samples, message):
    with pytest.raises(ShardError, match=message):
        shards.write(tmp_path / "0.tar", samples)
    assert list(tmp_path.iterdir()) == []


def test_half_a_character_in_a_json_survives_and_stays_utf8(tmp_path):
    meta = {"exif": 'a\\"\ud800b'}
    shards.write(tmp_path / "0.tar", [Sample("a", b"i", "jpg", "t", meta)])
    assert json.loads(with_webdataset(tmp_path / "0.tar")[0]["json"].decode("utf-8")) == meta
    assert [sample.meta for sample in shards.read(str(tmp_path / "0.tar"))] == [meta]


def test_sizes_are_counted_or_taken(tmp_path):
    shards.write(tmp_path / "00000.tar", some(3))
    shards.write(tmp_path / "00001.tar", some(1))
    assert json.loads(shards.write_sizes(tmp_path).read_text()) == {"00000.tar": 3, "00001.tar": 1}
    assert json.loads(shards.write_sizes(tmp_path, {"00000.tar": 9}).read_text()) == {"00000.tar": 9}


def test_a_missing_shard_is_the_users_mistake(tmp_path):
    with pytest.raises(ShardError, match="no shard at"):
        list(shards.read(str(tmp_path / "none.tar")))
    with pytest.raises(ShardError, match="cannot open"):
        list(shards.read("nosuchprotocol://bucket/0.tar"))


def test_storage_that_fails_is_no_fault_of_the_data(tmp_path, monkeypatch):
    class Failing(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise OSError("connection lost")

    monkeypatch.setattr(files, "_open", lambda url: Failing())
    with pytest.raises(ShardError, match="connection lost"):
        list(shards.read("s3://bucket/0.tar"))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_json_cannot_say_is_not_written(tmp_path, number):
    with pytest.raises(ShardError, match="00000: its text or json cannot be written"):
        shards.write(tmp_path / "0.tar", [Sample("00000", b"", "jpg", "", {"a": [number]})])
    assert not list(tmp_path.iterdir())


def test_reading_streams(tmp_path):
    """The first sample is there before the damage behind it is met."""
    shards.write(tmp_path / "0.tar", some(3))
    path = tmp_path / "0.tar"
    path.write_bytes(path.read_bytes()[:5200])
    found = shards.read(str(path))
    assert next(found) == some(1)[0]
    assert isinstance(list(found)[-1], FailedSample)


def test_a_digest_is_of_all_bytes_and_only_of_all(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    shards.write(path, [Sample(f"{i}", b"x" * 5000, "jpg", "", {}) for i in range(9)])
    for data in (path.read_bytes(), path.read_bytes() + b"more" * 10_000, path.read_bytes()[:20_000]):
        path.write_bytes(data)
        digest = shards.Digest()
        plain = list(shards.read(str(path)))
        assert digest.result() is None
        assert list(shards.read(str(path), digest)) == plain
        taken = digest.result()
        assert taken == shards.read_input(str(path)) == Input(len(data), hashlib.sha256(data).hexdigest())
    begun = shards.Digest()
    next(iter(shards.read(str(path), begun)))
    assert begun.result() is None
