"""The benchmark of `download`: shards that one worker fetches from a server on this machine, to their commits.

The floor is what cannot be left out, each measured alone: bare sockets in as many threads, sha256, one file written and
flushed to the disk, and where pictures are resized their decoding, resizing and encoding.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from capfilt.downloading import plans
from capfilt.downloading.fetch import import_img2dataset, make_resizer
from capfilt.downloading.url_lists.files import find_files
from capfilt.errors import UsageError
from capfilt.evaluation import speed
from capfilt.pipelines.bench.bench import BenchDownloadConfig
from capfilt.pipelines.bench.made_up import PICTURES, photo
from capfilt.pipelines.bench.time_box import TimeBox, spread
from capfilt.runs import cost
from capfilt.runs.cost import Price
from capfilt.runs.progress import Progress
from capfilt.stages.download import DownloadConfig, DownloadJob

FIRST, MOST = 200, 10_000
"""Pictures of the first warm-up, and of a shard at most."""
SHARD = "00000"


def bench_download(
    config: BenchDownloadConfig, folder: Path, show: Progress, seconds: float, price: Price | None = None
) -> dict[str, Any]:
    """Measure a worker."""
    with show.wait("loading img2dataset and making up pictures"):
        try:
            import_img2dataset()
        except ImportError as error:
            raise UsageError(f"bench download needs img2dataset, which cannot be imported here: {error}.") from error
        pictures = [photo(config.width, np.random.default_rng(i)) for i in range(PICTURES)]
        (folder / "served").mkdir()
        for number, data in enumerate(pictures):
            (folder / "served" / f"{number:03d}.jpg").write_bytes(data)
    with _server(folder / "served") as port:
        with show.stage("bench download", config.repeats, "repeats") as line:
            box = TimeBox(seconds, config.repeats, line)
            worker = _Worker(config, folder, port)
            worker.count = box.size(worker.fetch, FIRST, MOST, config.urls)
            worker.clear()
            box.repeat(worker.measure)
        with show.wait("measuring the floor"):
            floor = _floor(config, pictures, port, folder)
    rates = [worker.count / took for took in worker.took]
    rate = statistics.median(rates)
    fetching = statistics.median(worker.fetching)
    settling = statistics.median(worker.took) - fetching
    sums = {"fetch": sum(floor.values()) - floor["write"], "settle": floor["write"], "all": sum(floor.values())}
    spent = {"fetch": fetching, "settle": settling, "all": worker.count / rate}
    return {
        "stage": "download",
        **spread("images_per_second", rates),
        "share": {"fetch": fetching / (fetching + settling), "settle": settling / (fetching + settling)},
        "floor": {
            "milliseconds_an_image": {name: 1e3 * needed for name, needed in floor.items()},
            "images_per_second": 1 / sums["all"],
            "reached": {name: needed * worker.count / spent[name] for name, needed in sums.items()},
        },
        **cost.rate_figures(rate, 1, 0, price),
        "setup": {**config.model_dump(mode="json"), "urls": worker.count, "bytes": sum(map(len, pictures)) // PICTURES},
        "runs": {"seconds": worker.took},
        "machine": speed.machine(speed.CPU),
        "versions": speed.versions(),
    }


class _Worker:
    """A worker of `download`, which fetches one shard after the other, each in a run folder of its own."""

    def __init__(self, config: BenchDownloadConfig, folder: Path, port: int):
        self.config, self.folder, self.port = config, folder, port
        self.count = 0
        self.clear()

    def clear(self) -> None:
        """Forget what was measured."""
        self.took: list[float] = []
        self.fetching: list[float] = []
        """Of each shard, seconds from its first request to its last picture."""

    def measure(self) -> str:
        """One repeat; a note of how fast it was."""
        return f"{self.count / self.fetch(self.count):.1f} images/s"

    def fetch(self, count: int) -> float:
        """Fetch a shard of so many pictures, and throw it away; its seconds."""
        out = self.folder / "run"
        listed = self.folder / "list.jsonl"
        urls = (f"http://127.0.0.1:{self.port}/{number}" for number in range(count))
        listed.write_text("".join(json.dumps({"url": url, "caption": "a picture"}) + "\n" for url in urls))
        config = DownloadConfig(
            urls=(str(listed),),
            caption_col="caption",
            shard_size=count,
            resize_mode=self.config.resize_mode,
            image_size=self.config.image_size,
            thread_count=self.config.thread_count,
            limits={"allow_private": ("127.0.0.0/8",)},
            manners={"host_rate": 0},
        )
        plans.plan_list(out / "plan", find_files(config.urls, None), config, config.layout, lambda rows: None)
        work = DownloadJob(out=out, config=config).open()
        begun = time.perf_counter()
        work(SHARD)
        self.took.append(time.perf_counter() - begun)
        stats = json.loads((out / f"{SHARD}_stats.json").read_bytes())
        assert stats["successes"] == count, f"the server answers every request: {stats}"
        self.fetching.append(stats["end_time"] - stats["start_time"])
        shutil.rmtree(out)  # thousands of pictures a repeat, where temporary files may lie in memory
        return self.took[-1]


def _floor(config: BenchDownloadConfig, pictures: list[bytes], port: int, folder: Path) -> dict[str, float]:
    """Seconds an image of what cannot be left out: medians of five."""
    number = range(4 * len(pictures))

    def get(number: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(f"GET /{number} HTTP/1.1\r\n\r\n".encode())
            while sock.recv(1 << 16):
                pass

    def write() -> None:
        with (folder / "written").open("wb") as file:
            for i in number:
                file.write(pictures[i % len(pictures)])
            file.flush()
            os.fsync(file.fileno())

    with ThreadPoolExecutor(config.thread_count) as pool:
        work: dict[str, Callable[[], object]] = {
            "receive": lambda: list(pool.map(get, number)),
            "hash": lambda: [hashlib.sha256(pictures[i % len(pictures)]).hexdigest() for i in number],
            "write": write,
        }
        if config.resize_mode != "no":
            resize = make_resizer(
                DownloadConfig(urls=("",), resize_mode=config.resize_mode, image_size=config.image_size)
            )
            work["resize"] = lambda: [resize(BytesIO(pictures[i % len(pictures)])) for i in number]
        medians = {}
        for name, one in work.items():
            medians[name] = statistics.median(speed.seconds(speed.CPU, one) for _ in range(5))
    return {name: median / len(number) for name, median in medians.items()}


@contextmanager
def _server(folder: Path) -> Iterator[int]:
    """Serve the pictures of a folder; the port."""
    words = [sys.executable, "-m", "capfilt.pipelines.bench.picture_server", str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
