from __future__ import annotations

import math
import random

import pytest

from capfilt.data.labels import wilson_interval
from capfilt.pipelines.estimate.intervals import Figure, ratio, records, share, t_quantile


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (4, 2.776), (5, 2.571), (8, 2.306), (30, 2.042), (999, 1.962)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, value: float) -> None:
    assert t_quantile(freedom) == pytest.approx(value, rel=2e-3)


def test_independent_pictures_have_nearly_wilson_s_interval() -> None:
    figure = share((number, number % 4 == 0, 1) for number in range(1000))
    assert figure is not None
    assert figure.value == 0.25
    low, high = wilson_interval(250, 1000)
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=1e-3)


def test_pictures_that_are_alike_within_a_shard_say_less() -> None:
    alone = share((number, number % 2, 1) for number in range(200))
    alike = share((number // 20, number // 20 % 2, 1) for number in range(200))
    assert alone is not None
    assert alike is not None
    assert alike.high - alike.low > 4 * (alone.high - alone.low)


def test_texts_of_a_picture_count_as_one_where_nothing_varies() -> None:
    none = share((number, 0, 10) for number in range(50))
    assert none is not None
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(wilson_interval(0, 50)[1], rel=0.1)
    assert share([]) is None


def test_what_was_drawn_whole_is_known() -> None:
    assert share([(0, 1, 1), (1, 0, 1)], drawn=1.0) == Figure(0.5, 0.5, 0.5)
    half, little = (share(((n, n % 3 == 0, 1) for n in range(300)), drawn=drawn) for drawn in (0.5, 0.0))
    assert half is not None
    assert little is not None
    assert half.high - half.low == pytest.approx((little.high - little.low) * math.sqrt(0.5), rel=0.02)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Shards of different quality, of which some are drawn, and pictures from these: the case that Wilson misses."""
    rng = random.Random(0)
    qualities = [rng.betavariate(4, 6) for _ in range(300)]
    truth = sum(qualities) / len(qualities)
    held = naive = 0
    for _ in range(400):
        shards = rng.sample(qualities, 32)
        rows = [(shard, rng.random() < q, 1) for shard, q in enumerate(shards) for _ in range(12)]
        figure = share(rows)
        assert figure is not None
        held += figure.low <= truth <= figure.high
        low, high = wilson_interval(sum(hit for _, hit, _ in rows), len(rows))
        naive += low <= truth <= high
    assert 0.92 <= held / 400 <= 0.985
    assert naive / 400 < 0.9


def test_totals_carry_their_spread() -> None:
    per_image = ratio([(1.0, 10), (1.2, 10), (0.8, 10)])
    assert per_image.value == pytest.approx(0.1)
    assert per_image.low < 0.1 < per_image.high
    single = ratio([(1.0, 10)]) * Figure.of(100)
    assert single.value == pytest.approx(10)
    assert math.isnan(single.low), "one measurement says nothing of its spread"
    assert math.isnan(single.high)
    whole = per_image * Figure.of(100, 0.1) + 5.0
    assert whole.value == pytest.approx(15)
    assert whole.high - whole.value > per_image.high * 100 - 10
    assert records({"a": Figure(2.0), "b": None, "c": Figure(1, 0.5, 2)}) == {
        "a": {"value": 2.0}, "c": {"value": 1.0, "low": 0.5, "high": 2.0},
    }  # fmt: skip
    assert Figure(0.2, 0.1, 0.3).falling(lambda x: 1 - x) == Figure(0.8, 0.7, 0.9)
