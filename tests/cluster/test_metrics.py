"""What reaches a Prometheus is tested with one: tests/pipelines/test_monitoring.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from capfilt.cluster.session import Session, connect
from capfilt.runs import metrics
from capfilt.runs.metrics import TABLE, Reading


def test_in_one_process_nothing_is_even_counted() -> None:
    def readings() -> Iterator[Reading]:
        raise AssertionError("nobody asks for it")
        yield metrics.failure_reading("annotate")

    with connect("local") as session:
        session.report(readings())


def test_ray_takes_every_metric_of_the_table(ray_session: Session) -> None:
    ray_session.report(
        Reading(metric.name, 1.0, dict.fromkeys(metric.labels, "x")) for metric in TABLE if not metric.from_ray
    )
    ray_session.report([Reading("capfilt_shards", 0, {"stage": "x", "outcome": "done"})])  # nothing to add


def test_a_reading_that_the_table_does_not_know_is_an_error(ray_session: Session) -> None:
    with pytest.raises(KeyError, match="capfilt_shard_names"):
        ray_session.report([Reading("capfilt_shard_names", 1, {"stage": "x"})])
    with pytest.raises(ValueError, match="Missing value for tag key"):
        ray_session.report([Reading("capfilt_shards", 1, {"stage": "x"})])
