from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from capfilt.data.annotations import Annotation
from capfilt.data.policy import (
    PolicyConfig,
    Rule,
    best_text,
    check_scores,
    failure_class,
    keep_rate_threshold,
    verdicts_of_image,
)
from capfilt.errors import DataError, RecipeError


def row(source: str = "web", candidate: int = 0, **fields: Any) -> Annotation:
    values: dict[str, Any] = {"text": "a cat", "itm": 0.5, "itc": 0.1, "status": "ok", "reason": "", **fields}
    return Annotation("k", "u", "s", source, candidate, captioner="", filter="", seed=0, round=0, **values)


def why(one: Annotation, **rule: Any) -> str:
    return verdicts_of_image([one], Rule(**rule))[0]


@pytest.mark.parametrize(
    ("fields", "score", "threshold", "expected"),
    [
        ({}, "itm", 0.5, ""),  # reaching it is enough
        ({}, "itm", 0.50001, "itm below threshold"),
        ({}, "itc", 0.1, ""),
        ({}, "itc", 0.2, "itc below threshold"),
        ({"itc": -0.4}, "itc", -0.5, ""),
        ({"itm": None}, "itm", 0.0, "no itm score"),
        ({"itm": None}, "itc", 0.0, ""),
        ({"text": " \n"}, "itm", 0.0, "no text"),
        ({"text": "...", "itm": None}, "itm", 0.0, "no text"),
        ({"status": "failed", "reason": "not an image", "itm": None}, "itm", 0.0, "not an image"),
    ],
)
def test_why_a_text_is_dropped(fields: dict[str, Any], score: str, threshold: float, expected: str) -> None:
    assert why(row(**fields), score=score, threshold=threshold) == expected


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        ({"threshold": 0.1}, "human"),  # the policy's score
        ({"threshold": 0.1, "score": "itc"}, "second"),
        ({"threshold": None}, "second"),  # nothing but a rank
        ({"threshold": 0.1, "top_k": 2}, "second"),
        ({"threshold": 0.1, "top_k": 2, "rank": "itm"}, "human"),
    ],
)
def test_the_best_text_of_an_image(policy: dict[str, Any], text: str) -> None:
    kept = [
        row("synthetic", 0, text="first", itm=0.9, itc=0.1),
        row("synthetic", 1, text="second", itm=0.5, itc=0.9),
        row("human", 0, text="human", itm=0.9, itc=0.9),
        row("human", 1, text="human too", itm=0.9, itc=0.1),
        row("web", 0, text="web", itm=None, itc=0.1),
    ]
    config = PolicyConfig(**policy)
    assert not isinstance(config.threshold, str)
    rule = config.rule(config.threshold)
    if text == "second":  # of equals the one that people wrote, of these the web's
        kept[2] = row("human", 0, text="human", itm=0.9, itc=0.8)
    assert best_text(kept, rule).text == best_text(kept[::-1], rule).text == text
    equal = row("web", 7, text="equal", itm=best_text(kept, rule).itm, itc=best_text(kept, rule).itc)
    assert best_text([*kept, equal], rule) == equal


def test_a_score_is_compared_in_the_precision_it_was_kept_in() -> None:
    kept = float(np.float32(0.1))  # 0.10000000149: what Parquet gives back for a threshold found among such scores
    assert why(row(itc=kept), score="itc", threshold=kept) == ""


@pytest.mark.parametrize(
    ("itm", "itc", "both", "either"),
    [
        (0.5, 0.3, "", ""),
        (0.5, 0.2, "itc below threshold", ""),
        (0.4, 0.3, "itm below threshold", ""),
        (0.4, 0.2, "itm below threshold", "itm below threshold, itc below threshold"),
        (None, 0.3, "no itm score", ""),
        (0.5, None, "no itc score", ""),
        (None, None, "no itm score", "no itm score, no itc score"),
    ],
)
def test_two_thresholds(itm: float | None, itc: float | None, both: str, either: str) -> None:
    rule = {"score": "itm", "threshold": 0.5, "other_threshold": 0.3}
    assert why(row(itm=itm, itc=itc), **rule) == both
    assert why(row(itm=itm, itc=itc), **rule, combine="or") == either
    turned = {"score": "itc", "threshold": 0.3, "other_threshold": 0.5, "combine": "or"}
    assert bool(why(row(itm=itm, itc=itc), **turned)) == bool(either)


