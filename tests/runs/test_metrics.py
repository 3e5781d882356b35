from __future__ import annotations

from collections import Counter

import pytest

from capfilt.runs import metrics
from capfilt.runs.metrics import METRICS, TABLE, Reading, ShardReport
from capfilt.runs.tally import Tally

TALLY = Tally(
    samples=Counter({"in": 10, "kept": 6, "dropped": 1, "failed": 3}),
    texts={
        "in": Counter({"web": 7, "synthetic": 7}),
        "kept": Counter({"web": 2, "synthetic": 5}),
        "dropped": Counter({"web: below the threshold": 4, "web: no text": 1, "synthetic: below the threshold": 2}),
    },
    failed=Counter({"no picture": 2, "cut short": 1}),
)


def test_every_metric_has_a_name_of_its_own_and_what_its_kind_needs() -> None:
    assert len(METRICS) == len(TABLE)
    for metric in TABLE:
        assert metric.name.startswith("capfilt_") != metric.from_ray
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.help
        assert not metric.help.endswith(".")


def test_names_in_prometheus() -> None:
    assert METRICS["capfilt_samples"].prometheus_name == "ray_capfilt_samples_total"
    assert METRICS["capfilt_train_loss"].prometheus_name == "ray_capfilt_train_loss"
    assert METRICS["capfilt_shard_seconds"].prometheus_name == "ray_capfilt_shard_seconds_bucket"


def totals(readings: list[Reading], name: str, *labels: str) -> dict[tuple[str, ...], float]:
    found: Counter[tuple[str, ...]] = Counter()
    for reading in readings:
        assert set(reading.labels) == set(METRICS[reading.metric].labels)
        if reading.metric == name:
            found[tuple(reading.labels[label] for label in labels)] += reading.value
    return dict(found)


def test_a_shard_is_read_to_the_last_sample() -> None:
    told = ShardReport("6 images", {"read": 0.5, "vision": 2.0}, (4, 4, 2))
    readings = list(metrics.shard_readings("select", TALLY, told, 3.5))
    assert totals(readings, "capfilt_shards", "stage", "outcome") == {("select", "done"): 1}
    assert totals(readings, "capfilt_samples", "outcome") == {("kept",): 6, ("dropped",): 1, ("failed",): 3}
    assert totals(readings, "capfilt_samples_failed", "reason") == {("no picture",): 2, ("cut short",): 1}
    assert totals(readings, "capfilt_texts", "source", "outcome") == {
        ("web", "kept"): 2,
        ("synthetic", "kept"): 5,
        ("web", "dropped"): 5,
        ("synthetic", "dropped"): 2,
    }
    assert totals(readings, "capfilt_texts_dropped", "source", "reason") == {
        ("web", "below the threshold"): 4,
        ("web", "no text"): 1,
        ("synthetic", "below the threshold"): 2,
    }
    assert totals(readings, "capfilt_phase_seconds", "phase") == {("read",): 0.5, ("vision",): 2.0}
    assert totals(readings, "capfilt_shard_seconds") == {(): 3.5}
    assert [r.value for r in readings if r.metric == "capfilt_batch_size"] == [4, 4, 2]


def test_what_a_log_line_lacks_is_left_out() -> None:
    line = {"step": 40, "itc": 1.5, "lm": 2.5, "itm_accuracy": 0.5, "grad_norm": 0.7, "lr": 1e-4, "data_wait": 0.1}
    readings = list(metrics.training_readings("pretrain", line, 20, 320, ("itc", "itm", "lm")))
    found = {r.metric: r.value for r in readings if "objective" not in r.labels}
    assert found == {
        "capfilt_train_steps": 20,
        "capfilt_train_samples": 320,
        "capfilt_train_gradient_norm": 0.7,
        "capfilt_train_learning_rate": 1e-4,
        "capfilt_train_data_wait": 0.1,
    }
    assert totals(readings, "capfilt_train_loss", "stage", "objective") == {
        ("pretrain", "itc"): 1.5,
        ("pretrain", "lm"): 2.5,
    }
    [share] = [
        r for r in metrics.training_readings("pretrain", {"mfu": 0.4}, 1, 16, ()) if r.metric == "capfilt_train_mfu"
    ]
    assert share.value == 0.4


@pytest.mark.parametrize(
    ("said", "words"), [(None, ""), ("6 images", "6 images"), (ShardReport("6 images"), "6 images")]
)
def test_a_worker_may_say_little(said: ShardReport | str | None, words: str) -> None:
    assert ShardReport.of(said) == ShardReport(words)
