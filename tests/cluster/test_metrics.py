"""What reaches a Prometheus is tested with one: tests/pipelines/together/test_monitoring.py."""

from __future__ import annotations

import inspect

import pytest

from capfilt.cluster.session import Session, connect
from capfilt.runs import metrics
from capfilt.runs.metrics import TABLE, Reading


def test_in_one_process_nothing_is_even_counted() -> None:
    readings = (metrics.failure_reading(stage) for stage in ["annotate"])
    with connect("local") as session:
        session.report(readings)
    assert inspect.getgeneratorstate(readings) == inspect.GEN_CREATED, "nobody asked for the first"


def test_ray_takes_every_metric_of_the_table(ray_session: Session) -> None:
    readings = [Reading(metric.name, 1.0, dict.fromkeys(metric.labels, "x")) for metric in TABLE if not metric.from_ray]
    assert len(readings) > 10
    ray_session.report(readings)
    ray_session.report([Reading("capfilt_shards", 0, {"stage": "x", "outcome": "done"})])  # nothing to add


def test_a_reading_that_the_table_does_not_know_is_an_error(ray_session: Session) -> None:
    with pytest.raises(KeyError, match="capfilt_shard_names"):
        ray_session.report([Reading("capfilt_shard_names", 1, {"stage": "x"})])
    with pytest.raises(ValueError, match="Missing value for tag key"):
        ray_session.report([Reading("capfilt_shards", 1, {"stage": "x"})])
