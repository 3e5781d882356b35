"""A plain folder of pictures, read as shards, with the texts beside them and the lists that name them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.members import MemberCounts
from capfilt.data.shards.sources import view
from capfilt.errors import NoShardError, ShardError

GIF = "gif is not read (jpg, jpeg, png, webp are)"
GONE = "no such picture in the folder"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "v1.0"
    (folder / "inner").mkdir(parents=True)
    for name in ("b.jpg", "a.png", "inner/c.JPG", "d.gif"):
        (folder / name).write_bytes(name.encode())
    for name in (".hidden.jpg", "list.txt"):
        (folder / name).write_bytes(b"no picture")
    return folder


def read(spec: Path | str) -> dict[str, Any]:
    """What each key of a folder gives: its texts, or why there are none."""
    items = [item for url in shards.expand(str(spec)) for item in shards.read(url)]
    found = {
        item.key: [caption["text"] for caption in item.captions] if isinstance(item, Sample) else item.reason
        for item in items
    }
    assert len(found) == len(items), "each key has one outcome"
    return found


def test_each_picture_is_a_sample_with_its_path_as_key_and_a_uid_of_its_bytes(folder: Path) -> None:
    (url,) = shards.expand(str(folder))
    assert shards.name(url) == "v1.0-000000"
    assert shards.expand(url) == [url], "as a plan has it"
    digest, members = shards.Digest(shards.stat(url)["version"]), MemberCounts()
    items = list(shards.read(url, digest, members))
    assert [item.key for item in items] == ["a", "b", "d", "inner/c"]
    assert items[2] == FailedSample("d", GIF)
    for item, name in zip(items, ("a.png", "b.jpg", "", "inner/c.JPG"), strict=True):
        if isinstance(item, Sample):
            assert (item.image, item.text, item.captions) == (name.encode(), "", [])
            assert item.uid == hashlib.sha256(name.encode()).hexdigest()[:32]
    assert members == {"in": 4, "used": 3, "of a sample that failed": 1}
    known, now = digest.result(), shards.read_input(url)
    assert known is not None
    assert (known.bytes, known.sha256) == (now.bytes, now.sha256)
    assert known.bytes == shards.stat(url)["size"], "else every rerun would think that it had changed"


def test_texts_lie_beside_pictures_as_they_do_in_tars(folder: Path) -> None:
    (folder / "a.txt").write_text("a text")
    (folder / "b.json").write_text('{"caption": "of the json", "uid": "' + "ab" * 16 + '"}')
    (folder / "inner/c.txt").write_bytes(b"\xff\xfe")
    (folder / "e.png").write_bytes(b"e")
    (folder / "e.json").write_text("[]")
    assert read(folder) == {
        "a": ["a text"], "b": ["of the json"], "d": GIF, "e": "json is not an object", "inner/c": "text is not UTF-8",
    }  # fmt: skip
    items = {item.key: item for item in shards.read(shards.expand(str(folder))[0])}
    assert items["b"].uid == "ab" * 16
    (folder / "a.jpg").write_bytes(b"another")
    assert read(folder)["a.jpg"] == read(folder)["a.png"] == ["a text"], "told apart by what differs"


@pytest.mark.parametrize("name", ["metadata.csv", "captions.tsv", "metadata.jsonl", "inner/metadata.csv"])
def test_a_list_says_texts_and_what_it_names_in_vain_fails(folder: Path, name: str) -> None:
    rows = [
        ("inner/c.JPG", "one, of two", "x1"), ("a.png", "of a", ""), ("inner/c.JPG", "two", "x1"),
        ("../../../etc/passwd", "out", ""), ("gone.png", "none", ""), ("", "nobody's", ""),
    ]  # fmt: skip
    if name.endswith(".jsonl"):
        lines = [json.dumps(dict(zip(("file_name", "text", "id"), row, strict=True))) for row in rows]
        (folder / name).write_text("\n".join([*lines[:5], "{", '{"file_name": "b.jpg", "text": "\\ud800"}']))
    else:
        between = "\t" if name.endswith(".tsv") else ","
        quoted = [[f'"{cell}"' if between == "," and "," in cell else cell for cell in row] for row in rows]
        text = "\n".join(map(between.join, [["file_name", "text", "id"], *quoted, ["short"]]))
        (folder / name).write_bytes(text.encode() + f"\nb.jpg{between}".encode() + b"\xff" + between.encode())
    found = read(folder)
    home = "inner/" if name.startswith("inner") else ""
    assert {key: found[key] for key in ("a", "b", "d", "inner/c")} == {
        "a": ["of a"], "b": "text is not UTF-8", "d": GIF, "inner/c": ["one, of two", "two"],
    }  # fmt: skip
    in_vain = {os.path.normpath(home + path): GONE for path in ("../../../etc/passwd", "gone.png")}
    assert {key: found[key] for key in in_vain} == in_vain
    rest = sorted(reason for key, reason in found.items() if key not in {*in_vain, "a", "b", "d", "inner/c"})
    broken = "json is broken" if name.endswith(".jsonl") else "it has 1 columns, not 3"
    assert rest == (sorted([broken]) if name.endswith(".jsonl") else sorted([broken, "it names no picture"]))
    if not home:
        items = {item.key: item for item in shards.read(shards.expand(str(folder))[0])}
        assert items["inner/c"].meta == {"id": "x1", "captions": ["one, of two", "two"]}


def test_a_list_is_chosen_and_its_columns_said(folder: Path) -> None:
    (folder / "sizes.csv").write_text("width,height\n1,2\n")
    assert read(folder)["a"] == [], "a table of something else is none"
    (folder / "en.csv").write_text("picture,words\na.png,an a\n")
    with pytest.raises(NoShardError, match=r"which column holds the texts: words\? Write .*#text=words, or .*#text= "):
        shards.expand(str(folder))
    assert read(f"{folder}#text=words")["a"] == ["an a"]
    (folder / "de.csv").write_text("picture,words\na.png,ein a\n")
    with pytest.raises(NoShardError, match=r"several lists of pictures: say which, .*#list=de.csv or en.csv"):
        shards.expand(f"{folder}#text=words")
    assert read(f"{folder}#list=de.csv&text=words")["a"] == ["ein a"]
    with pytest.raises(NoShardError, match=r"#lst=: no such option; options are image, list, text"):
        shards.expand(f"{folder}#lst=de.csv")
    (folder / "en.csv").write_text('picture,words\na.png,"never closed' + "x" * 200_000)
    with pytest.raises(ShardError, match=r"en.csv cannot be read as csv: .*field limit"):
        shards.expand(f"{folder}#list=en.csv&text=words")


def test_a_large_folder_is_many_shards_which_change_with_their_pictures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "EACH", 3)
    first, second = shards.expand(str(folder))
    assert [shards.name(url) for url in (first, second)] == ["v1.0-000000", "v1.0-000003"]
    assert [item.key for url in (first, second) for item in shards.read(url)] == ["a", "b", "d", "inner/c"]
    before = shards.stat(first), shards.stat(second), shards.read_input(second)
    (folder / "inner/c.JPG").write_bytes(b"anew")
    after = shards.stat(first), shards.stat(second), shards.read_input(second)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert after[2].sha256 != before[2].sha256
    (folder / "inner/c.txt").write_text("a text")
    assert shards.read_input(second).sha256 != after[2].sha256


def test_a_listing_is_made_anew_when_a_name_came_or_went(folder: Path) -> None:
    assert len(read(folder)) == 4
    for path in (folder, folder / "inner"):
        os.utime(path, (1, 1))  # as if nothing had been written for long
    assert len(read(folder)) == 4
    (folder / "inner/new.png").write_bytes(b"new")
    assert len(read(folder)) == 5


def test_a_folder_on_a_store_is_read_alike(store: Any) -> None:
    for name in ("a.png", "inner/b.jpg"):
        (store / "photos" / name).write_bytes(name.encode())
    (store / "photos" / "metadata.csv").write_bytes(b"file_name,text\na.png,an a\n")
    (url,) = shards.expand(str(store / "photos"))
    assert [item.image for item in shards.read(url) if isinstance(item, Sample)] == [b"a.png", b"inner/b.jpg"]
    assert shards.stat(url)["size"] == 16
    assert read(str(store / "photos")) == {"a": ["an a"], "inner/b": []}


def test_what_holds_no_picture_or_is_gone_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoShardError, match=r"folders of them or of pictures"):
        shards.expand(str(tmp_path / "empty"))
    (url,) = shards.expand(str(folder))
    (folder / "a.png").unlink()
    with pytest.raises(ShardError, match=r"has 3 pictures, and had 4 or more: give it again"):
        list(shards.read(url))
    assert len(read(folder)) == 3
    (folder / "00000.tar").write_bytes(b"")
    with pytest.raises(NoShardError, match=r"holds tars and pictures \(b.jpg\): give the tars as .*\*.tar"):
        shards.expand(str(folder))
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()
    with pytest.raises(ShardError):
        shards.expand(str(folder))
