"""Grounding: the loss of a step by hand, models that cannot, and a training that is measured at its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from row_shards import write_shard

from capfilt.data.loading.config import Source
from capfilt.evaluation.tasks import TASKS
from capfilt.inference.device import Compute
from capfilt.inference.local_model import LocalModel
from capfilt.models import architecture_of, build
from capfilt.objectives.interface import BoxBatch
from capfilt.objectives.kinds.downstream import GroundingObjectives
from capfilt.objectives.losses.boxes import box_losses
from capfilt.objectives.tasks import build_task, unsupported
from capfilt.training.config import TrainConfig
from capfilt.training.job import TrainJob
from capfilt.training.loop import train

CPU = torch.device("cpu")


def test_the_losses_are_those_of_each_phrase_beside_its_picture() -> None:
    torch.manual_seed(0)
    model = build(architecture_of("xvlm/tiny")).eval()
    task = build_task(model, GroundingObjectives()).eval()
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(5, 190, (3, 6))
    mask = (torch.arange(6) < torch.tensor([[6], [4], [5]])).long()
    boxes = torch.rand(3, 4) / 2 + 0.2
    losses, metrics = task(BoxBatch(images, ids, mask, torch.arange(3), boxes), 0.0)
    predicted = []
    for row in range(3):
        length = int(mask[row].sum())
        context = model.image_context(model.encode_image(images[row : row + 1]), "encoder")
        states = model.fuse(ids[row : row + 1, :length], mask[row : row + 1, :length], context)
        predicted.append(model.predict_box(states))
    box, giou = box_losses(torch.cat(predicted), boxes, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(losses, {"box": box, "giou": giou}, atol=1e-5, rtol=1e-5)
    assert 0 <= metrics["box_accuracy"] <= 1
    assert task.total(losses) == losses["box"] + losses["giou"]


@pytest.mark.parametrize("name", ["blip/tiny", "albef/tiny", "clip/tiny"])
def test_a_model_without_a_head_for_boxes_is_refused(name: str) -> None:
    assert "xvlm can" in unsupported(architecture_of(name), GroundingObjectives())


def test_a_training_from_shards_without_captions_ends_with_a_model_that_is_measured(tmp_path: Path) -> None:
    settings = {
        "steps": 3,
        "loader": {"batch_size": 4, "max_length": 12, "shuffle": 8},
        "objectives": {"task": "grounding"},
        "optimizer": {"lr": 1e-3},
        "precision": "fp32",
        "log_every": 1,
    }
    regions = [{"id": n, "text": "a red ring", "box": [4 + n, 3, 12, 9]} for n in range(4)]
    url = write_shard(tmp_path / "00000.tar", *({"json": {"regions": [one]}} for one in regions))
    job = TrainJob(
        out=tmp_path / "run",
        architecture=architecture_of("xvlm/tiny"),
        tokenizer="world",
        sources=(Source(shards=url),),
        train=TrainConfig.model_validate(settings),
        compute=Compute(device="cpu", precision="fp32"),
    )
    train(job)
    lines = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()]
    assert all({"box", "giou", "box_accuracy"} <= line.keys() for line in lines)
    local = LocalModel.load(job.model_folder, CPU)
    measured = TASKS["grounding"](task="grounding").measure(local, [url], CPU)
    assert (measured.figures["rows"], measured.figures["grounding"]["method"]) == (4, "boxes")
