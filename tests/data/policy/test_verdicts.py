from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from capfilt import config as configs
from capfilt import presets
from capfilt.data.annotations import Annotation
from capfilt.data.policy import (
    Condition,
    PolicyConfig,
    Rule,
    best_text,
    check_scores,
    failure_class,
    verdicts_of_image,
)
from capfilt.data.policy.quantiles import Histogram
from capfilt.errors import RecipeError
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from tests.data.policy.conftest import row


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
        # The web's where it passes, though a synthetic one has a better itm.
        ({"keep": "web-first"}, [
            "a web text of the image passes", "itm below threshold", "a web text of the image passes", "no text", "",
        ]),
        ({"keep": "web-first", "threshold": 0.8}, [
            "", "itm below threshold", "same text as a better one", "no text", "itm below threshold",
        ]),
        ({"keep": "web-first", "score": "itc", "threshold": 0.35}, [
            "itc below threshold", "", "itc below threshold", "no text", "itc below threshold",
        ]),
        ({"keep": "best", "threshold": 0.1}, [
            "a synthetic text of the image ranks higher by itc", "",
            "a synthetic text of the image ranks higher by itc", "no text",
            "a synthetic text of the image ranks higher by itc",
        ]),
        ({"keep": "best", "rank": "itm", "threshold": 0.1}, [
            "", "a synthetic text of the image ranks higher by itm", "same text as a better one", "no text",
            "a synthetic text of the image ranks higher by itm",
        ]),
        # All of one itc: of equals the web's.
        ({"keep": "best"}, [
            "a web text of the image ranks higher by itc", "itm below threshold",
            "a web text of the image ranks higher by itc", "no text", "",
        ]),
    ],
)  # fmt: skip
def test_the_texts_of_an_image_against_one_another(policy: dict[str, Any], expected: list[str]) -> None:
    config = PolicyConfig(**policy)
    assert not isinstance(config.threshold, str)
    assert verdicts_of_image(TEXTS, config.rule(config.threshold)) == expected
    turned = verdicts_of_image(TEXTS[::-1], config.rule(config.threshold))
    assert turned[::-1] == expected, "the order in which they come says nothing"


def test_of_texts_that_came_with_the_image_the_better_one_is_kept() -> None:
    rows = [row("web", 0, text="one", itc=0.1), row("web", 1, text="two", itc=0.2), row("human", 0, text="three")]
    rule = PolicyConfig(keep="web-first").rule(0.5)
    higher = "a web text of the image ranks higher by itc"
    assert verdicts_of_image(rows, rule) == [higher, "", higher]
    alone = [row("human", 0), row("synthetic", 0, text="two", itc=0.9)]
    assert verdicts_of_image(alone, rule) == ["", "a human text of the image passes"]


