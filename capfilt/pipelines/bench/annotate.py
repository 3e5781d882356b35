"""The benchmark of `annotate`: the whole stage in this process, from a tar to a committed Parquet.

Every text has exactly `tokens` tokens.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from capfilt.data import shards
from capfilt.evaluation import speed
from capfilt.evaluation.speed import Load
from capfilt.inference.batches import pictures
from capfilt.inference.captioners.spec import LocalSpec
from capfilt.inference.device import Compute, ability, autocast, choose, local_device
from capfilt.inference.timer import StageTimer
from capfilt.models import ArchitectureConfig
from capfilt.models.checkpoints import store
from capfilt.pipelines.bench.bench import BenchConfig
from capfilt.pipelines.bench.floor import AnnotateLoad, MachineRate, annotate_flops, floor_figures
from capfilt.pipelines.bench.made_up import make_models, make_shard, tokenizer_for
from capfilt.pipelines.bench.time_box import TimeBox, spread
from capfilt.runs import cost
from capfilt.runs.cost import Price
from capfilt.runs.progress import Progress
from capfilt.stages.annotation.annotate import AnnotateJob
from capfilt.stages.annotation.shard_annotator import ShardAnnotator, texts_of

FIRST, MOST = 2, 20_000
"""Pictures of the first warm-up, and of a repeat at most."""
BESIDE = ("read", "decode")
"""Phases that run in threads beside the others."""
WORDS = (4, 16)


def bench_annotate(
    config: BenchConfig,
    architectures: tuple[ArchitectureConfig, ArchitectureConfig],
    folder: Path,
    show: Progress,
    seconds: float,
    price: Price | None = None,
) -> dict[str, Any]:
    """Measure the stage with a captioner and a filter of these architectures."""
    num_words = min(tokenizer_for(one)[1] for one in architectures)
    compute, _ = choose(config.precision, local_device(), [ability()])
    device = compute.open()
    with show.wait("making up two models"):
        roles = make_models(architectures[0], folder, config.shared, architectures[1])
        settings = config.annotate(16 if device.type == "cpu" else 64)
        work = ShardAnnotator(make_job(config, compute, roles, folder / "run", settings.batch_size), device)
    stage = _Stage(config, work, compute, folder, num_words)
    with show.stage("bench annotate", config.repeats, "repeats") as line, autocast(device, compute.dtype):
        box = TimeBox(seconds, config.repeats, line)
        stage.images = box.size(stage.warm_up, FIRST, MOST, config.images)
        stage.write(stage.images)
        box.repeat(stage.measure)
    with show.wait("counting the floor"):
        flops = annotate_flops(_load(config, architectures, work))
    changed = {}
    if config.compared:
        with show.wait(f"comparing formats on {config.compared} images"):
            changed = {"against_fp32": _compared(work, stage.url, config.compared, settings.batch_size)}
    setup = {**config.model_dump(mode="json"), "images": stage.images, "batch_size": settings.batch_size}
    setup |= {"dtype": str(compute.dtype), "architectures": [one.model_dump(mode="json") for one in architectures]}
    figures = stage.figures(flops, price)
    about = {"machine": speed.machine(device), "versions": speed.versions()}
    return {"stage": "annotate", **figures, **changed, "setup": setup, "runs": {"seconds": stage.took}, **about}


class _Stage:
    """The stage on a shard of its own, and what it took."""

    def __init__(self, config: BenchConfig, work: ShardAnnotator, compute: Compute, folder: Path, num_words: int):
        self.config, self.work, self.folder, self.num_words = config, work, folder, num_words
        self.device = work.device
        self.rate = MachineRate(work.device, compute.dtype)
        self.timer = work.timer = work.annotator.timer = StageTimer(work.device)
        self.images, self.url = 0, ""
        self.took: list[float] = []
        self.phases: list[dict[str, float]] = []
        """Of each repeat, seconds by phase."""

    def write(self, images: int) -> None:
        """The shard of a repeat."""
        self.url = make_shard(self.folder / "web" / "00000.tar", images, self.config.width, self.num_words, WORDS)

    def warm_up(self, images: int) -> float:
        self.write(images)
        return self._run()

    def measure(self) -> str:
        """One repeat; a note of how fast it was."""
        self.rate.measure()
        self.timer.seconds.clear()
        self.took.append(self._run())
        phases = dict(self.timer.seconds)
        known = sum(spent for name, spent in phases.items() if name not in BESIDE)
        self.phases.append({**phases, "other": self.took[-1] - known})
        return f"{self.images / self.took[-1]:.1f} images/s"

    def _run(self) -> float:
        return speed.seconds(self.device, lambda: self.work.shard(self.url))

    def figures(self, flops: dict[str, float], price: Price | None) -> dict[str, Any]:
        """Medians over the repeats; `share` is of the sum of all phases but those that run beside them."""
        images, captions = self.images, self.config.captions
        rates = [images / took for took in self.took]
        median = {name: statistics.median(one.get(name, 0.0) for one in self.phases) for name in self.phases[0]}
        whole = sum(spent for name, spent in median.items() if name not in BESIDE)
        rate = statistics.median(rates)
        reached = {name: median[name] / images for name in flops} | {"all": 1 / rate}
        size = (torch.get_num_threads(), float(self.device.type == "cuda"))
        return {
            **spread("images_per_second", rates),
            "captions_per_second": rate * captions,
            "pairs_per_second": rate * (1 + captions),
            "share": {name: spent / whole for name, spent in median.items()},
            "floor": floor_figures(self.rate, flops, reached),
            **cost.rate_figures(rate, *size, price),
        }


def _load(
    config: BenchConfig, architectures: tuple[ArchitectureConfig, ArchitectureConfig], work: ShardAnnotator
) -> AnnotateLoad:
    annotator, web = work.annotator, sum(WORDS) // 2 + 2  # with a beginning and an end
    return AnnotateLoad(
        captioner=architectures[0].for_role("captioner"),
        filter=architectures[1].for_role("filter"),
        shared_vision=annotator.shared_vision,
        shared_context=annotator.shared_context,
        rows=config.rows,
        captions=config.captions,
        tokens=config.tokens,
        scored_tokens=round((web + config.captions * (config.tokens + 1)) / (1 + config.captions)),
    )


def _compared(work: ShardAnnotator, url: str, images: int, batch_size: int) -> dict[str, dict[str, float]]:
    """What bf16 and batches of one change against fp32."""
    batch = next(iter(pictures(shards.read(url), images, work.formats)))
    some = Load(batch.on(work.device, work.formats), batch.samples, [texts_of(sample) for sample in batch.samples])
    return {
        "batches_of_one": speed.agreement(work.annotator, some, work.device, torch.float32, 1),
        "bf16": speed.agreement(work.annotator, some, work.device, torch.bfloat16, batch_size),
    }


def make_job(
    config: BenchConfig, compute: Compute, roles: tuple[Path, Path], out: Path, batch_size: int = 16
) -> AnnotateJob:
    """The job of the stage."""
    return AnnotateJob(
        out=out,
        captioner=LocalSpec(model=roles[0]),
        filter=roles[1],
        captioner_fingerprint=store.fingerprint(roles[0]),
        filter_fingerprint=store.fingerprint(roles[1]),
        config=config.annotate(batch_size),
        compute=compute,
        seed=0,
        round=0,
    )
