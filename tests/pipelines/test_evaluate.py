from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from capfilt.data import shards
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.models import architecture_of, build
from capfilt.models.checkpoints import store


def test_the_verb_measures_what_the_round_measured(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    settings = ["--set", "decode.max_length=12", "--set", "decode.min_length=3", "--set", "decode.method=greedy"]
    done = capfilt("evaluate", finished_run / "round-1/pretrain", finished_run / "data/test", *settings, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == json.loads((finished_run / "round-1/metrics.json").read_text())


def test_the_filter_is_measured_where_the_truth_is_known(colours: Path, tmp_path: Path, capfilt: Any) -> None:
    """By the model itself, without annotations: the same figures as the round had from its annotations."""
    known = json.loads((colours / "summary.json").read_text())["rounds"][1]["filter"]
    threshold = f"threshold={known['threshold'] - 1e-6!r}"  # scores may differ in the last digit between batches
    words = ["evaluate", colours / "round-1/filter", colours.parent / "web", "--set", threshold]
    done = capfilt(*words, "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer.keys() == {"filter"}, "these are web texts: neither retrieval nor captioning is measured on them"
    for name in ("auc", "precision", "recall", "kept"):
        assert answer["filter"][name] == pytest.approx(known[name], abs=1e-3)
    assert answer["filter"]["auc_by_kind"].keys() == {"other"}
    rows = pq.read_table(colours / "round-1/annotations/00000.parquet").to_pylist()
    cosine = {row["key"]: row["itc"] for row in rows if row["source"] == "web"}
    expected = {key for key, score in cosine.items() if score >= 0.2}
    by_cosine = json.loads(capfilt(*words[:3], "--set", "score=itc", "--set", "threshold=0.2", "--json").out)
    assert by_cosine["filter"]["kept"] == pytest.approx(len(expected) / 64, abs=0.02)


def test_both_kinds_of_shards_at_once(finished_run: Path, capfilt: Any) -> None:
    both = f"{finished_run / 'data/web'}::{finished_run / 'data/test'}"
    answer = json.loads(capfilt("evaluate", finished_run / "round-0/pretrain", both, "--json").out)
    alone = json.loads(capfilt("evaluate", finished_run / "round-0/pretrain", finished_run / "data/test", "--json").out)
    assert answer["retrieval"] == pytest.approx(alone["retrieval"])
    assert set(answer) - set(alone) == {"filter"}


def test_roles_that_a_model_cannot_play_are_left_out(finished_run: Path, capfilt: Any) -> None:
    judge = json.loads(capfilt("evaluate", finished_run / "round-1/filter", finished_run / "data/test", "--json").out)
    writer = json.loads(
        capfilt("evaluate", finished_run / "round-1/captioner", finished_run / "data/test", "--json").out
    )
    assert (set(judge), set(writer)) == ({"retrieval"}, {"captioning"})
    done = capfilt("evaluate", finished_run / "round-1/captioner", finished_run / "data/web")
    assert done.code == 1
    assert "nothing can be measured" in done.line


def test_reranking_asks_the_image_grounded_encoder(finished_run: Path, capfilt: Any) -> None:
    words = ["evaluate", finished_run / "round-1/filter", finished_run / "data/test", "--json"]
    plain, reranked = (json.loads(capfilt(*words, *more).out) for more in ([], ["--set", "rerank=60"]))
    assert plain["retrieval"].keys() == reranked["retrieval"].keys()
    assert plain != reranked


def test_a_picture_that_cannot_be_read_is_counted(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    whole = list(shards.read(str(finished_run / "data/test/00000.tar")))
    (tmp_path / "test").mkdir()
    data = (finished_run / "data/test/00000.tar").read_bytes()
    first = whole[0].image  # type: ignore[union-attr]
    (tmp_path / "test/00000.tar").write_bytes(data.replace(first, b"\0" * len(first)))
    done = capfilt("evaluate", finished_run / "round-0/pretrain", tmp_path / "test", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["unreadable"] == 1
    assert "retrieval" in answer


def test_out_keeps_the_figures_and_is_a_run_folder_of_its_own(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    words = ["evaluate", finished_run / "round-0/pretrain", finished_run / "data/test", "--out", tmp_path / "e"]
    done = capfilt(*words)
    assert done.code == 0
    kept = tmp_path / "e/metrics.json"
    answer = dict(line.split() for line in done.out.partition("\n\n")[0].splitlines())
    assert answer["retrieval.tr@1"] == f"{json.loads(kept.read_text())['retrieval']['tr@1']:.4f}"
    before = kept.stat().st_mtime_ns
    assert "resumed" in capfilt(*words).err
    assert kept.stat().st_mtime_ns == before
    done = capfilt("evaluate", finished_run / "round-1/pretrain", finished_run / "data/test", "--out", tmp_path / "e")
    assert done.code == 1
    assert "model: " in done.line
    # A round's own figures are not written over.
    done = capfilt(
        "evaluate", finished_run / "round-1/pretrain", finished_run / "data/test", "--out", finished_run / "round-0"
    )
    assert done.code == 2
    assert "no plan.json" in done.line


def test_a_task_is_a_run_of_its_own_whose_model_is_checked_before_it_is_read(
    finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    model, data = finished_run / "round-0/pretrain", finished_run / "data/test"
    classes = tmp_path / "classes.txt"
    classes.write_text("a ring\na circle\na cross\n")
    words = ["evaluate", model, data, "--classes", classes, "--task"]
    done = capfilt(*words, "classification")
    assert done.code == 1
    assert re.search("none of .* rows of this task can be used, mostly: no class", done.line)
    done = capfilt("evaluate", finished_run / "round-1/captioner", data, "--task", "grounding")
    assert done.code == 2
    assert "cannot be evaluated for grounding: that needs a head for boxes" in done.line
    words = ["evaluate", model, data, "--out", tmp_path / "e", "--task"]
    done = capfilt(*words, "retrieval", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer == json.loads((tmp_path / "e/metrics.json").read_text())
    default = json.loads(capfilt("evaluate", model, data, "--json").out)
    assert {name: answer["retrieval"][name] for name in default["retrieval"]} == default["retrieval"]
    images = answer["retrieval"]["images"]
    assert answer["retrieval"]["guessing"]["ir@1"] == pytest.approx(100 / images)
    assert answer["rows"] == images
    assert "resumed" in capfilt(*words, "retrieval").err
    assert "task: " in capfilt(*words, "captioning").line
    answer = json.loads(capfilt("evaluate", model, data, "--task", "captioning", "--json").out)
    assert {name: answer["captioning"][name] for name in default["captioning"]} == default["captioning"]
    assert answer["captioning"]["constant"].keys() == {"cider", "bleu4"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--task", "classify"], "--task classify: there is no such task; there are retrieval, .* Did you mean"),
        (["--classes", "FILE"], "--classes is of --task classification, not of an evaluation without a task"),
        (["--task", "classification", "--classes", "FILE"], "--classes: there is no file .*FILE; check the path"),
        (["--task", "grounding", "--templates", "FILE"], "--templates is of --task classification, not of grounding"),
        (["--task", "retrieval", "--results", "FILE"], "--results: retrieval has no result file"),
        (["--task", "grounding", "--set", "rerank=3"], "rerank"),
    ],
)
def test_an_option_that_a_task_does_not_have_is_a_usage_error(words: list[str], line: str, capfilt: Any) -> None:
    done = capfilt("evaluate", "no-model", "no-shards", *words)
    assert done.code == 2
    assert re.search(line, done.line)


def test_results_are_written_as_the_task_s_server_takes_them(task_shards: Path, tmp_path: Path, capfilt: Any) -> None:
    model = build(architecture_of("blip/tiny-answers"))
    store.save(model, tmp_path / "model")
    Tokenizer.load("world").save(tmp_path / "model")
    words = ["evaluate", tmp_path / "model", task_shards, "--task", "vqa", "--results", tmp_path / "answers.json"]
    done = capfilt(*words, "--out", tmp_path / "e", "--set", "batch_size=8")
    assert done.code == 0, done.err
    assert "annotate" not in done.out, "it plays neither role"
    rows = json.loads((tmp_path / "answers.json").read_text())
    assert [row["question_id"] for row in rows] == [*range(64)]
    (tmp_path / "answers.json").unlink()
    assert "resumed" in capfilt(*words, "--out", tmp_path / "e").err
    assert rows == json.loads((tmp_path / "answers.json").read_text())
    figures = json.loads((tmp_path / "e/metrics.json").read_text())
    assert (figures["vqa"]["questions"], figures["vqa"]["without_answers"], figures["rows"]) == (32, 32, 64)
