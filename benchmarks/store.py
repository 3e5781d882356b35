"""What a run on a store costs before and beside the work: planning many shards, and hashing what is read.

    python benchmarks/store.py --shards 2000 --wait 0.02

Starts the S3 server of the tests (moto, loopback), each of whose answers comes `--wait` seconds late, as those of a
store far away do. Printed: requests a shard and seconds to find shards by braces, to take their fingerprints, and to
look for their completions, one question after the other (as it was) and many at once; then megabytes a second of
reading local shards with and without the digest of the input, the best of nine each, in turn.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import s3fs

from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.shards import files, urls
from capfilt.runs.ledger import Ledger
from capfilt.storage import paths
from capfilt.storage.paths import map_concurrent
from capfilt.storage.remote_path import RemotePath

SERVER = Path(__file__).parent.parent / "tests/faults/s3_server.py"
NUM_SAMPLES, PICTURE = 500, 100_000


@contextmanager
def server(wait: float) -> Iterator[None]:
    """An S3 server, and the environment that leads to it."""
    command = [sys.executable, str(SERVER), "0", str(wait)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{child.stdout.readline().strip()}"
        os.environ |= {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        try:
            yield
        finally:
            child.kill()


def counted() -> list[str]:
    """The requests that s3fs makes from now on."""
    asked: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def counting(self: Any, method: str, *words: Any, **more: Any) -> Any:
        asked.append(method)
        return await call(self, method, *words, **more)

    s3fs.S3FileSystem._call_s3 = counting
    return asked


def plan(num: int) -> None:
    """Print what it takes to plan `num` shards on the store."""
    s3fs.S3FileSystem().mkdir("capfilt")
    s3fs.S3FileSystem().pipe({f"capfilt/web/{i:05d}.tar": b"" for i in range(num)})
    asked = counted()
    for how, remote in (("one by one", False), ("at once", True)):
        steps(num, how, remote, asked)


def steps(num: int, how: str, remote: bool, asked: list[str]) -> None:
    """Print what each step of a plan takes."""
    for module in (files, urls):
        module.map_concurrent = lambda function, items, _: map_concurrent(function, items, remote)  # type: ignore[attr-defined]
    ledger = Ledger(RemotePath("s3://capfilt/run"), "annotate")
    shard_urls = [f"s3://capfilt/web/{i:05d}.tar" for i in range(num)]

    def timed(name: str, step: Callable[[], object]) -> None:
        s3fs.S3FileSystem.clear_instance_cache()
        asked.clear()
        began = time.monotonic()
        step()
        print(f"| {name} | {how} | {len(asked) / num:.2f} | {time.monotonic() - began:.1f} |", flush=True)

    timed("find", lambda: shards.expand(f"s3://capfilt/web/{{00000..{num - 1:05d}}}.tar"))
    timed("fingerprint", lambda: list(map_concurrent(shards.stat, shard_urls, remote)))

    def look() -> None:
        """As it was, each name was asked for; now only those that a listing has are."""
        names = ledger.recorded_shards() if remote else [shards.name(url) for url in shard_urls]
        list(map_concurrent(lambda name: ledger.completion(name, "f"), names, remote))

    timed("look for completions", look)


def hashing(folder: Path) -> None:
    """Print the rates of reading with and without a digest."""
    chance = random.Random(0)
    samples = (Sample(f"{i:05d}", chance.randbytes(PICTURE), "jpg", "a text", {}) for i in range(NUM_SAMPLES))
    path = folder / "00000.tar"
    shards.write(path, samples)
    best = {False: 1e9, True: 1e9}
    for turn in range(18):
        digest = shards.Digest() if turn % 2 else None
        began = time.perf_counter()
        for _ in shards.read(str(path), digest):
            pass
        best[bool(digest)] = min(best[bool(digest)], time.perf_counter() - began)
    size = path.stat().st_size / 1e6
    for with_digest, seconds in best.items():
        print(f"read {'with' if with_digest else 'without'} a digest: {size / seconds:.0f} MB/s, {seconds:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--wait", type=float, default=0.02)
    words = parser.parse_args()
    with server(words.wait):
        print(f"{words.shards} shards, {paths.AT_ONCE} questions at once, answers {words.wait * 1000:.0f} ms late\n")
        print("| step | asked | requests a shard | seconds |\n|---|---|---|---|")
        plan(words.shards)
    with tempfile.TemporaryDirectory() as folder:
        hashing(Path(folder))


if __name__ == "__main__":
    main()
