from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from capfilt.cluster.session import connect
from capfilt.data import shards
from capfilt.data.loading.config import Source
from capfilt.data.sample import Sample
from capfilt.data.shards import files
from capfilt.errors import DataError
from capfilt.models import architecture_of
from capfilt.objectives.kinds.downstream import VqaObjectives
from capfilt.runs.progress import Progress
from capfilt.stages.count_pairs import (
    count_regions,
    count_rows,
    ledger_name,
    shard_digests,
    with_known_answers,
    written_shards,
)


def test_every_shard_is_counted_once_and_stays_known(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sources with a shard 00000 each, one of them a copy to the last byte and second."""
    (tmp_path / "copy").mkdir()
    shutil.copy2(small_world / "human/00000.tar", tmp_path / "copy/00000.tar")
    sources = [Source(shards=str(small_world / "human")), Source(shards=str(tmp_path / "copy"))]
    quiet = Progress(quiet=True)
    with connect("local") as session:
        found = count_rows(session, sources, "all", tmp_path, quiet)
        assert not any(count_regions(session, sources, tmp_path, quiet).values())
        read: list[Any] = []
        monkeypatch.setattr(shards, "read", read.append)
        assert count_rows(session, sources, "all", tmp_path, quiet) == found
        images = count_rows(session, sources, "one", tmp_path, quiet)
    assert read == []
    assert found == {str(path): 32 for path in [*(small_world / "human").glob("*.tar"), tmp_path / "copy/00000.tar"]}
    assert images == dict.fromkeys(found, 16)


def test_pictures_with_regions_are_counted_along(
    small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same reading; one that has no text takes part in steps on regions alone."""
    samples = [item for item in shards.read(str(small_world / "human/00000.tar")) if isinstance(item, Sample)][:4]
    for sample in samples[1:]:
        sample.meta["regions"] = [{"box": [0, 0, 4, 4], "text": "a corner"}]
    samples[3] = dataclasses.replace(samples[3], text="", meta={"regions": samples[3].meta["regions"]})
    shards.write(tmp_path / "00000.tar", iter(samples))
    url, quiet = str(tmp_path / "00000.tar"), Progress(quiet=True)
    sources = [Source(shards=url)]
    with connect("local") as session:
        assert count_rows(session, sources, "one", tmp_path, quiet) == {url: 3}
        monkeypatch.setattr(shards, "read", None)
        assert count_regions(session, sources, tmp_path, quiet) == {url: 3}


def test_shards_of_another_task(small_world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A picture without captions is read, not dropped, and what is missing is named with the shard."""
    one = next(item for item in shards.read(str(small_world / "human/00000.tar")) if isinstance(item, Sample))
    of_task = dataclasses.replace(one, text="", meta={"statements": [{"id": 1, "text": "a ring", "label": True}]})
    shards.write(tmp_path / "00000.tar", iter([of_task]))
    url = str(tmp_path / "00000.tar")
    with connect("local") as session:
        assert count_rows(session, [Source(shards=url)], "all", tmp_path, Progress(), "statements") == {url: 1}
        with pytest.raises(DataError, match=rf"no picture of {url} has hypotheses with an answer; docs/tasks\.md"):
            count_rows(session, [Source(shards=url)], "all", tmp_path, Progress(quiet=True), "hypotheses")
    assert "1 images" in (said := capsys.readouterr().err)
    assert "kept" not in said
    with pytest.raises(DataError, match=f"no picture of {url} has questions with an answer"):
        with_known_answers(architecture_of("blip/tiny-answers"), VqaObjectives(), [url])


def test_shards_without_a_version_are_told_apart_by_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "stat", lambda url: {"name": "00000", "size": 20480, "version": ""})
    one, other = "https://a.example/00000.tar", "https://b.example/00000.tar"
    assert ledger_name(one) != ledger_name(other)
    assert ledger_name(one) == ledger_name(one)


def test_what_select_wrote_is_not_read_again(run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ledger has the counts; a tar that was changed since is read, and so is one without a ledger."""
    urls = shards.expand(str(run_copy / "round-1/dataset"))
    source, quiet = Source(shards=tuple(urls)), Progress(quiet=True)
    said = written_shards(urls)
    assert said.keys() == set(urls)
    with connect("local") as session:
        read = {kind: count_rows(session, [source], kind, tmp_path, quiet) for kind in ("all", "one")}
        digests = shard_digests(session, urls, {}, tmp_path, quiet)
        monkeypatch.setattr(shards, "read", None)
        for kind in ("all", "one"):
            assert count_rows(session, [source], kind, tmp_path / "new", quiet, written=said) == read[kind]
    assert {url: one.sha256 for url, one in said.items()} == digests
    changed, ledger = Path(urls[0]), run_copy / "round-1/ledger/select"
    later = (ledger / f"{changed.stem}.json").stat().st_mtime_ns + 10**9
    os.utime(changed, ns=(later, later))
    assert written_shards(urls).keys() == set(urls[1:])
    shutil.rmtree(ledger)
    assert written_shards(urls) == {}
