"""A cluster that grows and shrinks while a stage works on it, with nodes that are processes of this machine.

Ray's own `AutoscalingCluster` is not used: it begins with `ray stop --force`, which ends every Ray of the machine.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from capfilt.data import shards
from capfilt.data.sample import Sample

SHORT, LONG = 4, 120
"""Samples of a shard, each of which takes 0.3 s; the last shard is a long one. On a busy machine a node needs half a
minute to join."""


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    for shard in range(60):
        samples = (
            Sample(f"{shard:05d}{i:04d}", picture.getvalue(), "png", f"text {shard} {i}")
            for i in range(LONG if shard == 59 else SHORT)
        )
        shards.write(tmp_path / f"uneven/{shard:05d}.tar", samples)
    return tmp_path / "uneven"


def raylet(node: Any) -> int:
    """The process of a node whose children are its workers."""
    return int(node.all_processes["raylet"][0].process.pid)


def workers_of(node: Any, pids: list[int]) -> list[int]:
    """Those workers that run on a node."""
    parents = {}
    for pid in pids:
        try:
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:  # it has just ended
            continue
    return [pid for pid, parent in parents.items() if parent == raylet(node)]


def wait_for(true: Callable[[], object], what: str, run: Any) -> None:
    give_up = time.monotonic() + 90
    while not true():
        assert run.process.poll() is None, f"it ended before {what}: {run.process.communicate()}"
        assert time.monotonic() < give_up, what
        time.sleep(0.05)


def test_nodes_join_and_leave_during_a_stage(nodes: Any, driver: Any, uneven: Path) -> None:
    """A node that joins gets work, one that is lost gives it back, and at the end idle nodes have no worker."""
    alone = driver(shards=uneven, out="alone")
    alone.run()
    run = driver("--address", nodes.address, "--pause", "0.3", shards=uneven)
    run.start()
    run.reach(2)
    with pytest.MonkeyPatch.context() as patch:  # as the other nodes were begun
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        joined = [nodes.cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
    nodes.lost += joined
    try:
        wait_for(lambda: all(workers_of(node, run.workers()) for node in joined), "work on the nodes that joined", run)
        leaving = nodes.lost.pop(0)
        nodes.cluster.remove_node(leaving, allow_graceful=False)
        wait_for(lambda: run.done() >= 59, "the short shards", run)
        wait_for(lambda: len(run.workers()) <= 2, "idle workers to end", run)
        busy = [node for node in (*nodes.lost, nodes.cluster.head_node) if workers_of(node, run.workers())]
        assert len(busy) <= 2 < len(nodes.lost) + 1, "nodes without a worker may be taken away"
        assert run.done() == 59, "and the last shard was still at work"
        code, _, err = run.end(120)
        assert code == 0, err
        assert run.outputs() == alone.outputs()
    finally:
        while len(nodes.lost) > nodes.num:
            nodes.lose()
