"""How fast BLIP pretrains here: two ranks beside one, Ray beside torchrun; on a GPU, beside the same step in plain
transformers.

    python benchmarks/pretrain.py cpu
    python benchmarks/pretrain.py gpu --pairs 64

`cpu`: BLIP with ViT-S/16 and BERT of 384 x 6, 224 px, fp32, one thread a rank, on JPEGs of 640 x 480 with the grain of
photographs and texts of 4 to 16 words. The same global batch goes through one rank and through two, started by torchrun
and by Ray Train; two trainings of half the batch that exchange nothing are what two cores of this machine can give at
most. Every trial is a training of its own of a few steps, trials take turns, and a trial's figure is the median over
its steps without the first. `gpu`: BLIP-base at 224 px in bf16, the same made-up batch again and again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from capfilt import presets
from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.inference.device import Compute
from capfilt.models import Architecture, build, read_architecture
from capfilt.objectives.config import ObjectivesConfig
from capfilt.objectives.interface import PairBatch
from capfilt.objectives.tasks import build_task
from capfilt.pipelines.bench.made_up import made_up_words, make_shard
from capfilt.training.config import ExecutionConfig, OptimizerConfig, TrainConfig
from capfilt.training.distributed.data_parallel import Gradients
from capfilt.training.flops import peak_flops, step_flops
from capfilt.training.job import TrainJob
from capfilt.training.loop import train
from capfilt.training.optimizer import make_optimizer

VIT_S = ["vision.depth=12"]
"""ViT-S/16 is 384 x 12 x 6; the preset has six blocks."""
WORDS = 30524
APART = "two of half the batch that exchange nothing"
WARM = 1
"""Steps that are left out of a median."""


def make_job(folder: Path, out: str, pairs: int, steps: int) -> TrainJob:
    """A training of a few steps, every one of them in the log."""
    return TrainJob(
        out=folder / out,
        architecture=read_architecture(presets.find("models", "blip/small"), VIT_S),
        tokenizer=str(folder / "vocabulary"),
        sources=(Source(shards=str(folder / "data")),),
        train=TrainConfig(
            steps=steps,
            loader=LoaderConfig(batch_size=pairs, shuffle=64, max_length=30),
            objectives=ObjectivesConfig(queue=pairs * 64),
            precision="fp32",
            log_every=1,
        ),
        compute=Compute(device="cpu", precision="fp32"),
    )


def as_rank(job: TrainJob) -> None:
    """What torchrun starts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(job)
    dist.destroy_process_group()


