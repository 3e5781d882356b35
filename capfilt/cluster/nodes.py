"""What the nodes of a cluster are, asked of a process on each before work is handed out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from capfilt.cluster.session import Session

R = TypeVar("R")

PATIENCE = 60.0
"""Seconds after which a node that has no room for a question, or whose process does not start, is left out."""


def ask_nodes(session: Session, question: Callable[[], R], cpus: float, gpus: float) -> list[R]:
    """The answers of every node that can hold a worker of this size, each from a process that holds `gpus`.

    A node that is busy for `PATIENCE` is left out; whoever gets work there later must be able to refuse it.
    """
    assert not session.local, "a lone process asks itself"
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # No cores are asked for: what a question needs of them is a moment's.
    task: Any = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=1)(question)
    calls = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= gpus
    ]
    if not calls:
        return []
    ready, busy = ray.wait(calls, num_returns=len(calls), timeout=PATIENCE)
    for call in busy:
        ray.cancel(call, force=True)
    return [ray.get(call) for call in ready]
