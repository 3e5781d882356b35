"""Runs whose folder is on a store: the one in memory, which needs no server. tests/faults/test_s3.py has a real one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from capfilt.data import shards
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.models.checkpoints import store as weights
from capfilt.storage.paths import StoragePath, relative_to, table_source
from capfilt.storage.remote_path import RemotePath

Bytes = dict[str, bytes]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, small_blip: Callable[..., Any]) -> list[str]:
    """A captioner and a filter, a few thousand weights each."""
    home = tmp_path_factory.mktemp("models")
    for seed, role in enumerate(("captioner", "filter")):
        Tokenizer.load("world").save(home / role)
        weights.save(small_blip(seed), home / role)
    return ["--captioner", str(home / "captioner"), "--filter", str(home / "filter")]


def files(run: StoragePath, *patterns: str) -> Bytes:
    found: list[StoragePath] = [path for pattern in patterns for path in run.glob(pattern)]
    return {str(relative_to(path, run)): path.read_bytes() for path in found}


def test_the_middle_of_the_loop_on_a_store(
    store: RemotePath, tmp_path: Path, models: list[str], small_world: Path, capfilt: Any
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
        answer = json.loads(done.out)
        assert answer["state"].startswith("done")
        assert [(stage["done"], stage["total"]) for stage in answer["stages"]] == [(num, num)]
        assert capfilt("verify", store / run).code == 0
        done = capfilt("report", store / run, "--json")
        assert done.code == 0, done.err
        assert (store / run / "report.html").read_bytes().startswith(b"<!doctype html>")
    answer = json.loads(capfilt("verify", store / "c", "--inputs", "--json").out)
    assert answer["inputs"] == {"compared": 3, "unrecorded": 0, "changed": []}
    key = next(item.key for item in shards.read(f"{web}/00000.tar"))
    answer = json.loads(capfilt("explain", store / "c", key, "--json").out)
    assert [chapter["table"] for chapter in answer["found"]] == ["dataset/00000.parquet"]


def test_what_is_done_stays_done_and_what_does_not_hold_is_done_again(
    store: RemotePath, models: list[str], small_world: Path, capfilt: Any
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
    store: RemotePath, tmp_path: Path, hostile: Any, fetch: Any, url_list: Any, capfilt: Any
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


MADE = ("data/*/*.tar", "round-*/*.json", "round-*/*/checkpoint/*", "round-*/annotations/*", "round-*/dataset/*")
"""What a bootstrap makes, but for what counts seconds."""


@pytest.mark.slow
def test_a_bootstrap_on_a_store_is_that_of_a_folder(
    store: RemotePath, finished_run: Path, tmp_path: Path, recipe: Any, capfilt: Any
) -> None:
    words = ("bootstrap", recipe(tmp_path), "--out", store / "run")
    done = capfilt(*words)
    assert done.code == 0, done.err
    made = files(store / "run", *MADE)
    assert made == files(finished_run, *MADE)
    assert {name.split("/")[1] for name in made} >= {"pretrain", "captioner", "filter", "annotations", "metrics.json"}
    before = {path: path.stat() for path in (store / "run").glob("round-*/*/checkpoint/*")}
    assert capfilt(*words).code == 0
    assert {path: path.stat() for path in (store / "run").glob("round-*/*/checkpoint/*")} == before
    assert not list((store / "run").glob("round-*/*/states"))
    answer = json.loads(capfilt("status", store / "run", "--json").out)
    assert answer["state"].startswith("done")
    assert capfilt("verify", store / "run").code == 0
    assert (store / "run/report.html").read_bytes().startswith(b"<!doctype html>")


@pytest.mark.slow
def test_a_model_on_a_store_is_a_model(
    store: RemotePath, tmp_path: Path, models: list[str], small_world: Path, capfilt: Any
) -> None:
    """It is written there by a pretraining, gone on from, examined, asked to caption; copies are made once."""
    web, few = str(small_world / "human"), ("--set", "train.steps=2", "--set", "train.loader.batch_size=8")
    start = models[1]
    made = []
    for home in (tmp_path / "here", store):
        words = ("pretrain", "blip-tiny", "--set", f"data={web}", *few, "--set", f"model={start}/architecture.yaml")
        one = capfilt(*words, "--set", f"start={start}", "--out", home / "one", "--json")
        assert one.code == 0, one.err
        model = json.loads(one.out)["model"]
        assert model == str(home / "one/pretrain/checkpoint")
        two = capfilt(*words, "--set", f"start={home}/one/pretrain", "--out", home / "two")
        assert two.code == 0, two.err
        roles = ("--captioner", model, "--filter", home / "two/pretrain")
        settings = ("--set", "decode.max_length=8", "--set", "decode.min_length=2", "--set", "precision=fp32")
        done = capfilt("annotate", web, *roles, "--out", home / "a", *settings)
        assert done.code == 0, done.err
        assert capfilt("evaluate", model, web, "--out", home / "e").code == 0
        made.append(files(home, "*/pretrain/checkpoint/*", "a/annotations/*", "e/metrics.json"))
    assert made[0] == made[1]
    assert len(made[0]) == 3 + 3 + 3 + 1
    assert len([path for path in tmp_path.glob("capfilt-*/*") if path.is_dir()]) == 2, "a copy of each model"


def test_a_model_that_is_not_on_a_store_is_one_line(store: RemotePath, models: list[str], capfilt: Any) -> None:
    done = capfilt("annotate", "x", "--captioner", store / "nowhere", *models[2:], "--out", store / "a")
    assert done.code == 2
    assert done.line.startswith(f"error: {store}/nowhere is no model; on a store a model is a folder; what can be read")


def test_an_export_onto_a_store_is_refused(models: list[str], capfilt: Any) -> None:
    done = capfilt("export", models[1], "--out", "s3://bucket/model")
    assert done.code == 2
    assert done.line.startswith("error: --out s3://bucket/model is on a store; export into a folder")


def test_a_store_that_refuses_to_be_listed_is_one_line(
    store: RemotePath, small_world: Path, capfilt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(MemoryFileSystem, "info", refused)
    done = capfilt("evaluate", store / "model", small_world / "human")
    assert done.code == 1
    assert done.line.startswith(f"error: {store}/model cannot be looked at ({store}/model: Forbidden)")


def test_features_are_not_kept_on_a_store(store: RemotePath, small_world: Path, capfilt: Any) -> None:
    done = capfilt("pretrain", "blip2-tiny-stage1", "--set", "data=x", "--set", "train.features=s3://b/f", "--out", "x")
    assert done.code == 2
    assert "give a folder that all workers see, not s3://b/f" in done.line
    done = capfilt("bootstrap", "demo", "--set", "pretrain.features=true", "--out", store / "run")
    assert done.code == 2
    assert "features are kept of a frozen tower" in done.line
    words = ("--set", f"data={small_world}/human", "--set", "train.features=true", "--set", "train.loader.augment={}")
    done = capfilt("pretrain", "blip2-tiny-stage1", *words, "--out", store / "run")
    assert done.code == 2
    assert f"features is true, which keeps them in the run folder, and {store}/run is on a store" in done.line


def test_a_store_of_an_unknown_scheme_is_one_line(capfilt: Any) -> None:
    done = capfilt("status", "s4://bucket/run")
    assert done.code == 2
    assert done.line.startswith("error: s4://bucket/run: Protocol not known: s4")
