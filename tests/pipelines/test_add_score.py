"""Scores beside itm and itc: with an annotation, added to a finished run, read back; nothing else changes a byte."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import capfilt as library
import capfilt.data.annotations as tables
from capfilt.data import scores, shards
from capfilt.inference.batches import pictures
from capfilt.stages.annotation import shard_scorer

SHARDS = "data/web/{00000,00001}.tar"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with a WordPiece tokenizer, as transformers saves them."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from capfilt.data.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("encoder")
    (folder / "words.txt").write_text("\n".join(Tokenizer.load("world").vocab))
    tokenizer = BertTokenizerFast(str(folder / "words.txt"))
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=66, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear head for the vectors of the tiny model, of 16 numbers."""
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file({"weight": torch.arange(16.0)[None], "bias": torch.ones(1)}, path)
    return path


@pytest.fixture(scope="module")
def models(finished_run: Path) -> list[str]:
    return ["--captioner", f"{finished_run}/round-1/captioner", "--filter", f"{finished_run}/round-1/filter"]


@pytest.fixture(scope="module")
def annotated(finished_run: Path, models: list[str], tmp_path_factory: pytest.TempPathFactory, capfilt: Any) -> Path:
    """A run of two shards, annotated with two texts an image, without a further score."""
    out = tmp_path_factory.mktemp("scores") / "a"
    done = capfilt("annotate", finished_run / SHARDS, *models, "--captions", 2, "--out", out)
    assert done.code == 0, done.err
    return out


