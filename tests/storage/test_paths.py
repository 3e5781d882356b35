from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import ValidationError

from capfilt.config import Config
from capfilt.errors import UsageError
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, listing, map_concurrent, remove_folder, storage_path
from capfilt.storage.remote_path import RemotePath


def put(path: StoragePath, data: bytes = b"abc") -> StoragePath:
    with atomic(path) as file:
        file.write(data)
    return path


def test_a_broken_link_hides_no_other_entry(tmp_path: Path) -> None:
    put(tmp_path / "important")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    assert listing(tmp_path).keys() == {"important", "link", "folder"}
    assert listing(tmp_path / "gone") == {}


# ---- names ----


def test_a_storage_path_is_a_path_or_a_url(tmp_path: Path) -> None:
    assert storage_path("runs/a") == Path("runs/a")
    assert storage_path(f"file://{tmp_path}") == tmp_path
    assert storage_path("s3://bucket/run/") == RemotePath("s3://bucket/run")
    assert storage_path(RemotePath("s3://bucket/run")) == RemotePath("s3://bucket/run")
    assert storage_path(tmp_path) is tmp_path


@pytest.mark.parametrize(
    ("url", "said"),
    [("s4://b/run", "s4"), ("s3://", "names no folder"), ("s3:///", "s3://BUCKET"), ("s3://b", "no folder")],
)
def test_other_urls_are_refused(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        storage_path(url)


def test_a_config_holds_a_path_and_dumps_it_as_text(tmp_path: Path) -> None:
    class Job(Config):
        out: StoragePath

    assert Job(out="s3://bucket/run").out == RemotePath("s3://bucket/run")
    assert Job(out=tmp_path).out == tmp_path
    job = Job(out=RemotePath("s3://bucket/run"))
    assert job.model_dump(mode="json") == {"out": "s3://bucket/run"}
    assert Job.model_validate(job.model_dump(mode="json")) == job
    for given in (job, Job(out=tmp_path)):
        assert Job.model_validate_json(given.model_dump_json()) == given
    with pytest.raises(ValidationError, match="a path or a URL is needed, and this is a int"):
        Job.model_validate({"out": 1})


# ---- objects ----


def test_a_folder_that_cannot_be_removed_is_a_warning(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("Forbidden")

    put(store / "a/b")
    monkeypatch.setattr(MemoryFileSystem, "rm", refused)
    remove_folder(store / "a")
    assert f"{store}/a: Forbidden could not be removed" in caplog.text


def test_map_concurrent_keeps_the_order() -> None:
    assert list(map_concurrent(lambda x: x * x, range(1000), remote=True)) == [x * x for x in range(1000)]
    assert list(map_concurrent(abs, [-1], remote=False)) == [1]
    with pytest.raises(ZeroDivisionError):
        list(map_concurrent(lambda x: 1 // x, [1, 0], remote=True))
