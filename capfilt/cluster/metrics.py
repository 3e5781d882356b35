"""Readings become Ray's metrics, in the process that drives a run.

In the driver rather than in the workers: Ray hands metrics on every ten seconds, and what a worker counted after that
is lost when it is killed, which is how ours end. A driver that leaves hands on the rest. It also sees each shard
end once, however often it was tried.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from capfilt.runs.metrics import METRICS, Metric, Reading

MOST = 64
"""Values of one label of one metric; what comes after them is counted as "other". Reasons come from small sets, and
this holds even where one does not."""


class Meters:
    """Ray's counters, gauges and histograms, each made when it is first read."""

    def __init__(self) -> None:
        self._instruments: dict[str, Any] = {}
        self._values: defaultdict[tuple[str, str], set[str]] = defaultdict(set)

    def take(self, readings: Sequence[Reading]) -> None:
        """Count, set and observe."""
        for name, value, labels in readings:
            kind = METRICS[name].kind
            if kind == "counter" and value <= 0:
                continue  # Ray refuses to add nothing
            instrument = self._instruments.get(name) or self._make(METRICS[name])
            record = {"counter": "inc", "gauge": "set", "histogram": "observe"}[kind]
            getattr(instrument, record)(value, self._bounded(name, labels))

    def close(self) -> None:
        """Nothing: Ray hands on the rest when this process leaves it."""

    def _make(self, metric: Metric) -> Any:
        from ray.util import metrics as kinds

        words = {"description": f"{metric.help} [{metric.unit}]", "tag_keys": metric.labels}
        if metric.kind == "histogram":
            made: Any = kinds.Histogram(metric.name, boundaries=list(metric.buckets), **words)
        else:
            made = {"counter": kinds.Counter, "gauge": kinds.Gauge}[metric.kind](metric.name, **words)
        self._instruments[metric.name] = made
        return made

    def _bounded(self, name: str, labels: Mapping[str, str]) -> dict[str, str]:
        tags = {}
        for label, value in labels.items():
            known = self._values[name, label]
            if value not in known and len(known) < MOST:
                known.add(value)
            tags[label] = value if value in known else "other"
        return tags


class FarMeters:
    """The same for a driver outside the cluster (ray://), whose own process has no part in it: an actor takes them."""

    def __init__(self) -> None:
        import ray

        self._actor = ray.remote(num_cpus=0)(Meters).remote()

    def take(self, readings: Sequence[Reading]) -> None:
        """Send readings, and wait for nothing."""
        self._actor.take.remote(readings)

    def close(self) -> None:
        """Have the actor leave by itself, after all that it was sent: killed, it would not hand on the rest."""
        import ray

        ray.wait([self._actor.__ray_terminate__.remote()], timeout=10)


def open_meters() -> Meters | FarMeters:
    """Whatever takes readings on the Ray that this process is connected to."""
    from ray.util.client import ray as client

    return FarMeters() if client.is_connected() else Meters()
