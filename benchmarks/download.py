"""`capfilt download` beside img2dataset, on the same loopback server, list, size and threads.

    unshare -rn sh -c 'ip link set lo up && python benchmarks/download.py clean'      # 5,000 pictures
    unshare -rn sh -c 'ip link set lo up && python benchmarks/download.py hostile'    # 1 % drip, hang or never answer
    unshare -rn sh -c 'ip link set lo up && python benchmarks/download.py memory'     # 1,000 to 100,000 URLs

In a network of its own the server can be 250 hosts, 127.0.0.1 to 127.0.0.250, as a list of the web has many:
robots.txt, turns and the rate of a host are on, as they are by default. img2dataset has none of these. Results:
benchmarks/download_*.md.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

HOSTS = 250
SIZE = 256
THREADS = 32
WORKERS = 2
PICTURES = 64
"""Different pictures that the server has; every URL is one of them."""


def jpegs() -> list[bytes]:
    """Pictures of 480 x 360 that compress like photographs: smooth fields with a little noise."""
    made = []
    for seed in range(PICTURES):
        rng = np.random.default_rng(seed)
        field = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((480, 360), Image.BICUBIC)
        noisy = np.clip(np.asarray(field) + rng.normal(0, 4, (360, 480, 3)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=85)
        made.append(buffer.getvalue())
    return made


def serve(ready: Any) -> None:
    """A server in a process of its own: one thread, so that it costs both sides alike and little."""
    import asyncio

    pictures = jpegs()
    head = "HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {}\r\nConnection: close\r\n\r\n"
    answers = [head.format(len(data)).encode() + data for data in pictures]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
            if path.startswith("/drip"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(1)
            elif path.startswith("/hang"):
                await asyncio.sleep(10_000)
            elif path.startswith("/head"):
                while True:
                    writer.write(b"H")
                    await writer.drain()
                    await asyncio.sleep(1)
            elif path == "/robots.txt":
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            else:
                writer.write(answers[int(path.strip("/").partition(".")[0]) % PICTURES])
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, sock=socket.create_server(("", 0), backlog=4096))
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextmanager
def server() -> Iterator[int]:
    """Start the server; its port."""
    names = {line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]}
    if names != {"lo"}:
        sys.exit("the server listens everywhere: run this in a network that has loopback only (see the docstring)")
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    yield ours.recv()
    process.terminate()
    process.join()


def write_list(path: Path, port: int, count: int, hostile: bool = False) -> None:
    """A list of so many URLs; where hostile, every hundredth drips, hangs or sends half a header, on a host apart."""
    rows = []
    for i in range(count):
        bad = hostile and i % 100 == 50
        host = f"127.0.1.{1 + i // 100 % 250}" if bad else f"127.0.0.{1 + i % HOSTS}"
        name = f"{('drip', 'hang', 'head')[i // 100 % 3]}/{i}" if bad else f"{i}.jpg"
        rows.append(json.dumps({"url": f"http://{host}:{port}/{name}", "caption": f"picture number {i}"}))
    path.write_text("\n".join(rows) + "\n")


def run(words: list[str], seconds: float) -> tuple[float, bool, int]:
    """Run a command: its seconds, whether it ended in `seconds`, and the most MB that one of its processes held."""
    begun = time.monotonic()
    quiet = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    process = subprocess.Popen(
        words, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    peak = [0]
    watch = threading.Thread(target=peaks, args=(process.pid, peak), daemon=True)
    watch.start()
    try:
        _, error = process.communicate(timeout=seconds)
        if process.returncode:
            sys.exit(error.decode()[-2000:])
        return time.monotonic() - begun, True, peak[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return time.monotonic() - begun, False, peak[0]


def peaks(session: int, peak: list[int]) -> None:
    """Keep the largest resident size, in MB, of the processes of one session, asked five times a second."""
    page = resource.getpagesize()
    while Path(f"/proc/{session}").exists():
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                told = (folder / "stat").read_text().rpartition(")")[2].split()
                named = (folder / "cmdline").read_bytes()
                if int(told[3]) == session or b"ray::Worker" in named:
                    peak[0] = max(peak[0], int(told[21]) * page // 2**20)
            except (OSError, IndexError):
                continue
        time.sleep(0.2)


def img2dataset(listed: Path, out: Path, shard: int, timeout: int) -> list[str]:
    """Its command: the multiprocessing distributor, its default."""
    words = {
        "url_list": listed, "input_format": "jsonl", "url_col": "url", "caption_col": "caption", "output_folder": out,
        "output_format": "webdataset", "processes_count": WORKERS, "thread_count": THREADS, "image_size": SIZE,
        "resize_mode": "border", "number_sample_per_shard": shard, "timeout": timeout,
    }  # fmt: skip
    return [str(Path(sys.executable).with_name("img2dataset")), *(f"--{key}={value}" for key, value in words.items())]


def alike(listed: Path, out: Path, shard: int, timeout: int) -> list[str]:
    """Ours with img2dataset's manners: no robots.txt, any rate; the same requests, then."""
    return [*capfilt(listed, out, shard, timeout), "--no-robots", "--host-rate", "0"]


