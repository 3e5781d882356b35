"""Which shards a spec names, and the names of shards in a run."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.errors import ShardError
from capfilt.storage.remote_path import RemotePath


@pytest.fixture
def tars(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "a/2.tar.gz", "a/1.parquet", "b/0.tar", "odd{1}/0.tar", "plain"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a/0.tar", ["a/0.tar"]),
        ("plain", ["plain"]),
        ("a", ["a/0.tar", "a/1.tar", "a/2.tar.gz"]),
        ("a/{1..0}.tar", ["a/1.tar", "a/0.tar"]),
        ("{b,a}/0.tar", ["b/0.tar", "a/0.tar"]),
        ("a/*", ["a/0.tar", "a/1.tar", "a/2.tar.gz"]),
        ("*/0.tar", ["a/0.tar", "b/0.tar", "odd{1}/0.tar"]),
        ("b::a/[01].tar", ["b/0.tar", "a/0.tar", "a/1.tar"]),
        (["b", "a/0.tar"], ["b/0.tar", "a/0.tar"]),
        ("odd{1}/0.tar", ["odd{1}/0.tar"]),
    ],
)
def test_expand_lists_absolute_paths_in_order(tars, monkeypatch, spec, expected):
    monkeypatch.chdir(tars)
    assert shards.expand(spec) == [str(tars / path) for path in expected]


def test_expand_knows_other_file_systems():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/expand/0.tar": b"", "/expand/1.tar": b""})
    both = ["memory:///expand/0.tar", "memory:///expand/1.tar"]
    assert shards.expand("memory://expand") == shards.expand("memory://expand/{0,1}.tar") == both
    assert shards.expand("memory://expand/*.tar") == both
    assert shards.expand("https://host/{0..1}.tar?a=*") == [
        "https://host/0.tar?a=*",
        "https://host/1.tar?a=*",
    ]
    memory.rm("/expand", recursive=True)


@pytest.mark.parametrize(
    "spec", ["", [], "::", "a/9.tar", "a/{0..9}.tar", "none/*", "x{", "nosuch://a", "{0..9999999}.tar"]
)
def test_expand_refuses_what_names_nothing(tars, monkeypatch, spec):
    monkeypatch.setattr(shards, "MAX_SHARDS", 1000)
    monkeypatch.chdir(tars)
    with pytest.raises(ShardError, match=r"no shard|braces|cannot list|more than"):
        shards.expand(spec)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("/d/00000.tar", "00000"),
        ("s3://bucket/x/00000.tar.gz", "00000"),
        ("https://host/part.v2.tar?sig=a/b.tar", "part.v2"),
        ("00000.parquet", "00000"),
    ],
)
def test_name(url, name):
    assert shards.name(url) == name


@pytest.mark.parametrize(
    ("urls", "names"),
    [
        (["/x/a/0.tar", "/x/a/1.tar"], ["0", "1"]),
        (["/x/a/0.tar", "/x/b/0.tar", "/x/b/1.tar"], ["a-0", "b-0", "1"]),
        (["/x/a/0.tar", "/y/a/0.tar", "/z/b/0.tar"], ["x-a-0", "y-a-0", "z-b-0"]),
        (["s3://x/0.tar", "/x/a/0.tar"], ["x-0", "a-0"]),
        (["https://x/a%20b/0.tar?v=1", "https://x/.c/0.tar"], ["a_20b-0", "c-0"]),
        # Where folders do not tell them apart, or a shard is called so already: also on a disk without upper case.
        (["/x/0.tar", "/x/0.tar.gz"], None),
        (["/X/0.tar", "/x/0.tar"], None),
        (["/x/a/0.tar", "/x/b/0.tar", "/x/A-0.tar"], ["x-a-0", "x-b-0", "A-0"]),
        (["https://x/0.tar?v=1", "https://x/0.tar?v=2"], None),
        ([f"/{'a' * 120}/{i}/0.tar" for i in range(2)], ["0-0", "1-0"]),
        ([f"/{'a' * 120}{i}/0.tar" for i in range(2)], None),
    ],
)
def test_shards_of_one_name_are_named_by_their_folders(urls: list[str], names: list[str] | None) -> None:
    found = shards.by_name(urls)
    assert list(found.values()) == urls
    assert len({name.casefold() for name in found}) == len(urls)
    assert all(re.fullmatch(r"[\w-][\w.-]{0,99}", name) for name in found)
    if names is None:  # by a hash of the url
        names = [f"0-{hashlib.sha256(url.encode()).hexdigest()[:12]}" for url in urls]
    assert list(found) == names
    assert shards.by_name(urls[::-1]) == found, "their order says nothing"
    assert shards.renamed(found) == {url: name for name, url in found.items() if name not in ("0", "1", "A-0")}


def test_a_shard_is_given_once() -> None:
    with pytest.raises(ShardError, match=r"the shard /x/0\.tar is given twice"):
        shards.by_name(["/x/0.tar", "/y/0.tar", "/x/0.tar"])


def test_shards_on_a_store_are_asked_for_side_by_side(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, 100,000 of them would take hours."""
    urls = [str(store / f"{number}.tar") for number in range(8)]
    for url in urls:
        shards.write(url, [])
    info, asking, three = MemoryFileSystem.info, list[str](), threading.Event()

    def patient(self: Any, path: str, **kwargs: Any) -> Any:
        asking.append(path)
        if len(asking) > 3:
            three.set()
        # The first is asked alone: it opens the client that the others share.
        assert len(asking) == 1 or three.wait(60), "each waits for the answer to the one before it"
        return info(self, path, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "info", patient)
    found = shards.expand(urls)
    assert [shards.name(url) for url in found] == [str(number) for number in range(8)]
    asking.clear()
    three.clear()
    assert list(shards.stats(found)) == found
    assert three.is_set()


def test_what_a_mac_writes_beside_a_shard_is_no_shard(tmp_path: Path) -> None:
    shards.write(tmp_path / "00000.tar", [Sample("0", b"", "jpg", "")])
    (tmp_path / "._00000.tar").write_bytes(b"Mac OS X")
    assert shards.expand(str(tmp_path)) == shards.expand(f"{tmp_path}/*") == [str(tmp_path / "00000.tar")]
    assert json.loads(shards.write_sizes(tmp_path).read_text()) == {"00000.tar": 1}
