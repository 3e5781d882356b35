"""Candidate answers of dialogs, ranked by both kinds of models, beside trivial orders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import DataError, RecipeError
from capfilt.evaluation.tasks import dialog
from capfilt.evaluation.tasks.config import DialogEvalConfig
from capfilt.inference.local_model import LocalModel
from capfilt.models import architecture_of, build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def local() -> LocalModel:
    torch.manual_seed(0)
    return LocalModel(build(architecture_of("blip/tiny")).eval(), Tokenizer.load("world"))


def samples_of(folder: Path) -> list[Sample]:
    items = [item for url in shards.expand(str(folder)) for item in shards.read(url)]
    return [item for item in items if isinstance(item, Sample)]


def test_figures_and_the_server_s_rows(local: LocalModel, dialog_shards: Path, tmp_path: Path) -> None:
    measured = dialog.measure(local, shards.expand(str(dialog_shards)), DialogEvalConfig(batch_size=5), CPU)
    figures = measured.figures["dialog"]
    assert measured.figures["rows"] == figures["rounds"] == 36
    assert figures["dense_rounds"] == 12
    assert figures["guessing"]["r@1"] == pytest.approx(10.0)
    assert figures["prior"]["r@1"] > 25
    assert figures["ranked_by"] == "match"
    assert measured.write_answers is not None
    measured.write_answers(tmp_path / "ranks.json")
    answers = json.loads((tmp_path / "ranks.json").read_text())
    right = {
        (sample.meta["dialog"]["id"], number): one["gt_index"]
        for sample in samples_of(dialog_shards)
        for number, one in enumerate(sample.meta["dialog"]["rounds"], 1)
    }
    places = [row["ranks"][right.pop((row["image_id"], row["round_id"]))] for row in answers]
    assert right == {}
    assert np.mean(places) == pytest.approx(figures["mean_rank"])


@pytest.mark.parametrize("by", ["match", "likelihood"])
def test_each_candidate_by_itself(local: LocalModel, dialog_shards: Path, by: Literal["match", "likelihood"]) -> None:
    """Neither the other candidates nor the padding beside them count."""
    (first, second, *_) = samples_of(dialog_shards)
    rounds = [one for sample in (first, second) for one in dialog.rounds_of(sample, [])]
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = local.model.encode_image(images)
        together = dialog.scores_of(local, tokens, rounds, [0, 0, 0, 1, 1, 1], 64, by == "match")
        for number in (0, 4):
            one = rounds[number]
            for place, candidate in enumerate(one.text.candidates):
                alone = one._replace(text=one.text._replace(candidates=(candidate,)))
                picture = tokens[number // 3 : number // 3 + 1]
                (score,) = dialog.scores_of(local, picture, [alone], [0], 64, by == "match")
                assert score[0] == pytest.approx(together[number][place], abs=2e-4)


def test_rows_that_cannot_be_used_are_counted(local: LocalModel, dialog_shards: Path, tmp_path: Path) -> None:
    samples = samples_of(dialog_shards)[:3]
    worse: list[Any] = [sample.meta["dialog"] for sample in samples]
    worse[0] = {**worse[0], "rounds": [{**one, "relevance": [0.5]} for one in worse[0]["rounds"]]}
    worse[1] = {**worse[1], "id": 99, "rounds": [{**one, "relevance": [0.0] * 10} for one in worse[1]["rounds"]]}
    written = [replace(one, meta={**one.meta, "dialog": new}) for one, new in zip(samples, worse, strict=True)]
    shards.write(tmp_path / "00000.tar", [replace(written[2], image=b"no picture"), *written[:2]])
    measured = dialog.measure(local, [str(tmp_path / "00000.tar")], DialogEvalConfig(), CPU)
    assert measured.figures["rows"] == 9
    assert sum(measured.figures["left_out"].values()) == 6
    assert measured.figures["dialog"]["rounds"] == measured.figures["dialog"]["all_irrelevant"] == 3
    assert "ndcg" not in measured.figures["dialog"]


def test_what_a_model_cannot_rank_by() -> None:
    with pytest.raises(RecipeError, match="albef cannot decode: set by=match"):
        DialogEvalConfig(by="likelihood").check_architecture(Path("albef"), architecture_of("albef/tiny"))
    DialogEvalConfig(by="likelihood").check_architecture(Path("blip"), architecture_of("blip/tiny"))


def test_shards_without_dialogs(local: LocalModel, small_world: Path) -> None:
    with pytest.raises(DataError, match="nothing can be evaluated"):
        dialog.measure(local, shards.expand(str(small_world / "human")), DialogEvalConfig(), CPU)