def capfilt(listed: Path, out: Path, shard: int, timeout: int) -> list[str]:
    """Ours, on a Ray of its own with as many workers."""
    words = f"--caption-col caption --image-size {SIZE} --resize-mode border --shard-size {shard} --timeout {timeout}"
    words += f" --deadline {timeout} --thread-count {THREADS} --workers {WORKERS} --allow-private 127.0.0.0/8 --json"
    return [sys.executable, "-m", "capfilt", "download", str(listed), "--out", str(out), *words.split()]


def say(line: str) -> None:
    """One line of results."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def successes(out: Path) -> int:
    """Pictures that came, over all shards whose Parquet can be read."""
    total = 0
    for path in out.glob("*.parquet"):
        try:
            total += pq.read_table(path)["status"].to_pylist().count("success")
        except (OSError, ValueError):
            continue  # img2dataset was ended in the middle of it
    return total


def span(out: Path) -> float:
    """Seconds from the first fetch to the end of the last shard, by the stats of the shards."""
    stats = [json.loads(path.read_text()) for path in out.glob("*_stats.json")]
    return max(s["end_time"] for s in stats) - min(s["start_time"] for s in stats) if stats else float("nan")


def compare(given: argparse.Namespace, count: int, shard: int, timeout: int) -> None:
    """All on one list, one after the other, `given.repeats` times."""
    hostile, limit, repeats = given.what == "hostile", given.limit, given.repeats
    who_all = [who for who in (img2dataset, capfilt, alike) if given.who in ("all", who.__name__)]
    say(f"{'who':12} {'seconds':>8} {'ended':>6} {'pictures':>9} {'fetching s':>10} {'pictures/s':>10} {'MB':>5}")
    with server() as port, tempfile.TemporaryDirectory() as home:
        listed = Path(home) / "list.jsonl"
        write_list(listed, port, count, hostile)
        for turn in range(repeats):
            for who in who_all if turn % 2 == 0 else reversed(who_all):
                out = Path(home) / f"{who.__name__}-{turn}"
                seconds, ended, peak = run(who(listed, out, shard, timeout), limit)
                came, fetching = successes(out), span(out)
                figures = f"{came:9} {fetching:10.1f} {came / fetching:10.1f} {peak:5}"
                say(f"{who.__name__:12} {seconds:8.1f} {ended!s:>6} {figures}")


def memory(counts: list[int], shard: int, limit: float) -> None:
    """Ours alone, on ever longer lists: the most that one process held."""
    with server() as port, tempfile.TemporaryDirectory() as home:
        for count in counts:
            listed, out = Path(home) / f"{count}.jsonl", Path(home) / str(count)
            write_list(listed, port, count)
            seconds, ended, peak = run([*capfilt(listed, out, shard, 10), "--resize-mode", "no"], limit)
            say(f"{count:8} URLs {seconds:8.1f} s  ended {ended}  {successes(out)} pictures  {peak} MB")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("clean", "hostile", "memory"))
    parser.add_argument("--count", type=int, help="URLs [default: 5000, hostile 1000]")
    parser.add_argument("--limit", type=float, default=240, help="seconds after which a command is ended")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--who", choices=("all", "img2dataset", "capfilt", "alike"), default="all")
    given = parser.parse_args()
    if given.what == "memory":
        memory([1000, 10_000, 100_000], 1000, given.limit)
    elif given.what == "hostile":
        compare(given, given.count or 1000, 250, 3)
    else:
        compare(given, given.count or 5000, 500, 10)


if __name__ == "__main__":
    main()
