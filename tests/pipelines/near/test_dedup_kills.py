"""SIGKILL at every step of `embed` and `dedup`: the same command goes on, and comes to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from copied_pool import encoded
from tars import tar_of

SHARDS = 12
STEPS = {
    "embed": ["plan.json", "ledger/embed/00004.json"],
    "dedup": [
        *("near/pool.json", "pairs/near.json", "duplicates/00005.parquet"),
        *("ledger/lost-texts/00002.json", "ledger/dedup/00003.json"),
    ],
}
"""By verb, the files at whose first sight it is killed, a process each."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for shard in range(SHARDS):
        files = []
        for key in (f"{shard}", f"{(shard + 1) % SHARDS}-same", f"{(shard + 5) % SHARDS}-small"):
            files += [(f"{key}.jpg", encoded(key)), (f"{key}.txt", f"{key} of {shard}".encode())]
        (folder / f"{shard:05d}.tar").write_bytes(tar_of(*files))
    return folder


def outputs(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.parquet"))}


def start(*words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "capfilt", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed_at(out: Path, steps: list[str], *words: object) -> int:
    """Run the command, kill it when the next of the files is there, run it again; returns how often it was killed."""
    kills = 0
    for step in steps:
        running = start(*words, "--out", out, "--address", "local")
        while running.poll() is None and not (out / step).exists():
            time.sleep(0.0005)
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
            kills += 1
        running.wait()
    return kills


def test_a_killed_driver_goes_on_to_the_same_bytes(pool: Path, tmp_path: Path, capfilt: Any) -> None:
    dedup = ("--keep", "first", "--merge-texts")
    assert capfilt("embed", pool, "--out", tmp_path / "e").code == 0
    assert capfilt("dedup", tmp_path / "e", *dedup, "--out", tmp_path / "d").code == 0
    assert killed_at(tmp_path / "e2", STEPS["embed"], "embed", pool) >= 1
    assert capfilt("embed", pool, "--out", tmp_path / "e2").code == 0
    assert outputs(tmp_path / "e2") == outputs(tmp_path / "e")
    assert killed_at(tmp_path / "d2", STEPS["dedup"], "dedup", tmp_path / "e", *dedup) >= 3
    assert capfilt("dedup", tmp_path / "e", *dedup, "--out", tmp_path / "d2").code == 0
    assert outputs(tmp_path / "d2") == outputs(tmp_path / "d")
    assert sum(name.startswith("texts/") for name in outputs(tmp_path / "d2")) > 3


def workers(verb: str) -> list[int]:
    """Ray's processes that do the work of a verb now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if words.startswith(f"ray::{verb}".encode()) and f"CAPFILT_TEST_KILLS={os.getpid()}".encode() in environment:
            found.append(int(folder.name))
    return found


def test_a_killed_worker_is_replaced(pool: Path, tmp_path: Path, capfilt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPFILT_TEST_KILLS", str(os.getpid()))
    assert capfilt("embed", pool, "--out", tmp_path / "e").code == 0
    running = start("embed", pool, "--out", tmp_path / "e2", "--address", "start", "--workers", "2")
    done, killed = tmp_path / "e2/ledger/embed", False
    while running.poll() is None and not killed:
        if list(done.glob("*.json")) and (at_work := workers("embed")):
            os.kill(at_work[0], signal.SIGKILL)
            killed = len(list(done.glob("*.json"))) < SHARDS
        time.sleep(0.001)
    assert killed
    assert running.wait(120) == 0
    assert outputs(tmp_path / "e2") == outputs(tmp_path / "e")
