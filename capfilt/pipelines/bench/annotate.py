"""The benchmark of `annotate`: the whole stage in this process, and the bare annotator on the same pictures, in turns.

The stage goes from a tar to a committed Parquet; the annotator has the pictures decoded in memory.

Random weights cost what trained ones do, as long as they write texts of the same length: so every text has exactly
`tokens` tokens.
"""

from __future__ import annotations

import io
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.evaluation import speed
from capfilt.evaluation.speed import Load
from capfilt.inference.batches import pictures
from capfilt.inference.captioners.spec import LocalSpec
from capfilt.inference.device import Compute, ability, autocast, choose, local_device
from capfilt.inference.timer import StageTimer
from capfilt.models import Blip, BlipConfig
from capfilt.models.checkpoints import store
from capfilt.models.layers.config import Role
from capfilt.pipelines.bench.bench import BenchConfig
from capfilt.runs import cost
from capfilt.runs.cost import Price
from capfilt.runs.progress import Progress
from capfilt.stages.annotation.annotate import AnnotateJob
from capfilt.stages.annotation.shard_annotator import ShardAnnotator, texts_of

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def bench_annotate(
    config: BenchConfig, architecture: BlipConfig, folder: Path, show: Progress, price: Price | None = None
) -> dict[str, Any]:
    """Measure the stage and the bare annotator in turns."""
    compute, _ = choose(config.precision, local_device(), [ability()])
    device, dtype = compute.open(), compute.dtype
    roles = make_models(architecture, folder, config.shared)
    url = make_shard(folder / "web" / "00000.tar", config, architecture.text.vocab_size)
    timer = StageTimer(device)
    work = ShardAnnotator(make_job(config, compute, roles, folder / "run"), device, timer)
    (load,) = [
        Load(batch.on(device, work.formats), batch.samples, [texts_of(sample) for sample in batch.samples])
        for batch in pictures(shards.read(url), config.images, work.formats)
    ]
    stage, bare, shares = [], [], []
    with show.stage("bench annotate", config.repeats + 1) as line, autocast(device, dtype):
        for i in range(config.repeats + 1):
            timer.seconds.clear()
            took = speed.seconds(device, lambda: work.shard(url))
            spent, work.annotator.timer = dict(timer.seconds), None
            alone = speed.seconds(device, lambda: load.annotated(work.annotator, config.batch_size))
            work.annotator.timer = timer
            if i:  # the first time is for warming up
                stage.append(took)
                bare.append(alone)
                shares.append({name: part / took for name, part in spent.items()})
            line.update(i + 1, f"{config.images / took:.1f} images/s")
    some = load.part(0, config.compared)
    changed = {
        "batches_of_one": speed.agreement(work.annotator, some, device, torch.float32, 1),
        "bf16": speed.agreement(work.annotator, some, device, torch.bfloat16, config.batch_size),
    }
    passes = 1 if work.annotator.shared_vision else 2
    rate = speed.matmul_rate(device, dtype, architecture.vision, config.batch_size)
    floor = config.images * passes * speed.vision_flops(architecture.vision) / rate
    figures = _figures(config, _texts(load), stage, bare, shares, floor)
    sizes = {"architecture": architecture.model_dump(mode="json"), "matmul_gflops": rate / 1e9, "dtype": str(dtype)}
    setup = {**config.model_dump(mode="json"), **sizes}
    runs = {"stage_seconds": stage, "bare_seconds": bare}
    about = {"machine": speed.machine(device), "versions": speed.versions()}
    size = (torch.get_num_threads(), float(device.type == "cuda"))
    figures |= cost.rate_figures(figures["images_per_second"], *size, price)
    return {"stage": "annotate", **figures, "against_fp32": changed, "setup": setup, "runs": runs, **about}


def _figures(
    config: BenchConfig,
    web: int,
    stage: list[float],
    bare: list[float],
    shares: list[dict[str, float]],
    floor: float,
) -> dict[str, Any]:
    """Medians; `share` is of the stage's time, `decode` of it runs in threads beside the rest."""
    one, other = statistics.median(stage), statistics.median(bare)
    share = {name: statistics.median(of_run.get(name, 0.0) for of_run in shares) for name in shares[0]}
    share["other"] = 1 - sum(part for name, part in share.items() if name != "decode")
    return {
        "images_per_second": config.images / one,
        "captions_per_second": config.images * config.captions / one,
        "pairs_per_second": (web + config.images * config.captions) / one,
        "bare_images_per_second": config.images / other,
        "ratio": {"stage_of_bare": other / one, "vision_floor_of_stage": floor / one},
        "share": share,
    }


def _texts(load: Load) -> int:
    return sum(map(len, load.web))


def make_models(architecture: BlipConfig, folder: Path, shared: bool) -> tuple[Path, Path]:
    """A captioner and a filter with random weights, as folders; one for both where they are shared."""
    parts: dict[str, tuple[Role, ...]] = {"captioner": ("decoder",), "filter": ("encoder",)}
    if shared:
        parts = {"both": ("encoder", "decoder")}
    tokenizer = made_up_words(architecture.text.vocab_size)
    for seed, (name, roles) in enumerate(parts.items()):
        torch.manual_seed(seed)
        text = architecture.text.model_copy(update={"roles": roles})
        store.save(Blip(architecture.model_copy(update={"text": text})), folder / name)
        tokenizer.save(folder / name)
    names = list(parts)
    return folder / names[0], folder / names[-1]


def made_up_words(size: int) -> Tokenizer:
    """A vocabulary of so many tokens, each a word of its own: what is written has as many tokens when it is read."""
    return Tokenizer([*SPECIAL, *(f"w{i}" for i in range(size - len(SPECIAL) - 2))])


def make_shard(path: Path, config: BenchConfig, vocabulary: int) -> str:
    """A tar of pictures with the grain of photographs, JPEG as the web has them, each with a text of 4 to 16 words."""
    samples = []
    for i in range(config.images):
        random = np.random.default_rng(i)
        words = random.integers(0, vocabulary - len(SPECIAL) - 2, random.integers(4, 17))
        text = " ".join(f"w{word}" for word in words)
        samples.append(Sample(f"{i:06d}", _photo(config.width, random), "jpg", text, {}))
    shards.write(path, samples)
    return str(path)


def _photo(width: int, random: np.random.Generator) -> bytes:
    height = width * 3 // 4
    coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grain = random.normal(0, 6, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def make_job(config: BenchConfig, compute: Compute, roles: tuple[Path, Path], out: Path) -> AnnotateJob:
    """The job of the stage."""
    return AnnotateJob(
        out=out,
        captioner=LocalSpec(model=roles[0]),
        filter=roles[1],
        captioner_fingerprint=store.fingerprint(roles[0]),
        filter_fingerprint=store.fingerprint(roles[1]),
        config=config.annotate(),
        compute=compute,
        seed=0,
        round=0,
    )