def kept_by_definition(rows: list[Annotation], rule: Rule) -> set[int]:
    """Which rows of one image are kept, as docs/policies.md says it: slowly, with no sorting."""

    def reaches(one: Annotation, score: str, threshold: float) -> bool:
        value = getattr(one, score)
        return value is not None and value >= threshold

    def meets(one: Annotation, condition: Condition) -> bool:
        value = one.score(condition.score)
        low, high = (condition.min, -9.0)[condition.min is None], (condition.max, 9.0)[condition.max is None]
        return value is not None and low <= value <= high

    def passes(one: Annotation) -> bool:
        if one.status == "failed" or not any(letter.isalnum() for letter in one.text):
            return False
        if rule.sources and one.source not in rule.sources:
            return False
        if len(one.text.split()) < rule.rules.min_words:
            return False
        if not all(any(meets(one, each) for each in alternatives) for alternatives in rule.conditions):
            return False
        is_ranked = getattr(one, rule.rank) is not None
        if rule.threshold is None:
            ranks = rule.top_k > 0 or rule.keep == "best" or not (rule.conditions or rule.rules.min_words)
            return is_ranked or not ranks
        reached = reaches(one, rule.score, rule.threshold)
        if rule.other_threshold is not None:
            other = reaches(one, "itc" if rule.score == "itm" else "itm", rule.other_threshold)
            reached = reached or other if rule.combine == "or" else reached and other
        needs_rank = rule.keep == "best" or (rule.top_k > 0 and rule.other_threshold is None)
        return reached and (is_ranked or not needs_rank)

    def beats(one: Annotation, other: Annotation) -> bool:
        if rule.keep == "web-first" and "synthetic" in {one.source, other.source} and one.source != other.source:
            return other.source == "synthetic"
        ranks = [-9.0 if (value := getattr(each, rule.rank)) is None else value for each in (one, other)]
        if ranks[0] != ranks[1]:
            return bool(ranks[0] > ranks[1])
        places = [("web", "human", "synthetic").index(each.source) for each in (one, other)]
        return places[0] < places[1] if places[0] != places[1] else one.candidate < other.candidate

    passing = {i for i, one in enumerate(rows) if passes(one)}
    if rule.keep == "all" and not rule.top_k:
        return passing
    repeated = {
        i for i in passing for j in passing if rows[i].text.strip() == rows[j].text.strip() and beats(rows[j], rows[i])
    }
    distinct = passing - repeated
    return {i for i in distinct if sum(beats(rows[j], rows[i]) for j in distinct) < (rule.top_k or 1)}


ITM, ITC = st.sampled_from([None, 0.0, 0.3, 0.5, 0.50001, 0.9]), st.sampled_from([None, -0.5, 0.0, 0.3, 0.30001])
IMAGES = st.lists(
    st.builds(
        row,
        st.sampled_from(["web", "human", "synthetic"]),
        st.integers(0, 3),
        text=st.sampled_from(["a cat", "a cat ", "a dog", "IMG_0042", "...", ""]),
        itm=ITM,
        itc=ITC,
        scores=st.fixed_dictionaries({"sieve": ITC, "aesthetic": st.sampled_from([None, 4.5, 5.0])}),
        status=st.sampled_from(["ok", "ok", "ok", "failed"]),
        reason=st.just("not an image"),
    ),
    max_size=8,
    unique_by=lambda one: (one.source, one.candidate),
)


CONDITIONS = st.builds(
    Condition,
    score=st.sampled_from(["itm", "sieve", "aesthetic"]),
    min=st.sampled_from([0.0, 0.3]),
    max=st.sampled_from([None, 0.5, 1.0]),
)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    top_k = draw(st.integers(0, 3))
    threshold = draw(st.sampled_from([None, 0.0, 0.3, 0.5]))
    other = None if threshold is None else draw(st.sampled_from([None, 0.0, 0.3]))
    return Rule(
        score=draw(st.sampled_from(["itm", "itc"])),
        rank=draw(st.sampled_from(["itm", "itc"])),
        threshold=threshold,
        other_threshold=other,
        combine=draw(st.sampled_from(["and", "or"])),
        top_k=top_k,
        keep="all" if top_k else draw(st.sampled_from(["all", "web-first", "best"])),
        sources=draw(st.sampled_from([(), (), ("web",), ("synthetic", "human")])),
        conditions=draw(st.lists(st.lists(CONDITIONS, min_size=1, max_size=2), max_size=2)),
        rules={"min_words": draw(st.sampled_from([0, 0, 2]))},
    )


