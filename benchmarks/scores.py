"""What scores beside itm and itc cost: beside annotating with blip/small, and added to 10,000 annotated images.

    python benchmarks/scores.py --encoder models/all-MiniLM-L6-v2 --images 64 --captions 1 8
    python benchmarks/scores.py --encoder models/all-MiniLM-L6-v2 --added 10000 --kills 10

The first compares the stages shard by shard in this process, in turns, medians of --repeats, by processor time and by
the clock; the pictures are those of `capfilt bench annotate`. The second adds the rules to a run by the command line,
whose annotations were written by capfilt's own writer and ledger (no captioner exists), once undisturbed and once
killed by SIGKILL at random moments, and compares every file's sha256 before and after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

CAPTIONS, SHARD = 4, 1000
"""Synthetic texts of each of the added images, and images of a shard."""
SPECS = ("side", "aspect", "entropy")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of processor time and by the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - clock


def in_words_of(encoder: Path, url: str, models: tuple[Path, ...]) -> str:
    """A shard with texts of 4 to 16 words that the encoder knows, whose tokens the models get too: BERT's, as BLIP's
    are. So a text has about as many tokens for all."""
    from capfilt.data import shards
    from capfilt.data.sample import Sample
    from capfilt.data.text.tokenizer import Tokenizer

    known = json.loads((encoder / "tokenizer.json").read_text())["model"]["vocab"]
    vocabulary = sorted(known, key=known.__getitem__)
    for folder in models:
        Tokenizer(vocabulary).save(folder)
    words, draw = [word for word in vocabulary if word.isalpha() and len(word) > 2], random.Random(0)
    samples = [sample for sample in shards.read(url) if isinstance(sample, Sample)]
    shards.write(Path(url), [replace(s, text=" ".join(draw.choices(words, k=draw.randint(4, 16)))) for s in samples])
    return url


def costs(args: argparse.Namespace, captions: int, folder: Path) -> dict[str, list[tuple[float, float]]]:
    """By stage, the seconds of each repeat."""
    import torch

    from capfilt import config as configs
    from capfilt import presets
    from capfilt.inference.device import Compute
    from capfilt.inference.scores.spec import ScoreSpec, score_specs
    from capfilt.models.blip.config import BlipConfig
    from capfilt.pipelines.bench.annotate import make_job
    from capfilt.pipelines.bench.bench import BenchConfig
    from capfilt.pipelines.bench.made_up import make_models, make_shard
    from capfilt.stages.annotation.add_score import AddScoreJob
    from capfilt.stages.annotation.shard_annotator import ShardAnnotator
    from capfilt.stages.annotation.shard_scorer import ShardScorer

    config = BenchConfig(images=args.images, captions=captions)
    architecture = configs.read(presets.find("models", config.model), BlipConfig)
    compute, cpu = Compute(device="cpu", precision="fp32"), torch.device("cpu")
    roles = make_models(architecture, folder, shared=False)
    url = in_words_of(args.encoder, make_shard(folder / "web/00000.tar", config.images, config.width, 1000), roles)
    annotator = ShardAnnotator(make_job(config, compute, roles, folder / "run"), cpu)

    def job(spec: ScoreSpec) -> AddScoreJob:
        digest = spec.fingerprint()
        return AddScoreJob(out=folder / "run", spec=spec, fingerprint=digest, compute=compute, batch_size=16)

    first, *beside = map(job, score_specs(SPECS))
    rules = ShardScorer(first.model_copy(update={"beside": tuple(beside)}), cpu)
    sieve = ShardScorer(job(*score_specs([f"sieve={args.encoder}"])), cpu)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(args.repeats + 1):
        for old in folder.glob("run/ledger/score-*"):
            shutil.rmtree(old)
        for name, work in (("annotate", annotator), ("rules", rules), ("sieve", sieve)):
            took = timed(partial(work.shard, url))
            if repeat:  # the first is for warming up
                seconds.setdefault(name, []).append(took)
    return seconds


def print_costs(args: argparse.Namespace) -> None:
    """The table of the costs."""
    print("| captions | stage | ms an image, processor | by the clock | of annotate, processor | by the clock |")
    print("| --- | --- | --- | --- | --- | --- |")
    for captions in args.captions:
        with tempfile.TemporaryDirectory() as scratch:
            seconds = costs(args, captions, Path(scratch))
        medians = {name: [statistics.median(column) for column in zip(*s, strict=True)] for name, s in seconds.items()}
        for name, middle in medians.items():
            each = [f"{1000 * value / args.images:.1f}" for value in middle]
            shares = [f"{value / whole:.1%}" for value, whole in zip(middle, medians["annotate"], strict=True)]
            print(f"| {captions} | {name} | {' | '.join((*each, *shares))} |", flush=True)


def annotated_run(folder: Path, images: int) -> Path:
    """A run of `capfilt annotate` of tiny pictures, its tables and commits by capfilt's own writers."""
    import numpy as np

    from capfilt.data import annotations, shards
    from capfilt.data.annotations import Annotation
    from capfilt.data.sample import Sample
    from capfilt.pipelines.bench.made_up import photo
    from capfilt.runs.ledger import Ledger
    from capfilt.runs.locking import lock
    from capfilt.runs.run import Run
    from capfilt.runs.tally import Tally

    words, run = ["dog", "cat", "red", "house", "tree", "boat", "a", "the", "near", "old", "sale"], folder / "run"
    draw = random.Random(0)
    photos = [photo(64, np.random.default_rng(number)) for number in range(100)]
    urls = [str(folder / f"web/{number:05d}.tar") for number in range(images // SHARD)]
    for number, url in enumerate(urls):
        keys = [f"{number:05d}{image:05d}" for image in range(SHARD)]
        text = {key: " ".join(draw.choices(words, k=8)) for key in keys}
        shards.write(Path(url), (Sample(key, photos[int(key) % 100], "jpg", text[key], {}) for key in keys))
    Run.open(run, "captions: 1\n", {"verb": "annotate", "shards": urls})
    for number, url in enumerate(urls):
        digest, rows, tally = shards.Digest(shards.stat(url)["version"]), [], Tally.zero()
        for sample in shards.read(url, digest):
            assert isinstance(sample, Sample)
            texts = [sample.text, *(" ".join(draw.choices(words, k=7)) for _ in range(CAPTIONS))]
            for i, said in enumerate(texts):
                source, candidate = ("web", 0) if i == 0 else ("synthetic", i - 1)
                known = (sample.key, sample.uid, sample.sha256, source, candidate, said, 0.5, 0.25)
                rows.append(Annotation(*known, captioner="none", filter="none", seed=0, round=0))
                tally.texts["in"][source] += 1
                tally.texts["kept"][source] += 1
            tally.samples.update(["in", "kept"])
        path = run / f"annotations/{number:05d}.parquet"
        annotations.write(path, rows)
        Ledger(run, "annotate").commit(f"{number:05d}", "by hand", [path], tally, digest.result())
    lock.release_all()
    return run


def sha256s(folder: Path) -> dict[str, str]:
    """Every file but the locks, and what a stage notes of its work."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("lock-"))
    named = {str(path.relative_to(folder)): path for path in paths}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in named.items()
        if not name.endswith((".plan.jsonl", ".pace.json", ".usage.jsonl"))
    }


def add(args: argparse.Namespace, run: Path, kill_after: float | None = None) -> dict[str, Any]:
    """The command, killed after some seconds if it is still at work then; its seconds of processor time and by the
    clock, and its answer."""
    import resource

    asked = (*SPECS, f"sieve={args.encoder}") if args.with_sieve else SPECS
    specs = [word for spec in asked for word in ("--add-score", spec)]
    words = ["annotate", str(run.parent / "web"), *specs, "--out", str(run), "--address", "local", "--json"]
    before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "capfilt", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        answer, _ = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        answer, _ = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    done = process.returncode == 0
    return {
        "cpu": cpu,
        "clock": time.perf_counter() - clock,
        "done": done,
        "answer": json.loads(answer) if done else {},
    }


def print_added(args: argparse.Namespace) -> None:
    """What adding to a finished run took and changed, with and without kills."""
    with tempfile.TemporaryDirectory() as scratch:
        run = annotated_run(Path(scratch), args.added)
        disturbed = Path(scratch) / "killed/run"
        shutil.copytree(run, disturbed)
        (disturbed.parent / "web").symlink_to(run.parent / "web")
        before = sha256s(run)
        first = add(args, run)
        after = sha256s(run)
        assert first["done"], "the command failed"
        assert before.items() <= after.items(), "a file that was there has changed"
        print(f"{args.added} images, {args.added * (CAPTIONS + 1)} texts: {first['cpu']:.1f} s of processor time,")
        print(f"{first['clock']:.1f} s by the clock; {len(before)} files as before, {len(after) - len(before)} new")
        print(json.dumps(first["answer"]["scores"]))
        draw, died = random.Random(1), 0
        for _ in range(args.kills):
            died += not add(args, disturbed, draw.uniform(2, first["clock"]))["done"]
        assert add(args, disturbed)["done"], "the command failed after kills"
        changed = sorted(name for name, _ in sha256s(disturbed).items() ^ after.items())
        assert not changed, f"kills changed what is written: {changed[:3]}"
        print(f"{died} of {args.kills} commands killed by SIGKILL; then every file as undisturbed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="The sentence encoder of sieve.")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--captions", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--added", type=int, default=0, help="Instead, images of a finished run to add scores to.")
    parser.add_argument("--with-sieve", action="store_true", help="Add sieve to them, too.")
    parser.add_argument("--kills", type=int, default=10)
    args = parser.parse_args()
    args.encoder = args.encoder.absolute()
    (print_added if args.added else print_costs)(args)


if __name__ == "__main__":
    main()
