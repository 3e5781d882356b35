"""What annotating over an endpoint reaches: the share of what perfect clients would get, memory, and what kills cost.

    python benchmarks/endpoint.py throughput
    python benchmarks/endpoint.py memory
    python benchmarks/endpoint.py kills

The server is that of the tests (`tests/fixtures/endpoint_server.py`), a process of its own on loopback that answers a
request after 100 to 300 ms, evenly drawn: 64 clients that lose no time get 320 answers a second. `throughput` shows the
captioner the pictures as the stage does, with nothing computed beside it, and then runs the whole of `annotate`, with
the smallest BLIP as the filter. `memory` runs it on Ray and reads what driver and worker hold. `kills` ends
`annotate` by SIGKILL ten times, whenever the server has got another random number of requests, and compares what it
wrote in the end, and what the server was asked, with a run that was left alone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from capfilt import config as configs
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.inference.batches import pictures
from capfilt.inference.captioners.endpoint.captioner import EndpointCaptioner
from capfilt.inference.config import AnnotateConfig
from capfilt.models import BlipConfig
from capfilt.pipelines.bench.made_up import make_models

SERVER = Path(__file__).parent.parent / "tests/fixtures/endpoint_server.py"
LOW, HIGH = 0.1, 0.3
IN_FLIGHT = AnnotateConfig().requests.in_flight
PERFECT = IN_FLIGHT / ((LOW + HIGH) / 2)
SMALLEST = {"width": 16, "depth": 1, "heads": 2, "hidden": 32}


class Server:
    """The server, and what it counts."""

    def __init__(self, child: subprocess.Popen[str]):
        self._child = child
        assert child.stdout is not None
        self.url = f"http://127.0.0.1:{int(child.stdout.readline())}/v1"

    def counts(self) -> dict[str, int]:
        """What it was asked so far: in all, `repeated` what it was asked before, `busy` those under way."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        counts: dict[str, int] = json.loads(self._child.stdout.readline())
        return counts