def test_conditions_and_their_alternatives() -> None:
    both = {"score": "itm", "threshold": 0.4, "conditions": [{"score": "sieve", "min": 0.3, "max": 0.8}]}
    assert why(row(scores={"sieve": 0.3}), **both) == ""
    assert why(row(scores={"sieve": 0.25}), **both) == "sieve below 0.3"
    assert why(row(scores={"sieve": 0.9}), **both) == "sieve above 0.8"
    assert why(row(scores={"sieve": None}), **both) == why(row(), **both) == "no sieve score"
    assert why(row(itm=0.3, scores={"sieve": 0.25}), **both) == "sieve below 0.3", "what no threshold changes is first"
    assert why(row(itm=0.3, scores={"sieve": 0.5}), **both) == "itm below threshold"
    either = {**both, "conditions": [[{"score": "sieve", "min": 0.3}, {"score": "aesthetic", "min": 5}]]}
    assert why(row(scores={"sieve": 0.1, "aesthetic": 5.0}), **either) == ""
    assert why(row(scores={"sieve": 0.1}), **either) == "sieve below 0.3, no aesthetic score"
    none = {"score": "itm", "threshold": None, "conditions": [{"score": "side", "min": 200}]}
    assert why(row(itm=None, itc=None, scores={"side": 224.0}), **none) == "", "nothing is ranked, so no rank is needed"


def test_sources_and_rules() -> None:
    rule = {"score": "itm", "threshold": 0.4, "sources": ["web"], "rules": {"min_words": 3}}
    assert why(row("synthetic"), **rule) == "synthetic texts are left out"
    assert why(row(), **rule) == "fewer than 3 words"
    assert why(row(text="a cat sits"), **rule) == ""
    assert why(row(text="", reason="caption failed: timeout"), **rule) == "caption failed: timeout"


@given(IMAGES, rules(), st.randoms(use_true_random=False))
def test_policies_keep_what_their_definition_says(rows: list[Annotation], rule: Rule, random: Any) -> None:
    reasons = verdicts_of_image(rows, rule)
    kept = {i for i, reason in enumerate(reasons) if not reason}
    assert kept == kept_by_definition(rows, rule)
    shuffled = random.sample(range(len(rows)), len(rows))
    assert verdicts_of_image([rows[i] for i in shuffled], rule) == [reasons[i] for i in shuffled]
    for one, reason in zip(rows, reasons, strict=True):
        (winner,) = [rows[i] for i in kept] if reason.startswith("a ") else [one]
        if reason.endswith("of the image passes"):
            assert (one.source, rule.keep) == ("synthetic", "web-first")
            assert reason.split()[1] == winner.source != "synthetic"
        elif "ranks higher by" in reason:
            assert reason == f"a {winner.source} text of the image ranks higher by {rule.rank}"
            assert getattr(one, rule.rank) is None or getattr(winner, rule.rank) >= getattr(one, rule.rank)


@given(IMAGES, rules())
def test_best_keeps_what_one_text_of_the_best_would_be(rows: list[Annotation], rule: Rule) -> None:
    """`top_k: 1` differs in one thing: it sets no threshold unless one is given."""
    assume(rule.other_threshold is None)
    best = verdicts_of_image(rows, rule.model_copy(update={"keep": "best", "top_k": 0}))
    first = verdicts_of_image(rows, rule.model_copy(update={"keep": "all", "top_k": 1}))
    assert [not reason for reason in best] == [not reason for reason in first]
    assert (PolicyConfig(keep="best").threshold, PolicyConfig(top_k=1).threshold) == (0.5, None)


def test_what_cannot_be_ranked_says_so() -> None:
    assert why(row(itc=None), score="itm", threshold=0.1, keep="best") == "no itc score"
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


