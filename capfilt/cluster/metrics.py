"""Records readings as Ray's metrics, in the driver of a run.

In the driver and not in the workers, because Ray sends metrics every ten seconds: what a worker counted since is lost
when it is killed, which is how workers end here. A driver that leaves sends the rest. It also sees the end of each
shard once, however often the shard was tried.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from capfilt.runs.metrics import METRICS, Metric, Reading

MAX_LABEL_VALUES = 64
"""Values of one label of one metric; further ones are counted as "other". Reasons come from small sets, and this bounds
any that do not."""


class RayMetrics:
    """Ray's counters, gauges and histograms, each created at its first reading."""

    def __init__(self) -> None:
        self._instruments: dict[str, Any] = {}
        self._values: defaultdict[tuple[str, str], set[str]] = defaultdict(set)

    def record(self, readings: Sequence[Reading]) -> None:
        """Add to counters, set gauges and observe in histograms."""
        for name, value, labels in readings:
            kind = METRICS[name].kind
            if kind == "counter" and value <= 0:
                continue  # Ray refuses to add 0
            instrument = self._instruments.get(name) or self._make(METRICS[name])
            method = {"counter": "inc", "gauge": "set", "histogram": "observe"}[kind]
            getattr(instrument, method)(value, self._bounded(name, labels))

    def close(self) -> None:
        """Nothing: Ray sends the rest when this process disconnects."""

    def _make(self, metric: Metric) -> Any:
        from ray.util import metrics as ray_metrics

        settings = {"description": f"{metric.help} [{metric.unit}]", "tag_keys": metric.labels}
        if metric.kind == "histogram":
            instrument: Any = ray_metrics.Histogram(metric.name, boundaries=list(metric.buckets), **settings)
        else:
            instrument = {"counter": ray_metrics.Counter, "gauge": ray_metrics.Gauge}[metric.kind](
                metric.name, **settings
            )
        self._instruments[metric.name] = instrument
        return instrument

    def _bounded(self, name: str, labels: Mapping[str, str]) -> dict[str, str]:
        tags = {}
        for label, value in labels.items():
            known = self._values[name, label]
            if value not in known and len(known) < MAX_LABEL_VALUES:
                known.add(value)
            tags[label] = value if value in known else "other"
        return tags


class RemoteRayMetrics:
    """The same for a driver outside the cluster (ray://), whose process cannot send metrics: an actor records them."""

    def __init__(self) -> None:
        import ray

        self._actor = ray.remote(num_cpus=0)(RayMetrics).remote()

    def record(self, readings: Sequence[Reading]) -> None:
        """Send readings without waiting."""
        self._actor.record.remote(readings)

    def close(self) -> None:
        """End the actor after all that it was sent: a killed one would not send the rest of its metrics."""
        import ray

        ray.wait([self._actor.__ray_terminate__.remote()], timeout=10)


def open_metrics() -> RayMetrics | RemoteRayMetrics:
    """What records readings on the Ray that this process is connected to."""
    from ray.util.client import ray as client

    return RemoteRayMetrics() if client.is_connected() else RayMetrics()