def by_torchrun(job: TrainJob, world_size: int) -> None:
    """Train with `world_size` processes of torchrun's."""
    path = job.out.with_suffix(".json")
    path.write_text(job.model_dump_json())
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    # Ray gives its workers a lower priority than the machine's others; so that the two are alike, these have it, too.
    subprocess.run(
        ["nice", "-n", "15", sys.executable, *start, __file__, "rank", str(path)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO"},
    )


def by_ray(job: TrainJob, world_size: int) -> None:
    """Train with `world_size` workers of Ray Train, as `capfilt pretrain` does."""
    from capfilt.cluster.ray_train import fit
    from capfilt.cluster.session import connect
    from capfilt.stages.train import train_here

    with connect("start") as session:
        fit(session, train_here, {"job": job.model_dump(mode="json")}, world_size, 1, 0, job.out / "ray", "bench")


def figures(job: TrainJob) -> dict[str, float]:
    """Pairs a second and the share of time that the model waited for data: medians over steps."""
    lines = [json.loads(line) for line in (job.out / "log.jsonl").read_text().splitlines()][WARM:]
    seconds, waited = (statistics.median(line[name] for line in lines) for name in ("step_seconds", "data_wait"))
    return {"samples_per_second": round(job.train.loader.batch_size / seconds, 3), "data_wait": waited}


def apart(folder: Path, number: int, pairs: int, steps: int) -> dict[str, float]:
    """Two trainings of one rank and half the batch at once: what the machine gives to two processes."""
    jobs = [make_job(folder, f"apart-{number}-{which}", pairs // 2, steps) for which in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: by_torchrun(job, 1), jobs))
    one, other = map(figures, jobs)
    return {name: one[name] + other[name] for name in one}


def cpu(pairs: int, steps: int, repeats: int, ray: bool) -> None:
    """Trials in turns; prints every one and a table of medians."""
    trials: dict[str, Callable[[TrainJob], None]] = {
        "1 rank, torchrun": lambda job: by_torchrun(job, 1),
        "2 ranks, torchrun": lambda job: by_torchrun(job, 2),
    }
    if ray:
        trials["2 ranks, Ray"] = lambda job: by_ray(job, 2)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*trials, APART)}
    folder = Path(tempfile.mkdtemp(prefix="capfilt-bench-"))
    try:
        for number in range(4):
            make_shard(folder / f"data/{number:05d}.tar", 16, 640, WORDS - 7)
        made_up_words(WORDS).save(folder / "vocabulary")
        for number in range(repeats):
            for name, start in trials.items():
                job = make_job(folder, f"{name.replace(', ', '-').replace(' ', '-')}-{number}", pairs, steps)
                start(job)
                found[name].append(figures(job))
                print(name, found[name][-1], flush=True)
            found[APART].append(apart(folder, number, pairs, steps))
            print(APART, found[APART][-1], flush=True)
    finally:
        shutil.rmtree(folder)
    middle = {
        name: {key: statistics.median(trial[key] for trial in own) for key in own[0]} for name, own in found.items()
    }
    print(f"\n{pairs} pairs a step, {steps - WARM} steps a trial, medians of {repeats}\n\n| | pairs/s | data wait |")
    print("|---|---|---|")
    for name, own in middle.items():
        print(f"| {name} | {own['samples_per_second']:.2f} | {100 * own['data_wait']:.1f} % |")
    rate = {name: own["samples_per_second"] for name, own in middle.items()}
    print(f"\n2 ranks / 1 rank: {rate['2 ranks, torchrun'] / rate['1 rank, torchrun']:.3f}")
    print(f"2 ranks / two that exchange nothing: {rate['2 ranks, torchrun'] / rate[APART]:.3f}")
    if ray:
        print(f"Ray / torchrun: {rate['2 ranks, Ray'] / rate['2 ranks, torchrun']:.3f}")


def made_up(pairs: int, size: int, words: int, device: torch.device) -> PairBatch:
    """A batch of noise and of texts of 30 tokens."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(pairs, 3, size, size, generator=generator)
    ids = torch.randint(4, words - 2, (pairs, 30), generator=generator)
    return PairBatch(images, ids, torch.ones_like(ids), torch.arange(pairs)).to(device)


def timed(step: Callable[[], Any], device: torch.device, steps: int) -> float:
    """Seconds of a step: the median, without the first ones."""
    seconds = []
    for _ in range(WARM + steps):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM:])


def own_step(
    architecture: Architecture,
    objectives: ObjectivesConfig,
    execution: ExecutionConfig,
    batch: PairBatch,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """capfilt's step, as its loop takes it."""
    device = batch.device
    learner = build_task(build(architecture), objectives).to(device)
    gradients = Gradients(learner, execution, device, dtype)
    optimizer = make_optimizer(learner, OptimizerConfig())

    def take() -> None:
        gradients.of(batch, 0.5)
        gradients.clip(0.0)
        optimizer.step()

    return take


def gpu(model: str, pairs: int, steps: int, compile_blocks: bool) -> None:
    """capfilt's step and the plain one on this device; samples/s, MFU, and how many times as fast."""
    from pretrain_plain import PlainStep

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    architecture = read_architecture(presets.find("models", model))
    objectives = ObjectivesConfig(queue=pairs * 256)
    batch = made_up(pairs, architecture.image_size, architecture.vocabulary_size, device)
    flops = step_flops(architecture, objectives, pairs, 30)
    peak = peak_flops(torch.cuda.get_device_name(device) if device.type == "cuda" else "", dtype)
    rates = {}

    def report(name: str, step: Callable[[], Any]) -> None:
        seconds = timed(step, device, steps)
        rates[name] = pairs / seconds
        used = f"{100 * flops / seconds / peak:.1f} %" if peak else "unknown: no peak FLOP/s of this device"
        print(f"{name}: {rates[name]:.1f} samples/s, MFU {used}", flush=True)

    report("capfilt", own_step(architecture, objectives, ExecutionConfig(compile=compile_blocks), batch, dtype))
    plain = PlainStep(architecture, objectives, device, dtype)
    report("plain transformers", lambda: plain.take(*batch[:3]))
    print(f"capfilt / plain: {rates['capfilt'] / rates['plain transformers']:.2f}")


def main() -> None:
    """Run what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    on_cpu = kinds.add_parser("cpu")
    on_cpu.add_argument("--pairs", type=int, default=12, help="global batch")
    on_cpu.add_argument("--steps", type=int, default=4)
    on_cpu.add_argument("--repeats", type=int, default=3)
    on_cpu.add_argument("--without-ray", action="store_true")
    on_gpu = kinds.add_parser("gpu")
    on_gpu.add_argument("--model", default="blip/base")
    on_gpu.add_argument("--pairs", type=int, default=64)
    on_gpu.add_argument("--steps", type=int, default=20)
    on_gpu.add_argument("--compile", action="store_true")
    kinds.add_parser("rank").add_argument("job", type=Path)
    num_targets = parser.parse_args()
    if num_targets.kind == "rank":
        as_rank(TrainJob.model_validate_json(num_targets.job.read_text()))
    elif num_targets.kind == "cpu":
        cpu(num_targets.pairs, num_targets.steps, num_targets.repeats, not num_targets.without_ray)
    else:
        gpu(num_targets.model, num_targets.pairs, num_targets.steps, num_targets.compile)


if __name__ == "__main__":
    main()