def keep_rate_threshold(scores: Iterable[np.ndarray], rate: float) -> float:
    histogram = Histogram()
    for of_shard in scores:
        histogram.add(of_shard)
    return histogram.threshold(rate)


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


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": "half"}, {"score": "clip"}, {"recall": 1.0}, {"keep_rate": 0}, {"keep_rate": 1.0},
        {"treshold": 1}, {"top_k": -1}, {"top_k": 2, "keep": "best-of"}, {"top_k": 1, "keep": "best"},
        {"combine": "xor"},
        {"threshold": None, "other_threshold": 0.3},
        {"score": "sieve", "other_threshold": 0.3}, {"conditions": [{"score": "sieve"}]},
        {"conditions": [{"score": "sieve", "min": 2}]}, {"conditions": [{"score": "side", "min": 300, "max": 200}]},
        {"conditions": [{"score": "clop", "min": 0}]}, {"conditions": [{"score": "itm", "min": float("nan")}]},
        {"score": "fused"}, {"score": "fused", "fused": {"itc": 1}}, {"score": "fused", "fused": {"itc": 1, "itm": 0}},
        {"score": "fused", "fused": {"sieve": 1, "fused": 1}}, {"shortlist": {"itc": 0}, "top_k": 1},
        {"samples_seen": -1}, {"max_repeats": 0}, {"sources": ["crawl"]},
        {"threshold": "keep-rate", "keep_rate_of": "web", "sources": ["synthetic"]},
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
        ({"score": "itc", "keep": "web-first", "rank": "itm"}, ("itc", "itm")),
        ({"keep": "best"}, ("itm", "itc")),
        ({"threshold": None, "conditions": [{"score": "itm", "min": 0.9}]}, ("itm",)),
        ({"threshold": None, "conditions": [[{"score": "itm", "min": 0.9}, {"score": "itc", "min": 0.9}]]}, ()),
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


# ---- what a user writes ----


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["keep_rate=0.3"], "'keep_rate' is 0.3: it has no effect without threshold=keep-rate; give that too"),
        (["keep_rate=0.5"], "'keep_rate' is 0.5: it has no effect"),  # the default: whoever writes it means something
        (["threshold=0.6", "keep_rate=0.3"], "without threshold=keep-rate"),
        (["recall=0.7"], "'recall' is 0.7: it has no effect without threshold=calibrated"),
        (["threshold=keep-rate", "recall=0.7"], "without threshold=calibrated"),
        (["combine=or"], "'combine' is 'or': it has no effect without other_threshold"),
        (["rank=itm"], "'rank' is 'itm': it has no effect without top_k, keep=web-first or keep=best"),
        (["threshold=1.1"], "'threshold' is 1.1: it is compared with itm, which lies in [0, 1]; give a number there"),
        (["threshold=-0.1"], "compared with itm, which"),
        (["threshold=.nan"], "compared with itm, which"),
        (["score=itc", "threshold=-1.5"], "'threshold' is -1.5: it is compared with itc, which lies in [-1, 1]"),
        (["other_threshold=2"], "'other_threshold' is 2: it is compared with itc, which"),
        (["score=itc", "threshold=0.1", "other_threshold=-0.1"], "'other_threshold' is -0.1: it is compared with itm"),
        (["keep_rate_of=web"], "'keep_rate_of' is 'web': it has no effect without threshold=keep-rate"),
        (["samples_seen=100"], "'samples_seen' is 100: it has no effect without threshold=keep-rate"),
        (["threshold=keep-rate", "max_repeats=2"], "'max_repeats' is 2: it has no effect without samples_seen"),
        (
            ["threshold=keep-rate", "samples_seen=9", "keep_rate=0.3"],
            "no effect without samples_seen=0, which else sets",
        ),
        (["fused={sieve: 1, itm: 1}"], "it has no effect without score=fused, rank=fused or a condition on it"),
        (["normalise=rank"], "'normalise' is 'rank': it has no effect without fused"),
        (["shortlist={sieve: 5}"], "it has no effect without top_k, keep=web-first or keep=best"),
        (["score=sieve", "threshold=1.5"], "'threshold' is 1.5: it is compared with sieve, which lies in [-1, 1]"),
        (["score=seive"], "there is no score 'seive'; there are itm, itc, sieve"),
    ],
)
def test_settings_that_decide_nothing_are_refused(sets: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        configs.build(PolicyConfig, sets)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "sets",
    [
        ["threshold=keep-rate", "keep_rate=0.3"], ["threshold=calibrated", "recall=0.7"], ["top_k=2", "rank=itm"],
        ["threshold=null", "rank=itm"], ["keep=best", "rank=itm"], ["keep=web-first", "rank=itm"],
        ["threshold=keep-rate", "samples_seen=100", "max_repeats=2"], ["score=aesthetic", "threshold=5.5"],
        ["score=fused", "fused={sieve: 1, itm: 1}", "normalise=rank", "threshold=2.5"],
        ["conditions=[{score: fused, min: 0.5}]", "fused={sieve: 1, itm: 1}"],
        ["top_k=1", "rank=fused", "fused={sieve: 1, itm: 1}", "shortlist={sieve: 5}"],
        ["conditions=[{score: side, min: 200}, [{score: sieve, min: 0.2}, {score: itc, min: 0.3}]]"],
        ["rules.min_words=3", "rules.languages=[en]", "sources=web"],
        ["other_threshold=0.2", "combine=or"], ["threshold=0"], ["threshold=1"], ["score=itc", "threshold=-1"],
    ],
)  # fmt: skip
def test_settings_that_decide_something_pass(sets: list[str]) -> None:
    config = configs.build(PolicyConfig, sets)
    record = configs.to_yaml(config)
    assert configs.validate(PolicyConfig, yaml.safe_load(record), "a record") == config


