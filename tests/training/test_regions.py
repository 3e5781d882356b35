"""Steps on regions between steps on pairs: both are taken, and a training that was cut goes on as it would have."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from capfilt.data.loading.config import Source
from capfilt.data.synthetic import world
from capfilt.inference.device import Compute
from capfilt.models import architecture_of
from capfilt.training import loop
from capfilt.training.config import TrainConfig
from capfilt.training.job import TrainJob
from capfilt.training.loop import train

FIVE = {"itc": 1.0, "itm": 1.0, "mlm": 1.0, "box": 1.0, "giou": 1.0}


def job(out: Path, shards: Path, **train: object) -> TrainJob:
    regions = {"share": 0.5, "images": 4, "texts": 6}
    settings = {
        "steps": 6,
        "loader": {"batch_size": 4, "max_length": 16, "shuffle": 8},
        "objectives": {"task": "xvlm", "losses": FIVE, "regions": regions},
        "precision": "fp32",
        "log_every": 1,
        "checkpoint_every": 3,
    }
    return TrainJob(
        out=out,
        architecture=architecture_of("xvlm/tiny"),
        tokenizer="world",
        sources=(Source(shards=str(shards)),),
        train=TrainConfig.model_validate(settings | train),
        compute=Compute(device="cpu", precision="fp32"),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    config = world.WorldConfig(web=0, human=8, val=0, test=0, shard_size=4, regions=True)
    world.write(config, 0, folder, "human")
    return folder / "human"


@pytest.mark.slow
def test_a_cut_training_takes_the_same_steps(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = job(tmp_path / "whole" / "train", folder), job(tmp_path / "cut" / "train", folder)
    train(whole)
    lines = [json.loads(line) for line in (whole.out / "log.jsonl").read_text().splitlines()]
    with_regions = [line["step"] for line in lines if "box" in line]
    assert 0 < len(with_regions) < 6
    for line in lines:
        assert {"itc", "itm", "mlm"} <= line.keys()
        assert ("giou" in line) == ("region_mlm" in line) == (line["step"] in with_regions)

    steps = loop.learning_rate

    def stop(config: object, step: int, of: int) -> float:
        if step == 4:
            raise KeyboardInterrupt
        return steps(config, step, of)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "learning_rate", stop)
    with pytest.raises(KeyboardInterrupt):
        train(cut)
    monkeypatch.undo()
    train(cut)
    model = "model.safetensors"
    assert (cut.model_folder / model).read_bytes() == (whole.model_folder / model).read_bytes()


def test_a_box_outside_its_picture_is_named_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from capfilt.data import shards
    from capfilt.data.sample import Sample

    samples = [item for item in shards.read(str(folder / "00000.tar")) if isinstance(item, Sample)]
    for sample in samples[:2]:
        sample.meta["regions"][0]["box"] = [0, 0, 99, 1]
    (tmp_path / "shards").mkdir()
    shards.write(tmp_path / "shards" / "00000.tar", iter(samples))
    shutil.copy(folder / "00001.tar", tmp_path / "shards" / "00001.tar")
    with caplog.at_level(logging.WARNING):
        train(job(tmp_path / "out" / "train", tmp_path / "shards"))
    said = [
        record.getMessage() for record in caplog.records if "left out of the steps on regions" in record.getMessage()
    ]
    assert len(said) == 1
    assert "region 0: box [0, 0, 99, 1] lies outside the picture of 32 x 32 pixels" in said[0]
