"""Disks and clocks that fail, and files that are not what they were: runs in one process, without Ray."""

from __future__ import annotations

import http.server
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from capfilt.cli import app


def written(run: Any) -> dict[str, int]:
    """When each output and completion was written."""
    return {name: (run.out / name).stat().st_mtime_ns for name in run.outputs()}


def changed(run: Any, before: dict[str, int]) -> set[str]:
    return {name for name, at in written(run).items() if before.get(name) != at}


def both(shard: str) -> set[str]:
    return {f"annotations/{shard}.parquet", f"ledger/toy/{shard}.json"}


def verify(run: Any, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["verify", str(run.out), *words])
    return done.exit_code, done.stdout


@pytest.mark.slow
def test_an_output_is_truncated_after_the_commit(driver: Any, survives: Any, choice: int) -> None:
    survived = survives("an output truncated after its commit")
    run = driver()
    run.run()
    chance = random.Random(choice)
    shard = f"{chance.randrange(40):05d}"
    path = run.out / f"annotations/{shard}.parquet"
    with path.open("r+b") as file:
        file.truncate(chance.randrange(path.stat().st_size))
    assert verify(run)[0] == 1
    assert f"toy, shard {shard}: " in verify(run)[1]
    before = written(run)
    survived(run)
    assert changed(run, before) == both(shard)


@pytest.mark.slow
def test_a_byte_changes_after_the_commit(driver: Any, survives: Any, choice: int) -> None:
    survived = survives("a bit flipped after its commit (verify --mend)")
    run = driver()
    run.run()
    chance = random.Random(choice)
    shard = f"{chance.randrange(40):05d}"
    path = run.out / f"annotations/{shard}.parquet"
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    code, said = verify(run)
    assert code == 1
    assert f"toy, shard {shard}: " in said
    assert verify(run, "--mend")[0] == 0
    before = written(run)
    survived(run)
    assert changed(run, before) == both(shard)
    assert verify(run)[0] == 0


@pytest.mark.slow
def test_a_completion_is_cut_in_half(driver: Any, survives: Any, choice: int) -> None:
    survived = survives("a completion file cut in half")
    run = driver()
    run.run()
    chance = random.Random(choice)
    shard = f"{chance.randrange(40):05d}"
    path = run.out / f"ledger/toy/{shard}.json"
    with path.open("r+b") as file:
        file.truncate(chance.randrange(path.stat().st_size))
    before = written(run)
    survived(run)
    assert changed(run, before) == both(shard)


@pytest.mark.slow
def test_the_clock_is_moved_back(driver: Any, survives: Any, seed: int) -> None:
    """Whatever the run has written is then of the future, its own temporary files and a dead lock with it."""
    survived = survives("the clock moved back by a year")
    run = driver("--pause", "0.005")
    run.start()
    run.reach(random.Random(seed).randrange(1, 36))
    run.process.kill()
    run.end()
    future = time.time() + 3e7
    for path in [*run.out.rglob("*"), run.out]:
        os.utime(path, (future, future))
    survived(run)


@contextmanager
def tiny_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in memory."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount here")
def test_the_disk_is_full(driver: Any, survives: Any, tmp_path: Path, choice: int) -> None:
    size = random.Random(choice).randrange(80, 400)
    with tiny_disk(tmp_path / "disk", f"{size}k") as disk:
        survived = survives("a full disk")
        run = driver(out="disk/run")
        code, _, err = run.start().end()
        assert code == 1, "it fitted"
        assert "No space left on device" in err
        *warnings, error = err.splitlines()
        assert error.startswith("error:")
        assert all("usage.jsonl" in line for line in warnings), "what was worked could not be noted either"
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        survived(run)


class Cutting(http.server.SimpleHTTPRequestHandler):
    """Serves files; of each, the first answers end in the middle."""

    cut: dict[str, int]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        left = self.cut[self.path] = self.cut.get(self.path, 0) - 1
        self.wfile.write(data[: len(data) // 2] if left >= 0 else data)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.mark.slow
def test_reading_fails_in_the_middle_of_a_shard(
    web: Path, driver: Any, record: Any, undisturbed: dict[str, bytes], choice: int
) -> None:
    row = record.begin("a read error in the middle of a shard")
    chance = random.Random(choice)
    victims = chance.sample(range(40), 5)

    def handler(*args: Any) -> Cutting:
        return Cutting(*args, directory=str(web))

    Cutting.cut = {f"/{i:05d}.tar": 5 for i in victims}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        run = driver(shards=f"http://127.0.0.1:{server.server_port}/{{00000..00039}}.tar")
        code, _, err = run.start().end()
        assert code == 1, err
        assert "5 of 40 failed" in err
        Cutting.cut = {}
        run.run()
    finally:
        server.shutdown()
        server.server_close()
    tables = {name: data for name, data in undisturbed.items() if name.startswith("annotations")}
    made = {name: data for name, data in run.outputs().items() if name.startswith("annotations")}
    row.survived += len(run.outputs()) == 80
    row.equal += made == tables
    assert made == tables


def test_two_workers_on_the_same_shards_at_once(driver: Any, survives: Any, seed: int) -> None:
    """Two drivers that know nothing of each other, as after a network was cut in two."""
    survived = survives("the same shards by two workers at once")
    pause = str(0.002 * (1 + seed % 5))
    runs = [driver("--pause", pause) for _ in range(2)]
    for run in runs:
        run.start("--unlocked")
    for run in runs:
        code, _, err = run.end()
        assert code == 0, err
    survived(runs[0], "--unlocked")