@contextmanager
def server() -> Iterator[Server]:
    command = [sys.executable, str(SERVER), str(LOW), str(HIGH)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield Server(child)
        finally:
            child.kill()


def make_shards(folder: Path, num: int, in_shard: int) -> Path:
    """Shards of different pictures of 96 x 72, each with a text."""
    folder.mkdir(parents=True)
    for first in range(0, num, in_shard):
        samples = [Sample(f"{i:06d}", picture(i), "jpg", "w1 w2 w3 w4", {}) for i in range(first, first + in_shard)]
        shards.write(folder / f"{first // in_shard:05d}.tar", samples)
    return folder


def picture(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def command(served: Server, folder: Path, out: Path, filter_: Path, *more: str) -> list[str]:
    words = [str(folder), "--captioner", f"openai:{served.url}#tiny", "--filter", str(filter_), "--out", str(out)]
    return [sys.executable, "-m", "capfilt", "annotate", *words, "--gpus", "0", *more]


def make_filter(folder: Path) -> Path:
    text = {**SMALLEST, "vocab_size": 200, "max_positions": 64, "dropout": 0.0}
    vision = {**SMALLEST, "image_size": 32, "patch_size": 16}
    tree = {"family": "blip", "vision": vision, "text": text, "projection": 16}
    return make_models(configs.validate(BlipConfig, tree, "the smallest"), folder, shared=False)[1]


def throughput(home: Path, num: int) -> None:
    """Images a second of the captioner alone and of the whole stage."""
    folder, filter_ = make_shards(home / "web", num, num), make_filter(home)
    with server() as served:
        config = AnnotateConfig()
        captioner = EndpointCaptioner((served.url, "tiny"), config, 0, 0, home / "cache")
        began, spent = time.perf_counter(), time.process_time()
        with captioner.shard("00000"):
            read = shards.read(str(folder / "00000.tar"))
            for batch in pictures(read, config.batch_size, captioner.image_formats, asker=captioner):
                captioner.caption(batch.on(_cpu(), ()), batch.samples)
        row("captioner alone", num, time.perf_counter() - began, time.process_time() - spent, served.counts())
    with server() as served:
        log = home / "log"
        with log.open("w") as file:
            words = command(served, folder, home / "a", filter_, "--address", "local")
            subprocess.run(words, check=True, stderr=file, stdout=file, env=os.environ)
        counts = served.counts()
        ended = (home / "a/ledger/annotate/00000.json").stat().st_mtime
        row("annotate, from its first request to its commit", num, ended - counts["began"], None, counts)


def row(what: str, num: int, seconds: float, cpu: float | None, counts: dict[str, int]) -> None:
    rate = num / seconds
    used = "" if cpu is None else f"{1000 * cpu / num:.2f}"
    print(f"| {what} | {num} | {seconds:.1f} | {rate:.0f} | {rate / PERFECT:.1%} | {used} | {counts} |", flush=True)


def memory(home: Path, num: int) -> None:
    """What driver and worker hold, by how many images are done."""
    folder, filter_ = make_shards(home / "web", num, 1000), make_filter(home)
    with server() as served:
        words = command(served, folder, home / "a", filter_, "--workers", "1", "--address", "start")
        with subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as driver:
            while driver.poll() is None:
                worker = next((pid for pid in children(driver.pid) if title(pid).startswith("ray::annotate")), None)
                held = [resident(driver.pid), 0.0 if worker is None else resident(worker)]
                done = len(list((home / "a/ledger/annotate").glob("*.json"))) if (home / "a").exists() else 0
                print(f"| {done * 1000} | {held[0]:.0f} | {held[1]:.0f} | {served.counts()['asked']} |", flush=True)
                time.sleep(2)
        assert driver.returncode == 0, driver.returncode


def kills(home: Path, num: int, times: int, seed: int) -> None:
    """Rows and requests of a run that is killed, beside one that is not."""
    folder, filter_ = make_shards(home / "web", num, num // 4), make_filter(home)
    with server() as served:
        subprocess.run(command(served, folder, home / "whole", filter_, "--address", "local"), check=True, **QUIET)
        print(f"undisturbed: {served.counts()}", flush=True)
    moments = sorted(random.Random(seed).sample(range(64, num), times))
    with server() as served:
        words, before, under_way = command(served, folder, home / "killed", filter_, "--address", "local"), 0, 0
        for moment in moments:
            with subprocess.Popen(words, **QUIET) as driver:
                while driver.poll() is None and served.counts()["asked"] - before < moment:
                    time.sleep(0.01)
                driver.send_signal(signal.SIGKILL)
            counts = served.counts()
            before, under_way = counts["repeated"], under_way + counts["busy"]
            print(f"killed at {moment}: {counts}", flush=True)
        subprocess.run(words, check=True, **QUIET)
        print(f"to its end: {served.counts()}, under way when killed: {under_way}", flush=True)
    for path in sorted((home / "whole/annotations").iterdir()):
        assert path.read_bytes() == (home / "killed/annotations" / path.name).read_bytes(), path.name
    rows = sum(pq.read_metadata(path).num_rows for path in (home / "killed/annotations").iterdir())
    print(f"{rows} rows, equal byte by byte")


QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def children(pid: int) -> list[int]:
    """All processes below one, Ray's workers too."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    below = [pid]
    for one in below:
        below += [child for child, parent in parents.items() if parent == one]
    return below[1:]


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def resident(pid: int) -> float:
    """MB in memory that no other process shares."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["throughput", "memory", "kills"])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        print(f"load {os.getloadavg()}")
        if given.what == "throughput":
            throughput(home, given.images)
        elif given.what == "memory":
            memory(home, given.images)
        else:
            kills(home, given.images, given.kills, given.seed)


if __name__ == "__main__":
    main()