TEXTS = [
    row("synthetic", 0, text="a cat", itm=0.9, itc=0.3),
    row("synthetic", 1, text="a dog", itm=0.2, itc=0.4),
    row("synthetic", 2, text="a cat ", itm=0.9, itc=0.3),
    row("synthetic", 3, text="", itm=0.9, itc=0.9),
    row("web", 0, text="IMG_0042", itm=0.6, itc=0.3),
]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # BLIP-2: the two best by itc, wherever they come from; of equals the web's.
        (
            {"top_k": 2},
            ["not among the 2 best by itc", "", "not among the 2 best by itc", "no text", ""],
        ),
        ({"top_k": 3}, ["", "", "same text as a better one", "no text", ""]),
        ({"top_k": 1, "rank": "itm", "threshold": 0.5}, [
            "", "itm below threshold", "same text as a better one", "no text", "not among the 1 best by itm",
        ]),
        ({"top_k": 9, "threshold": 0.7}, [
            "", "itm below threshold", "same text as a better one", "no text", "itm below threshold",
        ]),
        ({"keep": "best-of"}, [
            "another text of the image is better", "itm below threshold", "another text of the image is better",
            "no text", "",
        ]),
        ({"keep": "best-of", "threshold": 0.8}, [
            "", "itm below threshold", "same text as a better one", "no text", "itm below threshold",
        ]),
        ({"keep": "best-of", "score": "itc", "threshold": 0.35}, [
            "itc below threshold", "", "itc below threshold", "no text", "itc below threshold",
        ]),
    ],
)  # fmt: skip
def test_the_texts_of_an_image_against_one_another(policy: dict[str, Any], expected: list[str]) -> None:
    config = PolicyConfig(**policy)
    assert not isinstance(config.threshold, str)
    assert verdicts_of_image(TEXTS, config.rule(config.threshold)) == expected
    turned = verdicts_of_image(TEXTS[::-1], config.rule(config.threshold))
    assert turned[::-1] == expected, "the order in which they come says nothing"


def test_what_cannot_be_ranked_says_so() -> None:
    assert verdicts_of_image([row(itc=None), row(itc=-1.0)], PolicyConfig(top_k=2).rule(None)) == ["no itc score", ""]
    assert why(row(itc=None), score="itm", threshold=0.1, top_k=1) == "no itc score"


def test_a_ranking_has_no_threshold_unless_it_is_given() -> None:
    assert PolicyConfig(top_k=2).threshold is None
    assert PolicyConfig(top_k=2, threshold=0.5).threshold == 0.5
    again = PolicyConfig.model_validate(PolicyConfig(top_k=2).model_dump())
    assert again == PolicyConfig(top_k=2)


def test_a_rule_says_what_it_asks() -> None:
    assert str(PolicyConfig().rule(0.5)) == "itm >= 0.5000"
    assert str(PolicyConfig(top_k=2).rule(None)) == "the 2 best by itc"
    assert str(PolicyConfig(threshold=None).rule(None)) == "any score"
    both = PolicyConfig(score="itc", other_threshold=0.1, combine="or").rule(0.25)
    assert str(both) == "itc >= 0.2500 or itm >= 0.1000"


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
    assert failure_class(reason) == counted


def test_keep_rate_keeps_the_given_share() -> None:
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
    [
        {"threshold": "half"}, {"score": "clip"}, {"recall": 1.0}, {"keep_rate": 0}, {"keep_rate": 1.0},
        {"treshold": 1}, {"top_k": -1}, {"top_k": 2, "keep": "best-of"}, {"combine": "xor"},
        {"threshold": None, "other_threshold": 0.3},
    ],
)  # fmt: skip
def test_policies_that_mean_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PolicyConfig(**fields)


def test_the_default_is_the_paper_s() -> None:
    assert (PolicyConfig().score, PolicyConfig().threshold) == ("itm", 0.5)


@pytest.mark.parametrize(
    ("fields", "needed"),
    [
        ({}, ("itm",)),
        ({"score": "itc"}, ("itc",)),
        ({"top_k": 2}, ("itc",)),
        ({"top_k": 2, "threshold": 0.5}, ("itm", "itc")),
        ({"other_threshold": 0.1}, ("itm", "itc")),
        ({"other_threshold": 0.1, "combine": "or"}, ()),  # a text may pass by either
        ({"score": "itc", "keep": "best-of", "rank": "itm"}, ("itc", "itm")),
    ],
)
def test_the_scores_without_which_a_policy_keeps_nothing(fields: dict[str, Any], needed: tuple[str, ...]) -> None:
    policy = PolicyConfig(**fields)
    assert policy.needed_scores == needed
    rule = policy.rule(policy.threshold if not isinstance(policy.threshold, str) else 0.5)
    for score in needed if policy.keep == "all" else needed[:1]:
        assert why(row(**{"itm": 1.0, "itc": 1.0, score: None}), **rule.model_dump()), score
    if "itm" in needed:
        with pytest.raises(RecipeError, match="itm is needed, and F gives itc alone: set score=itc"):
            check_scores(needed, ["itc"], "F")
    check_scores(needed, ["itm", "itc"], "F")
