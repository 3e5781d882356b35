"""A plain folder of pictures, read as shards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards import pictures
from capfilt.data.shards.members import MemberCounts
from capfilt.errors import NoShardError, ShardError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "v1.0"
    (folder / "inner").mkdir(parents=True)
    for name in ("b.jpg", "a.png", "inner/c.JPG", "d.gif"):
        (folder / name).write_bytes(name.encode())
    for name in (".hidden.jpg", "list.txt"):
        (folder / name).write_bytes(b"no picture")
    return folder


def test_each_picture_is_a_sample_with_its_path_as_key_and_a_uid_of_its_bytes(folder: Path) -> None:
    (url,) = shards.expand(str(folder), plain_pictures=True)
    assert shards.name(url) == "v1.0-000000"
    digest, members = shards.Digest(shards.stat(url)["version"]), MemberCounts()
    read = list(shards.read(url, digest, members))
    assert [item.key for item in read] == ["a.png", "b.jpg", "d.gif", "inner/c.JPG"]
    assert read[2] == FailedSample("d.gif", "a gif; read are jpg, jpeg, png, webp")
    for item in (item for item in read if isinstance(item, Sample)):
        assert (item.image, item.text, item.captions) == (item.key.encode(), "", [])
        assert item.uid == hashlib.sha256(item.key.encode()).hexdigest()[:32]
    assert members == {"in": 4, "used": 3, "of a sample that failed": 1}
    known = digest.result()
    assert known is not None
    assert (known.bytes, known.sha256) == (shards.read_input(url).bytes, shards.read_input(url).sha256)


def test_a_large_folder_is_many_shards_which_change_with_their_pictures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "PICTURES_EACH", 3)
    first, second = shards.expand(str(folder), plain_pictures=True)
    assert [shards.name(url) for url in (first, second)] == ["v1.0-000000", "v1.0-000003"]
    assert [item.key for url in (first, second) for item in shards.read(url)] == [
        "a.png", "b.jpg", "d.gif", "inner/c.JPG",
    ]  # fmt: skip
    before = shards.stat(first), shards.stat(second), shards.read_input(second)
    (folder / "inner/c.JPG").write_bytes(b"anew")
    after = shards.stat(first), shards.stat(second), shards.read_input(second)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert after[2].sha256 != before[2].sha256


def test_a_folder_on_a_store_is_read_alike(store: Any) -> None:
    for name in ("a.png", "inner/b.jpg"):
        (store / "photos" / name).write_bytes(name.encode())
    (url,) = shards.expand(str(store / "photos"), plain_pictures=True)
    assert [item.image for item in shards.read(url) if isinstance(item, Sample)] == [b"a.png", b"inner/b.jpg"]
    assert shards.stat(url)["size"] == 16


def test_what_holds_no_picture_or_is_gone_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NoShardError, match="no shard found"):
        shards.expand(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoShardError, match="and folders of pictures"):
        shards.expand(str(tmp_path / "empty"), plain_pictures=True)
    (url,) = shards.expand(str(folder), plain_pictures=True)
    listed = list(shards.read(url))
    (folder / "a.png").unlink()
    assert len(list(shards.read(url))) == len(listed) - 1
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()
    assert list(shards.read(url)) == []
    with pytest.raises(ShardError):
        shards.expand(str(folder), plain_pictures=True)
