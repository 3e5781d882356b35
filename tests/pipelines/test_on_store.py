"""Runs whose folder is on a store: the one in memory, which needs no server. tests/faults/test_s3.py has a real one."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from capfilt.data import shards
from capfilt.data.tokens import Tokenizer
from capfilt.models import weights
from capfilt.reports import lock
from capfilt.reports.places import Place, Remote, table_source, within

Bytes = dict[str, bytes]


@pytest.fixture
def store() -> Iterator[Remote]:
    folder = Remote(f"memory://{uuid.uuid4().hex}")
    yield folder
    lock.release_all()
    for name in [name for name in MemoryFileSystem.store if name.startswith(f"/{folder.name}")]:
        del MemoryFileSystem.store[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, small_blip: Callable[..., Any]) -> list[str]:
    """A captioner and a filter, a few thousand weights each."""
    home = tmp_path_factory.mktemp("models")
    for seed, role in enumerate(("captioner", "filter")):
        Tokenizer.load("world").save(home / role)
        weights.save(small_blip(seed), home / role)
    return ["--captioner", str(home / "captioner"), "--filter", str(home / "filter")]


def files(run: Place, *patterns: str) -> Bytes:
    found: list[Place] = [path for pattern in patterns for path in run.glob(pattern)]
    return {str(within(path, run)): path.read_bytes() for path in found}


def test_the_middle_of_the_loop_on_a_store(
    store: Remote, tmp_path: Path, models: list[str], small_world: Path, capfilt: Any
) -> None:
    """Everything that annotate and select write is what they write into a folder, and all who look find it."""
    web = str(small_world / "human")
    settings = ("--set", "decode.max_length=8", "--set", "decode.min_length=2", "--set", "precision=fp32")
    made: list[Bytes] = []
    for home in (tmp_path, store):
        done = capfilt("annotate", web, *models, "--out", home / "a", *settings, "--json")
        assert done.code == 0, done.err
        policy = ("--set", "threshold=keep-rate", "--set", "keep_rate=0.5")
        done = capfilt("select", web, "--annotations", home / "a", "--out", home / "c", *policy, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["dataset"] == str(home / "c/dataset")
        made.append(
            files(home / "a", "annotations/*", "ledger/annotate/*.json", "recipe.yaml")
            | files(home / "c", "dataset/*", "ledger/select/*.json")
        )
    assert len(made[0]) == 3 + 3 + 1 + (2 * 3 + 1) + 3
    assert made[1] == made[0]
    texts = [len(item.captions) for url in shards.expand(str(store / "c/dataset")) for item in shards.read(url)]  # type: ignore[union-attr]
    assert len(texts) == sum(json.loads((store / "c/dataset/sizes.json").read_bytes()).values())

    for run, num in (("a", 3), ("c", 3)):
        done = capfilt("status", store / run, "--json")
        assert done.code == 0, done.err
        told = json.loads(done.out)
        assert told["state"].startswith("done")
        assert [(stage["done"], stage["total"]) for stage in told["stages"]] == [(num, num)]
        assert capfilt("verify", store / run).code == 0
        done = capfilt("report", store / run, "--json")
        assert done.code == 0, done.err
        assert (store / run / "report.html").read_bytes().startswith(b"<!doctype html>")
    told = json.loads(capfilt("verify", store / "c", "--inputs", "--json").out)
    assert told["inputs"] == {"compared": 3, "unrecorded": 0, "changed": []}
    key = next(item.key for item in shards.read(f"{web}/00000.tar"))
    told = json.loads(capfilt("explain", store / "c", key, "--json").out)
    assert [chapter["table"] for chapter in told["found"]] == ["dataset/00000.parquet"]


def test_what_is_done_stays_done_and_what_does_not_hold_is_done_again(
    store: Remote, models: list[str], small_world: Path, capfilt: Any
) -> None:
    command = ("annotate", small_world / "human", *models, "--out", store / "a", "--set", "decode.max_length=8")
    command += ("--set", "decode.min_length=2", "--json")
    assert capfilt(*command).code == 0
    before = {path: path.stat() for path in (store / "a").glob("annotations/*")}
    assert capfilt(*command).code == 0
    assert {path: path.stat() for path in (store / "a").glob("annotations/*")} == before
    spoilt = store / "a/annotations/00001.parquet"
    data = spoilt.read_bytes()
    spoilt.write_bytes(data[:100] + b"x" + data[101:])
    done = capfilt("verify", store / "a", "--json")
    assert done.code == 1
    assert [piece["shard"] for piece in json.loads(done.out)["broken"]] == ["00001"]
    assert capfilt("verify", store / "a", "--mend").code == 0
    assert capfilt(*command).code == 0
    assert spoilt.read_bytes() == data
    assert capfilt(*command, "--seed", "1").line.startswith(f"error: {store}/a was planned otherwise")
    assert capfilt(*command, "--fork", store / "b").code == 0
    assert files(store / "b", "annotations/*") == files(store / "a", "annotations/*")
    assert capfilt(*command, "--retry", "failed").code == 0


def test_a_download_onto_a_store(
    store: Remote, tmp_path: Path, hostile: Any, fetch: Any, url_list: Any, capfilt: Any
) -> None:
    urls = [hostile.url(f"/ok?seed={i}") for i in range(7)] + [hostile.url("/status/404")]
    words = ("--shard-size", "3", "--caption-col", "text", "--allow-private", "127.0.0.0/8", "--host-rate", "0")
    made = []
    for out in (tmp_path / "out", store / "out"):
        done = capfilt("download", url_list(tmp_path, urls), "--out", out, *words, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["samples"] == {"in": 8, "kept": 7, "failed": 1}
        made.append(files(out, "*.tar", "sizes.json", "plan/*"))
        rows = [pq.read_table(table_source(path)).to_pylist() for path in sorted(out.glob("*.parquet"))]
        made[-1] |= {"rows": repr(rows).encode()}
    assert made[0] == made[1]
    assert len(made[0]) == 3 + 1 + 4 + 1
    again = capfilt(
        "download",
        url_list(tmp_path, urls),
        "--out",
        store / "out",
        *words,
        "--retry",
        "failed",
        "--drop-placeholders",
        2,
    )
    assert again.code == 0, again.err
    assert capfilt("verify", store / "out").code == 0
    assert json.loads((store / "out/summary.json").read_bytes())["samples"]["in"] == 8


@pytest.mark.parametrize("verb", ["pretrain", "bootstrap"])
def test_a_training_is_told_that_it_needs_a_folder(verb: str, capfilt: Any) -> None:
    recipe = ("blip-tiny", "--set", "data=nowhere/") if verb == "pretrain" else ("demo",)
    done = capfilt(verb, *recipe, "--out", "s3://bucket/run")
    assert done.code == 2
    assert "s3://bucket/run is on a store, and a training needs a folder" in done.line


def test_a_store_that_nobody_knows_is_one_line(capfilt: Any) -> None:
    done = capfilt("status", "s4://bucket/run")
    assert done.code == 2
    assert done.line.startswith("error: s4://bucket/run: Protocol not known: s4")
