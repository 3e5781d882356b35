"""The metrics of a run: one table of their names, and how tallies and log lines become readings of them.

`cluster/metrics.py` passes readings to Ray, and `deploy/dashboards.py` draws the table. Labels are stages, sources,
phases and reasons, all of them from small sets: never a shard, a key or a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from capfilt.runs.tally import Tally

PREFIX = "ray_"
"""The prefix that Ray gives every name that it exports to Prometheus."""


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ("stage",)
    buckets: tuple[float, ...] = ()
    """Upper bounds; for histograms only. Ray keeps counts of buckets, so a sum is computed from their midpoints."""
    needs: str = ""
    """"gpu": it is only measured where there is one."""
    from_ray: bool = False
    """Whether Ray measures it itself, under this very name."""

    @property
    def prometheus_name(self) -> str:
        """The name of its series in Prometheus; of a histogram, of its buckets."""
        return PREFIX + self.name + {"counter": "_total", "gauge": "", "histogram": "_bucket"}[self.kind]


class Reading(NamedTuple):
    """A value for a metric: what to add to a counter, the value of a gauge, an observation of a histogram."""

    metric: str
    value: float
    labels: Mapping[str, str]


@dataclass(frozen=True)
class ShardReport:
    """What a worker reports about a shard that it committed: a text for a person, and where its time went."""

    text: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase. Phases of several threads overlap, so they may add up to more than the shard took."""
    batches: tuple[int, ...] = ()
    """Samples in each batch of a model."""

    @classmethod
    def of(cls, result: ShardReport | str | None) -> ShardReport:
        """The report of a worker that may have returned only a text, or nothing."""
        return result if isinstance(result, ShardReport) else cls(result or "")


SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)
POWERS = tuple(float(2**i) for i in range(12))

TABLE: tuple[Metric, ...] = (
    Metric("capfilt_shards", "counter", "shards", "Shards that came to their end: done, failed", ("stage", "outcome")),
    Metric(
        "capfilt_samples", "counter", "samples", "Samples of done shards: kept, dropped, failed", ("stage", "outcome")
    ),
    Metric("capfilt_samples_failed", "counter", "samples", "Samples that failed, by reason", ("stage", "reason")),
    Metric("capfilt_texts", "counter", "texts", "Texts by source: kept, dropped", ("stage", "source", "outcome")),
    Metric("capfilt_texts_dropped", "counter", "texts", "Texts dropped, by reason", ("stage", "source", "reason")),
    Metric("capfilt_phase_seconds", "counter", "seconds", "Where workers spend their time", ("stage", "phase")),
    Metric("capfilt_shard_seconds", "histogram", "seconds", "How long a shard takes its worker", buckets=SECONDS),
    Metric("capfilt_batch_size", "histogram", "samples", "Samples that a model looks at together", buckets=POWERS),
    Metric("capfilt_queue_depth", "gauge", "shards", "Shards that are not done yet"),
    Metric("capfilt_train_steps", "counter", "steps", "Steps of a training, those done again not counted"),
    Metric("capfilt_train_samples", "counter", "samples", "Samples that a training has seen"),
    Metric("capfilt_train_samples_per_second", "gauge", "samples/s", "Rate of a training, all its processes together"),
    Metric("capfilt_train_loss", "gauge", "nats", "Losses of a training by objective", ("stage", "objective")),
    Metric("capfilt_train_gradient_norm", "gauge", "", "Norm of the gradients, before they are clipped"),
    Metric("capfilt_train_learning_rate", "gauge", "", "Learning rate"),
    Metric("capfilt_train_data_wait", "gauge", "share", "Share of its time that a training waits for data"),
    Metric("capfilt_train_mfu", "gauge", "share", "Model FLOPs of a training, of what its GPUs can do", needs="gpu"),
    Metric(
        "node_gpus_utilization", "gauge", "percent", "GPU busy share, by node and GPU",
        ("ip", "GpuIndex"), needs="gpu", from_ray=True,
    ),
)  # fmt: skip
"""All metrics."""

METRICS = {metric.name: metric for metric in TABLE}

_OF_A_STEP = {
    "samples_per_second": "capfilt_train_samples_per_second",
    "grad_norm": "capfilt_train_gradient_norm",
    "lr": "capfilt_train_learning_rate",
    "data_wait": "capfilt_train_data_wait",
    "mfu": "capfilt_train_mfu",
}


def queue_reading(stage: str, left: int) -> Reading:
    """How many shards of a stage are not done."""
    return Reading("capfilt_queue_depth", left, {"stage": stage})


def failure_reading(stage: str) -> Reading:
    """A shard that failed as a whole."""
    return Reading("capfilt_shards", 1, {"stage": stage, "outcome": "failed"})


def shard_readings(stage: str, tally: Tally, report: ShardReport, seconds: float) -> Iterator[Reading]:
    """The counts of one shard that is done, and how long it took."""
    yield Reading("capfilt_shards", 1, {"stage": stage, "outcome": "done"})
    yield Reading("capfilt_shard_seconds", seconds, {"stage": stage})
    for outcome in ("kept", "dropped", "failed"):
        yield Reading("capfilt_samples", tally.samples[outcome], {"stage": stage, "outcome": outcome})
    for reason, count in tally.failed.items():
        yield Reading("capfilt_samples_failed", count, {"stage": stage, "reason": reason})
    for source, count in tally.texts["kept"].items():
        yield Reading("capfilt_texts", count, {"stage": stage, "source": source, "outcome": "kept"})
    for key, count in tally.texts["dropped"].items():
        source, _, reason = key.partition(": ")
        yield Reading("capfilt_texts", count, {"stage": stage, "source": source, "outcome": "dropped"})
        yield Reading("capfilt_texts_dropped", count, {"stage": stage, "source": source, "reason": reason})
    for phase, spent in report.seconds.items():
        yield Reading("capfilt_phase_seconds", spent, {"stage": stage, "phase": phase})
    for size in report.batches:
        yield Reading("capfilt_batch_size", size, {"stage": stage})


def training_readings(
    stage: str, line: Mapping[str, float], steps: int, samples: int, objectives: Iterable[str]
) -> Iterator[Reading]:
    """Readings of one line of a training's log, `steps` and `samples` after the line before it."""
    yield Reading("capfilt_train_steps", steps, {"stage": stage})
    yield Reading("capfilt_train_samples", samples, {"stage": stage})
    for key, name in _OF_A_STEP.items():
        if key in line:
            yield Reading(name, line[key], {"stage": stage})
    for objective in objectives:
        if objective in line:
            yield Reading("capfilt_train_loss", line[objective], {"stage": stage, "objective": objective})