@pytest.fixture
def run(annotated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(annotated, tmp_path / "a"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results(folder: Path) -> dict[str, bytes]:
    """The tables and their commits, without what a stage notes of its work."""
    return {
        name: data for name, data in files(folder).items() if name.endswith((".parquet", "/00000.json", "/00001.json"))
    }


def options(name: str, *specs: object) -> list[str]:
    return [word for spec in specs for word in (name, str(spec))]


def column(run: Path, name: str, shard: str = "00000") -> list[float | None]:
    return pq.read_table(run / f"scores/{name}/{shard}.parquet")[name].to_pylist()


def test_scores_are_added_in_one_reading_and_every_other_byte_stays(
    run: Path, finished_run: Path, encoder: Path, head: Path, capfilt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = []
    monkeypatch.setattr(shard_scorer, "pictures", lambda *a, **k: readings.append(1) or pictures(*a, **k))
    before, filter_ = files(run), finished_run / "round-1/filter"
    specs = ("side", "aspect", "entropy", f"sieve={encoder}", f"clip:{filter_}", f"aesthetic={head}@{filter_}")
    done = capfilt("annotate", finished_run / SHARDS, *options("--add-score", *specs), "--out", run, "--json")
    assert done.code == 0, done.err
    assert len(readings) == 2, "one reading of each shard for all scores of pictures"
    after = files(run)
    assert before.items() <= after.items()
    names = ["aesthetic", "aspect", "clip-filter", "entropy", "side", "sieve"]
    new = {name.split("/")[1] if name.startswith("scores/") else name for name in after.keys() - before.keys()}
    assert {name for name in new if not name.startswith("ledger/score-")} == set(names)
    assert json.loads(done.out)["scores"]["side"] == {"texts": 120, "without": 0}
    assert json.loads(done.out)["samples"]["kept"] == 40

    rows = list(library.read_annotations(run))
    assert all(sorted(row.scores) == names for row in rows)
    pixels = {
        sample.key: Image.open(io.BytesIO(sample.image)) for sample in library.read_shards(str(finished_run / SHARDS))
    }
    assert all(row.score("side") == min(pixels[row.key].size) for row in rows)
    np.testing.assert_allclose([row.score("clip-filter") for row in rows], [row.itc for row in rows], atol=1e-5)
    assert len({row.score("aesthetic") for row in rows}) > 20
    assert all(-1 <= row.score("sieve") <= 1 for row in rows if row.score("sieve") is not None)

    again = capfilt("annotate", finished_run / SHARDS, *options("--add-score", *specs), "--out", run)
    assert again.code == 0, again.err
    assert (len(readings), files(run)) == (2, after), "a second time there is nothing to do"
    verified = capfilt("verify", run, "--json")
    assert verified.code == 0
    assert json.loads(verified.out)["files"] == 14, "two tables of annotations, and two of each score"
    status = json.loads(capfilt("status", run, "--json").out)
    assert [(each["stage"], each["done"], each["total"]) for each in status["stages"]] == [
        ("annotate", 2, 2), *((f"score-{name}", 2, 2) for name in names)
    ]  # fmt: skip


def test_scores_come_with_an_annotation_and_a_fork_takes_them_over(
    finished_run: Path,
    models: list[str],
    annotated: Path,
    tmp_path: Path,
    capfilt: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["annotate", finished_run / SHARDS, *models, "--captions", 2, *options("--scores", "side", "entropy")]
    done = capfilt(*words, "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["scores"].keys() == {"side", "entropy"}
    same = [f"annotations/{shard}.parquet" for shard in ("00000", "00001")]
    assert all((tmp_path / "a" / name).read_bytes() == (annotated / name).read_bytes() for name in same)
    monkeypatch.setattr(shard_scorer.ShardScorer, "shard", lambda *_: pytest.fail("nothing is to be computed"))
    done = capfilt(*words, "--out", tmp_path / "a", "--fork", tmp_path / "b")
    assert done.code == 0, done.err
    assert column(tmp_path / "b", "entropy") == column(tmp_path / "a", "entropy")


def test_a_kill_between_two_scores_of_a_shard_is_made_good(
    run: Path, finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    """As after a kill -9: of the first shard one of the scores is committed, of another the table alone is there."""
    words = ["annotate", finished_run / SHARDS, *options("--add-score", "side", "aspect", "entropy")]
    assert capfilt(*words, "--out", run).code == 0
    whole = results(run)
    for gone in ("ledger/score-aspect/00000.json", "ledger/score-entropy/00000.json", "scores/entropy/00000.parquet"):
        (run / gone).unlink()
    assert capfilt(*words, "--out", run).code == 0
    assert results(run) == whole


def test_what_was_added_decides_in_a_policy_and_goes_with_the_texts(
    run: Path, finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    words = ["annotate", finished_run / SHARDS, *options("--add-score", "entropy"), "--out", run]
    assert capfilt(*words).code == 0
    rows = list(library.read_annotations(run))
    middle = sorted(row.scores["entropy"] for row in rows)[len(rows) // 2]
    by_entropy = ("--score", "entropy", "--threshold", repr(middle))
    done = capfilt("select", finished_run / SHARDS, "--annotations", run, "--out", tmp_path / "b", *by_entropy)
    assert done.code == 0, done.err
    verdicts = list(library.read_annotations(tmp_path / "b").verdicts())
    assert [each.annotation.scores for each in verdicts] == [row.scores for row in rows]
    assert {each.verdict == "kept" for each in verdicts if each.annotation.scores["entropy"] >= middle} == {True}
    kept = [caption for sample in library.read_shards(tmp_path / "b/dataset") for caption in sample.meta["captions"]]
    assert 0 < len(kept) < len(rows)
    assert min(caption["entropy"] for caption in kept) == middle
    first = rows[0]
    assert f"entropy {first.scores['entropy']:.4f}" in capfilt("explain", run, first.key).out


def test_annotations_that_changed_get_their_scores_anew(run: Path, finished_run: Path, capfilt: Any) -> None:
    words = ["annotate", finished_run / SHARDS, *options("--add-score", "side"), "--out", run]
    assert capfilt(*words).code == 0
    path = run / "annotations/00000.parquet"
    tables.write(path, list(tables.rows(tables.read(path)))[:-1])
    done = capfilt(*words)
    assert done.code == 1
    assert "00000.parquet is not what was committed" in done.line
    with pytest.raises(library.CapfiltError, match=r"belongs to other annotations than there are now: add side again"):
        list(library.read_annotations(run))


def test_a_round_of_a_bootstrap_gets_scores_too(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    done = capfilt("annotate", run / "data/web", "--add-score", "aspect", "--out", run / "round-1")
    assert done.code == 0, done.err
    assert set(column(run / "round-1", "aspect", "00002")) == {1.0}
    stages = [each["stage"] for each in json.loads(capfilt("status", run, "--json").out)["stages"]]
    assert stages[stages.index("annotate") + 1] == "score-aspect"
    assert capfilt("verify", run).code == 0


def test_a_shard_that_is_not_annotated_or_changed_since_is_named(
    run: Path, finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    done = capfilt("annotate", finished_run / "data/web", "--add-score", "side", "--out", run)
    assert done.code == 1
    assert "1 of 3 shards are not annotated in" in done.line
    other = tmp_path / "00001.tar"
    shards.write(other, list(library.read_shards(finished_run / "data/web/00001.tar"))[:-1])
    done = capfilt("annotate", other, "--add-score", "side", "--out", run)
    assert done.code == 1
    assert "shard 00001 has changed since it was annotated in" in done.line


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--add-score", "sharpness"], "'sharpness' is no score; scores are side, aspect, entropy, sieve=ENCODER"),
        (["--add-score", "clip-B32=x"], "a NAME is of a-z, 0-9 and -"),
        (["--add-score", "side", "--add-score", "side"], "two scores are called side"),
        (["--add-score", "sieve={web}"], "is no folder of a sentence encoder"),
        (["--add-score", "clip:{web}"], "is no model"),
        (["--add-score", "nsfw={web}/none.safetensors@{filter}"], "is no head in safetensors"),
        (["--add-score", "side", "--captions", "3"], "--captions is of an annotation: leave one out"),
        (["--captioner", "{filter}"], "--filter MODEL is needed"),
        (["--filter", "{filter}"], "--captioner MODEL is needed"),
    ],
)
def test_a_mistake_is_told_before_anything_is_done(
    words: list[str], error: str, annotated: Path, finished_run: Path, capfilt: Any
) -> None:
    before = files(annotated)
    names = {"web": finished_run / "data/web", "filter": finished_run / "round-1/filter"}
    given = [word.format(**names) for word in words]
    done = capfilt("annotate", finished_run / SHARDS, *given, "--out", annotated)
    assert done.code in (1, 2)
    assert error in done.line
    assert files(annotated) == before


@pytest.mark.slow
def test_ray_and_kill_nine(run: Path, finished_run: Path, encoder: Path, tmp_path: Path) -> None:
    """Processes killed at any moment leave what an undisturbed command leaves."""
    command = [sys.executable, "-m", "capfilt", "annotate", str(finished_run / SHARDS), "--address", "local"]
    specs = options("--add-score", "side", "entropy", f"sieve={encoder}", f"clip:{finished_run}/round-1/filter")
    undisturbed = Path(shutil.copytree(run, tmp_path / "b"))
    subprocess.run([*command, *specs, "--out", str(undisturbed)], check=True, capture_output=True)
    for seconds in (4.0, 4.6, 5.2, 5.8, 6.4):
        process = subprocess.Popen([*command, *specs, "--out", str(run)], stderr=subprocess.DEVNULL)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    subprocess.run([*command, *specs, "--out", str(run)], check=True, capture_output=True)
    assert results(run) == results(undisturbed)
    assert scores.names(run) == ["clip-filter", "entropy", "side", "sieve"]
