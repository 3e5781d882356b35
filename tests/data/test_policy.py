from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from capfilt.data.annotations import Annotation
from capfilt.data.policy import PolicyConfig, failure, judge, keep_rate_threshold
from capfilt.errors import DataError


def row(**fields: Any) -> Annotation:
    values: dict[str, Any] = {"text": "a cat", "itm": 0.5, "itc": 0.1, "status": "ok", "reason": "", **fields}
    return Annotation("k", "u", "s", "web", 0, captioner="", filter="", seed=0, round=0, **values)


@pytest.mark.parametrize(
    ("fields", "score", "threshold", "why"),
    [
        ({}, "itm", 0.5, ""),  # reaching it is enough
        ({}, "itm", 0.50001, "itm below threshold"),
        ({}, "itc", 0.1, ""),
        ({}, "itc", 0.2, "itc below threshold"),
        ({"itc": -0.4}, "itc", -0.5, ""),
        ({"itm": None}, "itm", 0.0, "no itm score"),
        ({"itm": None}, "itc", 0.0, ""),
        ({"text": " \n"}, "itm", 0.0, "empty text"),
        ({"status": "failed", "reason": "not an image", "itm": None}, "itm", 0.0, "not an image"),
    ],
)
def test_why_a_text_is_dropped(fields: dict[str, Any], score: str, threshold: float, why: str) -> None:
    assert judge(row(**fields), score, threshold) == why


def test_a_score_is_judged_in_the_precision_it_was_kept_in() -> None:
    kept = float(np.float32(0.1))  # 0.10000000149: what Parquet gives back for a threshold found among such scores
    assert judge(row(itc=kept), "itc", kept) == ""


@pytest.mark.parametrize(
    ("reason", "counted"),
    [
        ("not an image", "not an image"),
        ("too many pixels (9000 x 9000, limit 64000000)", "too many pixels"),
        ("shard cut at byte 20480", "shard cut"),
        ("unreadable shard: file could not be opened", "unreadable shard"),
        ("unsafe key (longer than 1024 characters)", "unsafe key"),
    ],
)
def test_failures_are_counted_by_their_class(reason: str, counted: str) -> None:
    assert failure(reason) == counted


def test_keep_rate_keeps_the_share_that_was_asked() -> None:
    scores = np.random.default_rng(0).uniform(0, 1, 10_000)
    for rate in (0.01, 0.25, 0.5, 0.99):
        threshold = keep_rate_threshold(iter(np.array_split(scores, 7)), rate)
        assert np.mean(scores >= threshold) == pytest.approx(rate, abs=2e-4)


@given(
    st.lists(st.integers(-(10**5), 10**5).map(lambda n: n / 10**5), min_size=1, max_size=60),
    st.floats(0.01, 0.99),
    st.integers(1, 4),
)
def test_keep_rate_keeps_enough_and_no_more_than_ties_ask(scores: list[float], rate: float, parts: int) -> None:
    values = np.array(scores)
    threshold = keep_rate_threshold(np.array_split(values, parts), rate)
    wanted = max(1, round(rate * len(scores)))
    assert np.sum(values >= threshold) >= wanted
    assert np.sum(values > threshold + 4e-6) < wanted


def test_keep_rate_needs_scores() -> None:
    with pytest.raises(DataError, match="no text has a score"):
        keep_rate_threshold([np.array([])], 0.5)


@pytest.mark.parametrize(
    "fields",
    [{"threshold": "half"}, {"score": "clip"}, {"recall": 1.0}, {"keep_rate": 0}, {"keep_rate": 1.0}, {"treshold": 1}],
)
def test_policies_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PolicyConfig(**fields)


def test_the_default_is_the_paper_s() -> None:
    assert (PolicyConfig().score, PolicyConfig().threshold) == ("itm", 0.5)
