"""Fine-tunings for downstream tasks, end to end in this process: from a base alone, on any family, cut and resumed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from capfilt.data.loading.config import Source
from capfilt.inference.device import Compute
from capfilt.models import architecture_of, build
from capfilt.models.checkpoints import store
from capfilt.models.heads.classifier import Classifier
from capfilt.models.heads.config import AnswererConfig, ClassifierConfig
from capfilt.models.heads.pairs import Merged
from capfilt.training.config import TrainConfig
from capfilt.training.job import TrainJob
from capfilt.training.loop import train

LABELS = ("entailment", "neutral", "contradiction")


def job(out: Path, shards: Path, base: str, objectives: dict[str, Any], **job: Any) -> TrainJob:
    settings = {
        "steps": 2,
        "loader": {"batch_size": 4, "max_length": 16, "shuffle": 8},
        "objectives": objectives,
        "precision": "fp32",
        "log_every": 1,
    }
    if base:
        job["architecture"] = ClassifierConfig.model_validate({"base": base, "labels": LABELS})
    return TrainJob(
        out=out,
        tokenizer="world",
        sources=(Source(shards=str(shards)),),
        train=TrainConfig.model_validate(settings),
        compute=Compute(device="cpu", precision="fp32"),
        **job,
    )


@pytest.mark.parametrize("family", ["blip", "albef", "vilt", "vlmo", "xvlm"])
def test_entailment_from_a_base_alone(family: str, task_shards: Path, tmp_path: Path) -> None:
    base = build(architecture_of(f"{family}/tiny"))
    store.save(base, tmp_path / "base")
    training = job(tmp_path / "run", task_shards, f"{family}/tiny", {"task": "entailment"}, start=tmp_path / "base")
    train(training)
    lines = [json.loads(line) for line in (training.out / "log.jsonl").read_text().splitlines()]
    assert [line["outside"] for line in lines] == [0, 0]
    assert all(0 < line["answer"] < 10 for line in lines)
    trained = store.load(training.model_folder)
    assert trained.config == training.architecture
    untouched = dict(base.named_parameters())
    moved = {name for name, p in trained.base.named_parameters() if not p.equal(untouched[name])}
    assert any("vision" in name or "blocks" in name for name in moved), "the whole base is trained"


FROM_BASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nlvr2 of blip": ({"base": "blip/tiny", "labels": ["false", "true"], "images": 2}, {"task": "nlvr2"}),
    "nlvr2 of albef": ({"base": "albef/tiny", "labels": ["false", "true"], "images": 2}, {"task": "nlvr2"}),
    "nlvr2 of vilt": ({"base": "vilt/tiny", "labels": ["false", "true"], "images": 2}, {"task": "nlvr2"}),
    "nlvr2 of vlmo": ({"base": "vlmo/tiny", "labels": ["false", "true"], "images": 2}, {"task": "nlvr2"}),
    "vqa by classes": ({"base": "vlmo/tiny", "labels": ["ring", "red"]}, {"task": "vqa-classes"}),
    "vqa of xvlm": ({"base": "xvlm/tiny"}, {"task": "vqa", "alpha": 0.4}),
    "vqa of blip": ({}, {"task": "vqa"}),
}


@pytest.mark.parametrize("case", FROM_BASES)
@pytest.mark.slow
def test_other_tasks_from_a_base_alone(case: str, task_shards: Path, tmp_path: Path) -> None:
    model, objectives = FROM_BASES[case]
    if not model:
        architecture, base = architecture_of("blip/tiny-answers"), build(architecture_of("blip/tiny"))
    else:
        kind = AnswererConfig if objectives["task"] == "vqa" else ClassifierConfig
        architecture, base = kind.model_validate(model), build(architecture_of(model["base"]))
    store.save(base, tmp_path / "base")
    started = store.load_continued(tmp_path / "base", architecture)
    assert started.config == architecture
    if model:
        new = re.compile(r"head\.|pair\.merges\.")
        assert started.fresh == {name for name, _ in started.named_parameters() if new.match(name)}
    saved = base.state_dict()
    if objectives["task"] == "vqa":
        part = "self_attention.shared.block.query.weight" if model else "feed_forward.shared.block.up.weight"
        names = (f"text.layers.3.{part}", f"decoder.layers.1.{part}")
        if not model:
            names = (f"text.layers.1.{part}", f"text.layers.1.{part}".replace("shared", "decoder"))
        assert started.state_dict()[names[1]].equal(saved[names[0]]), "the decoder begins as the base"
    training = job(tmp_path / "run", task_shards, "", objectives, start=tmp_path / "base", architecture=architecture)
    train(training)
    trained = store.load(training.model_folder)
    assert trained.config == architecture
    lines = [json.loads(line) for line in (training.out / "log.jsonl").read_text().splitlines()]
    assert all(0 < line["answer"] < 60 for line in lines)


def test_a_decoder_keeps_no_keys_and_values_of_another_width(tmp_path: Path) -> None:
    """X-VLM's attends to questions, its fusion layers to wider tokens of pictures: what is fresh learns faster."""
    wide = {"extends": "xvlm/tiny", "vision": {"embed": 64}}
    architecture = AnswererConfig.model_validate({"base": wide})
    base = build(architecture_of("xvlm/tiny").changed(embed=64))
    store.save(base, tmp_path / "base")
    started = store.load_continued(tmp_path / "base", architecture)
    new = re.compile(r"decoder\..*cross_attention.*\.(key|value)\.")
    assert started.fresh == {name for name, _ in started.named_parameters() if new.match(name)}
    assert len(started.fresh) == 8


def test_two_equal_pictures_are_read_as_one_where_layers_are_doubled(tmp_path: Path) -> None:
    """BLIP's merge begins as the mean of two attentions that are copies: of a picture beside itself, what it was."""
    base = build(architecture_of("blip/tiny")).eval()
    store.save(base, tmp_path / "base")
    given = {"base": "blip/tiny", "labels": ["false", "true"], "images": 2}
    pair = store.load_continued(tmp_path / "base", ClassifierConfig.model_validate(given)).eval()
    assert isinstance(pair, Classifier)
    assert isinstance(pair.pair, Merged)
    for merge in pair.pair.merges:
        merge.linear = None  # all of them the mean
    ids = torch.randint(5, 190, (2, 6))
    mask, images = torch.ones_like(ids), torch.randn(2, 3, 32, 32)
    tokens = pair.encode_image(torch.cat([images, images]))
    one = base.fuse(ids, mask, base.image_context(base.encode_image(images), "encoder"))[:, 0]
    torch.testing.assert_close(pair.pair(pair.base, tokens, ids, mask), one)


def test_nlvr2_goes_on_from_text_assignment_with_a_head_of_its_own(
    small_world: Path, task_shards: Path, tmp_path: Path
) -> None:
    store.save(build(architecture_of("albef/tiny")), tmp_path / "base")
    given = {"base": "albef/tiny", "labels": ["left", "right", "neither"], "images": 2}
    architecture = ClassifierConfig.model_validate(given)
    objectives = {"task": "assign"}
    assigned = job(
        tmp_path / "assign", small_world / "human", "", objectives, start=tmp_path / "base", architecture=architecture
    )
    train(assigned)
    pair = architecture.with_answers(("false", "true"))
    started = store.load_continued(assigned.model_folder, pair)
    before = store.load(assigned.model_folder).state_dict()
    assert all(t.equal(before[name]) for name, t in started.state_dict().items() if not name.startswith("head."))
    assert len(started.state_dict()["head.2.bias"]) == 2
