from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from capfilt import config as configs
from capfilt import presets
from capfilt.inference.device import Compute
from capfilt.models import architecture_of
from capfilt.models.checkpoints import store
from capfilt.pipelines.pretrain import PretrainConfig
from capfilt.runs.progress import StageLine
from capfilt.stages import train as stage_train
from capfilt.stages.train import Tail
from capfilt.training.job import TrainJob

FEW = ["--set", "train.steps=3", "--set", "train.loader.batch_size=8"]


@pytest.fixture
def small(model_yaml: Path) -> list[str]:
    return [*FEW, "--set", f"model={model_yaml}"]


def test_the_preset_trains_on_shards_that_are_named(
    finished_run: Path, tmp_path: Path, capfilt: Any, small: list[str], snapshot: Any
) -> None:
    data = f"data={finished_run}/data/web/{{00000..00002}}.tar"
    words = ["pretrain", "blip-tiny", "--out", tmp_path / "run", *small, "--set", data]
    done = capfilt(*words, "--json")
    assert done.code == 0, done.err
    folder = Path(json.loads(done.out)["model"])
    assert folder == tmp_path / "run/pretrain/checkpoint"
    assert store.load(folder).capabilities >= {"fuse", "decode"}
    log = [json.loads(line) for line in (tmp_path / "run/pretrain/log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3
    assert {"itc", "itm", "lm"} <= set(log[-1])
    assert yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["train"]["steps"] == 3
    before = snapshot(tmp_path / "run")
    done = capfilt(*words)
    assert "resumed" in done.err
    assert done.out.split()[:2] == ["model", str(folder)]
    assert snapshot(tmp_path / "run") == before


def test_its_default_data_is_the_folder_shards(
    finished_run: Path, tmp_path: Path, capfilt: Any, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = capfilt("pretrain", "blip-tiny", "--out", "run", *small)
    assert done.code == 2
    assert "no shard found at 'shards'" in done.line
    (tmp_path / "shards").symlink_to(finished_run / "data/human")
    assert capfilt("pretrain", "blip-tiny", "--out", "run", *small).code == 0


def test_a_model_can_be_trained_further(finished_run: Path, tmp_path: Path, capfilt: Any, small: list[str]) -> None:
    start = finished_run / "round-0/pretrain"
    words = ["pretrain", "blip-tiny", *small, "--set", f"data={finished_run}/data/human", "--set", f"start={start}"]
    still = ["--set", "train.optimizer.lr=1e-12", "--set", "train.optimizer.min_lr=0"]
    assert capfilt(*words, *still, "--out", tmp_path / "run").code == 0
    result = store.read(tmp_path / "run/pretrain/checkpoint")[1]
    own = store.read(start / "checkpoint")[1]
    assert all(result[name].allclose(own[name], atol=1e-6) for name in own)
    done = capfilt(*words, "--set", "model=blip/tiny", "--out", tmp_path / "other")
    assert done.code == 2
    assert "has vision.width 16, and `model`" in done.line


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--set", "train.objectives.losses={}"], 2, "train.objectives.losses"),
        (["--set", "train.loader.batch_size=7", "--set", "resources.workers=2"], 2, "cannot be split over 2 workers"),
        (["--set", "resources.micro_batches=3"], 2, "cannot be split into 3 micro_batches of each of 2 workers"),
        (
            ["--set", "resources.micro_batches=2", "--set", "train.objectives.negatives=all"],
            2,
            "micro_batches is 2, and objectives.negatives 'all' takes images of other processes",
        ),
        (["--set", "resources.parallel=zero"], 2, "resources.parallel"),
        (["--set", "train.image_size=40"], 2, "image_size 40 is not a multiple of patch_size"),
        (["--set", "model=blip/tny"], 2, "Did you mean 'blip/tiny'?"),
        (["--set", "tokenizer=nowhere.txt"], 1, "no vocabulary at 'nowhere.txt'"),
        (["--set", "data=[]"], 2, "'data'"),
    ],
)
def test_what_cannot_be_trained_is_said(
    finished_run: Path, tmp_path: Path, capfilt: Any, small: list[str], words: list[str], code: int, said: str
) -> None:
    data = ["--set", f"data={finished_run}/data/human"]
    done = capfilt("pretrain", "blip-tiny", "--out", tmp_path / "run", *small, *data, *words)
    assert done.code == code
    assert said in done.line
    assert not list(tmp_path.glob("run/pretrain/checkpoint"))


def test_an_objective_that_the_model_has_no_part_for(
    finished_run: Path, tmp_path: Path, capfilt: Any, small: list[str], model_yaml: Path
) -> None:
    tree = yaml.safe_load(model_yaml.read_text())
    tree["text"]["roles"] = ["encoder"]
    half = tmp_path / "half.yaml"
    half.write_text(yaml.safe_dump(tree))
    words = [*small, "--set", f"data={finished_run}/data/human", "--set", f"model={half}"]
    done = capfilt("pretrain", "blip-tiny", "--out", tmp_path / "run", *words)
    assert done.code == 2
    assert "objective 'lm' needs a model that can decode" in done.line
    assert "it can be trained with: itc, itm" in done.line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_training_of_shared_weights_leaves_what_one_of_whole_ones_does(
    finished_run: Path, tmp_path: Path, capfilt: Any, small: list[str]
) -> None:
    """Two ranks under Ray: the model, the best one, the momentum copy; nothing drawn at random."""
    settings = {
        "data": f"{finished_run}/data/human", "train.steps": 6, "train.checkpoint_every": 2, "train.keep_best": "true",
        "train.keep_momentum": "true", "train.objectives.losses": "{itc: 1.0}", "resources.workers": 2,
        "train.objectives.queue": 16,
    }  # fmt: skip
    words = ["pretrain", "blip-tiny", *small] + [w for k, v in settings.items() for w in ("--set", f"{k}={v}")]
    for parallel in ("ddp", "fsdp"):
        done = capfilt(*words, "--set", f"resources.parallel={parallel}", "--out", tmp_path / parallel, address="start")
        assert done.code == 0, done.err
    for name in ("checkpoint/model.safetensors", "checkpoint/momentum.safetensors", "best/model.safetensors"):
        one, other = (safetensors.torch.load_file(tmp_path / way / "pretrain" / name) for way in ("ddp", "fsdp"))
        assert one.keys() == other.keys()
        gaps = torch.cat([(one[key] - other[key]).abs().flatten() for key in one if ".key." not in key])
        # AdamW makes whole steps of what is nothing but rounding.
        assert float((gaps < 1e-5).float().mean()) > 0.98


@pytest.mark.slow
def test_ctrl_c_in_a_training_costs_the_steps_since_the_last_state(
    finished_run: Path, tmp_path: Path, capfilt: Any, model_yaml: Path, ignore_signals: Any
) -> None:
    settings = {"train.steps": 80, "train.checkpoint_every": 10, "train.log_every": 5, "train.loader.batch_size": 16}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    sets += ["--set", f"model={model_yaml}", "--set", f"data={finished_run}/data/web"]
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "capfilt", "pretrain", "blip-tiny", "--out", out, *sets, "--address", "local"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=ignore_signals,
    )
    while not list((out / "pretrain/states").glob("*/state.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted: run the same command again to go on"
    assert "Traceback" not in said
    assert not (out / "pretrain/checkpoint").exists()
    assert capfilt("pretrain", "blip-tiny", "--out", out, *sets).code == 0
    steps = [json.loads(line)["step"] for line in (out / "pretrain/log.jsonl").read_text().splitlines()]
    assert steps[-1] == 80
    assert len(steps) <= 16 + 2, "it began again at the last state, not at step 0"
    assert capfilt("pretrain", "blip-tiny", "--out", tmp_path / "undisturbed", *sets).code == 0
    model = "pretrain/checkpoint/model.safetensors"
    assert (out / model).read_bytes() == (tmp_path / "undisturbed" / model).read_bytes()
    assert not (out / "pretrain/states").exists(), "the model is in the ledger"


@pytest.mark.parametrize("name", [name for name in presets.names("pipelines") if name.startswith("pretrain/")])
def test_no_recipe_lets_two_workers_read_the_same(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = configs.read(presets.find("pipelines", name), PretrainConfig)
    job = TrainJob(
        out=Path("a"),
        architecture=architecture_of(config.model),
        tokenizer="world",
        sources=config.data,
        train=config.train,
        compute=Compute(device="cpu", precision="fp32"),
    )
    stage_train.warn_of_lanes(job, config.resources.workers)
    assert not caplog.records
    stage_train.warn_of_lanes(job, 1000)
    assert "1000 workers read the data in" in caplog.text


def test_the_log_moves_the_line(tmp_path: Path) -> None:
    answer: list[tuple[int, str]] = []
    line = StageLine("pretrain", 100, lambda line: answer.append((line.done, line.note)))
    reported: list[tuple[int, int]] = []
    tail = Tail(tmp_path / "log.jsonl", line, lambda newest, steps: reported.append((newest["step"], steps)))
    assert tail.poll() == 0
    assert answer == []
    (tmp_path / "log.jsonl").write_text('{"step": 20, "lm": 3.14159, "samples_per_second": 99.6}\n{"step": 40, "l')
    tail.poll()
    assert answer == [], "a line that is being written is not read"
    (tmp_path / "log.jsonl").write_text('{"step": 20, "itc": 1.0, "lm": 3.14159, "samples_per_second": 99.6}\n')
    assert tail.poll() == 20
    assert answer == [(20, "itc 1.000 lm 3.142  100 pairs/s")]
    for step in (20, 10, 30):  # after a kill, steps are done again
        (tmp_path / "log.jsonl").write_text(f'{{"step": {step}, "samples_per_second": 99.6}}\n')
        tail.poll()
    assert reported == [(20, 20), (30, 10)]
    reported.clear()
    (tmp_path / "log.jsonl").unlink()
    forked = Tail(tmp_path / "log.jsonl", line, lambda newest, steps: reported.append((newest["step"], steps)))
    lines = ['{"step": 60, "samples_per_second": 1, "resumed": 50}', '{"step": 80, "samples_per_second": 1}']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert forked.poll() == 80
    assert reported == [(80, 30)], "the first 50 are of the log of the run that it was forked from"
