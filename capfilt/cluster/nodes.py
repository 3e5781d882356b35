"""Runs a function once on every node of a cluster, to learn what the nodes are before work is assigned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from capfilt.cluster.session import Session

R = TypeVar("R")

TIMEOUT = 60.0
"""Seconds after which a node that has no free slot for the function, or whose process does not start, is skipped."""


def run_on_nodes(session: Session, function: Callable[[], R], cpus: float, gpus: float) -> list[R]:
    """The results of a function on every node that can hold a worker of this size, in a process that has `gpus`.

    A node that is busy for `TIMEOUT` seconds is skipped, so a worker that gets work there later must check again.
    """
    assert not session.local, "a local session has no nodes"
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # No CPUs are reserved: the function needs one for a moment only.
    task: Any = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=1)(function)
    calls = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= cpus and node["Resources"].get("GPU", 0) >= gpus
    ]
    if not calls:
        return []
    ready, busy = ray.wait(calls, num_returns=len(calls), timeout=TIMEOUT)
    for call in busy:
        ray.cancel(call, force=True)
    return [ray.get(call) for call in ready]
