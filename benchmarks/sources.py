"""What it costs to read data where they lie, beside the same data in tars: CPU time, and memory.

    python benchmarks/sources.py --pictures 2000 --annotated 32

The same JPEGs of 640 x 480, one text each, lie as a tar, a folder with texts beside, a folder with a metadata.csv,
Parquet (row groups of 100, and all in one), what `datasets` saves, Lance, and COCO's JSON. Each is listed, asked for
its version and read to its end with its digest, in a process of its own, three times in turns with the others; the best
counts. Then `annotate`'s stage (blip/small, 20 tokens a text) takes some of them from each source, twice in turns.
Everything is CPU seconds of the process: other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.data import shards
from capfilt.data.sample import Sample

VOCABULARY = 30524
TURNS = 3


def tars(samples: Sequence[Sample], home: Path) -> str:
    for number, start in enumerate(range(0, len(samples), 1000)):
        shards.write(home / f"tars/{number:05d}.tar", samples[start : start + 1000])
    return str(home / "tars")


def pictures(samples: Sequence[Sample], folder: Path) -> Path:
    folder.mkdir()
    for sample in samples:
        (folder / f"{sample.key}.jpg").write_bytes(sample.image)
    return folder


def beside(samples: Sequence[Sample], home: Path) -> str:
    folder = pictures(samples, home / "beside")
    for sample in samples:
        (folder / f"{sample.key}.txt").write_text(sample.text)
    return str(folder)


def listed(samples: Sequence[Sample], home: Path) -> str:
    folder = pictures(samples, home / "listed")
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((f"{one.key}.jpg", one.text) for one in samples)])
    return str(folder)


def coco(samples: Sequence[Sample], home: Path) -> str:
    images = [{"id": int(one.key), "file_name": f"{one.key}.jpg"} for one in samples]
    notes = [{"id": int(one.key), "image_id": int(one.key), "caption": one.text} for one in samples]
    (home / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return f"{home / 'captions.json'}#images={home / 'listed'}"


def table(samples: Sequence[Sample]) -> pa.Table:
    images = [{"bytes": one.image, "path": f"{one.key}.jpg"} for one in samples]
    return pa.table({"image": images, "text": [one.text for one in samples]})


def parquet(samples: Sequence[Sample], home: Path, rows: int = 100) -> str:
    pq.write_table(table(samples), home / f"groups-{rows}.parquet", row_group_size=rows)
    return str(home / f"groups-{rows}.parquet")


def one_group(samples: Sequence[Sample], home: Path) -> str:
    return parquet(samples, home, len(samples))


def saved(samples: Sequence[Sample], home: Path) -> str:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(table(samples)).save_to_disk(home / "saved")
    return str(home / "saved")


def lance(samples: Sequence[Sample], home: Path) -> str:
    import lance

    lance.write_dataset(table(samples), home / "pairs.lance")
    return str(home / "pairs.lance")


SOURCES: dict[str, Callable[[Sequence[Sample], Path], str]] = {
    "tars": tars, "folder, .txt beside": beside, "folder, metadata.csv": listed, "Parquet, groups of 100": parquet,
    "Parquet, one group": one_group, "save_to_disk": saved, "Lance": lance, "COCO's JSON": coco,
}  # fmt: skip


def peak() -> int:
    """The most memory of this process so far, kB; ru_maxrss would count what its parent had before the exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def read(spec: str) -> dict[str, Any]:
    """List, examine and read a source; CPU seconds, and MB of memory beyond what the imports took."""
    before = peak()
    began = time.process_time()
    urls = shards.expand(spec)
    listed_in = time.process_time() - began
    count = 0
    for url in urls:
        digest = shards.Digest(shards.stat(url)["version"])
        count += sum(isinstance(item, Sample) and bool(item.captions) for item in shards.read(url, digest))
    took = time.process_time() - began
    return {
        "count": count, "shards": len(urls), "list": listed_in, "seconds": took,
        "memory": (peak() - before) / 1000,
    }  # fmt: skip


def apart(spec: str) -> dict[str, Any]:
    """`read` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--read", spec], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def annotated(samples: Sequence[Sample], home: Path) -> dict[str, float]:
    """CPU seconds an image of `annotate`'s stage, from each source."""
    from capfilt import config as configs
    from capfilt import presets
    from capfilt.inference.device import Compute
    from capfilt.models import BlipConfig
    from capfilt.pipelines.bench.annotate import make_job
    from capfilt.pipelines.bench.bench import BenchConfig
    from capfilt.pipelines.bench.made_up import make_models
    from capfilt.stages.annotation.shard_annotator import ShardAnnotator

    config = BenchConfig(images=len(samples))
    roles = make_models(configs.read(presets.find("models", config.model), BlipConfig), home, shared=False)
    compute = Compute(device="cpu", precision="fp32")
    work = ShardAnnotator(make_job(config, compute, roles, home / "run"), compute.open())
    urls = {name: shards.expand(make(samples, home))[0] for name, make in SOURCES.items()}
    best: dict[str, float] = {}
    work.shard(urls["tars"])  # warms up
    for _ in range(2):
        for name, url in urls.items():
            began = time.process_time()
            work.shard(url)
            best[name] = min(best.get(name, 1e9), (time.process_time() - began) / len(samples))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--annotated", type=int, default=32)
    parser.add_argument("--read", metavar="SPEC")
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        from capfilt.pipelines.bench.made_up import make_shard  # torch, which processes that read do without

        home = Path(scratch)
        url = make_shard(home / "made.tar", options.pictures, 640, VOCABULARY - 7)
        samples = [item for item in shards.read(url) if isinstance(item, Sample)]
        (home / "all").mkdir()
        specs = {name: make(samples, home / "all") for name, make in SOURCES.items()}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
        for _ in range(TURNS):
            for name, spec in specs.items():
                runs[name].append(apart(spec))
                assert runs[name][-1]["count"] == len(samples)
        (home / "some").mkdir()
        each = annotated(samples[: options.annotated], home / "some")
    size = sum(len(one.image) for one in samples) / len(samples)
    print(f"{len(samples)} pictures of {size / 1000:.0f} kB; annotate {1000 * each['tars']:.0f} ms of CPU an image\n")
    print("| source | list, ms | read, ms an image | more than tars, of annotate | annotate, of tars | memory, MB |")
    print("|---|---|---|---|---|---|")
    base = min(run["seconds"] for run in runs["tars"]) / len(samples)
    for name, those in runs.items():
        best = min(run["seconds"] for run in those) / len(samples)
        print(
            f"| {name} | {1000 * min(run['list'] for run in those):.0f} | {1000 * best:.2f}"
            f" | {(best - base) / each['tars']:+.2%} | {each[name] / each['tars']:.3f}"
            f" | {max(run['memory'] for run in those):.0f} |"
        )


if __name__ == "__main__":
    main()