def test_a_source_of_settings_is_not_blamed_for_what_lies_above_it(tmp_path: Path) -> None:
    """A threshold of --set leaves the recall of a recipe without effect, and no one wrote anything in vain."""
    file = tmp_path / "mine.yaml"
    file.write_text("threshold: calibrated\nrecall: 0.7\n")
    assert configs.read(file, PolicyConfig, ["threshold=0.4"]).threshold == 0.4
    above = tmp_path / "above.yaml"
    above.write_text("extends: mine.yaml\nthreshold: 0.4\n")
    assert configs.read(above, PolicyConfig).recall == 0.7
    above.write_text("extends: mine.yaml\nthreshold: 0.4\nrecall: 0.9\n")
    with pytest.raises(
        RecipeError, match=r"above.yaml: 'recall' is 0.9: it has no effect without threshold=calibrated"
    ):
        configs.read(above, PolicyConfig)
    file.write_text("threshold: 0.4\nkeep_rate: 0.5\n")  # a default, as records have them all
    assert configs.read(file, PolicyConfig).threshold == 0.4


def test_the_record_of_a_run_is_a_recipe_too(tmp_path: Path) -> None:
    config = configs.build(PolicyConfig, ["threshold=calibrated", "recall=0.7"])
    file = tmp_path / "recipe.yaml"
    file.write_text(configs.to_yaml(config.model_copy(update={"threshold": 0.4})))
    assert configs.read(file, PolicyConfig).recall == 0.7
    with pytest.raises(RecipeError, match=r"^'recall' is 0\.9"):
        configs.read(file, PolicyConfig, ["recall=0.9"])


def test_a_section_of_a_recipe_is_named_by_its_dotted_key() -> None:
    demo = presets.find("pipelines", "demo", within="bootstrap")
    assert configs.read(demo, BootstrapConfig, ["select.threshold=0.4"]).select.recall == 0.75
    with pytest.raises(RecipeError, match=r"^'select.keep_rate' is 0.3: it has no effect"):
        configs.read(demo, BootstrapConfig, ["select.keep_rate=0.3"])


def test_best_of_is_the_old_name_of_web_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, new = (configs.build(PolicyConfig, [f"keep={name}"]) for name in ("best-of", "web-first"))
    assert old == new
    assert [record.getMessage() for record in caplog.records] == [
        "note: keep=best-of is called web-first now and does the same; keep=best keeps the best text of all"
    ]
    assert (new.keep, new.record()["keep"], new.rule(0.5).record()["keep"]) == ("web-first", "best-of", "best-of")
    assert "keep: web-first" in configs.to_yaml(new)
    assert all(PolicyConfig(keep=name).record()["keep"] == name for name in ("all", "best"))
    file = tmp_path / "old.yaml"
    file.write_text("keep: best-of\n")
    caplog.clear()
    assert configs.read(file, PolicyConfig, ["keep=all"]).keep == "all"
    assert configs.validate(PolicyConfig, {"keep": "best-of"}, "a run's record") == new
    assert not caplog.records
