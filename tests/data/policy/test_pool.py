"""What a policy takes from the whole pool: shares, and the constants of a fused score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.data import annotations
from capfilt.data.annotations import Annotation
from capfilt.data.policy import PolicyConfig, Pool, Resolved, resolve, verdicts_of_image, with_scores
from capfilt.data.policy.pool import Moments
from capfilt.data.policy.quantiles import Histogram
from capfilt.errors import DataError
from tests.data.policy.conftest import MakeRun, row

rng = np.random.default_rng(0)
NUMBER = 60


def pairs(number: int = NUMBER, shards: int = 3) -> list[list[Annotation]]:
    """Images with a web and a synthetic text."""
    rows = [
        [row(source, key=f"{i:03d}", itm=rng.random(), itc=rng.random()) for source in ("synthetic", "web")]
        for i in range(number)
    ]
    size = number // shards
    return [[each for image in rows[s * size : (s + 1) * size] for each in image] for s in range(shards)]


def resolved(run: Path, **policy: Any) -> Resolved:
    names = sorted(path.stem for path in (run / "annotations").iterdir())
    config = PolicyConfig(**policy)
    return resolve(config, Pool(run / "annotations", names, config.sources), None)


def rows_of(run: Path, rule: Any) -> list[Annotation]:
    folder = run / "annotations"
    tables = (with_scores(annotations.read(path), folder, path.stem, rule) for path in sorted(folder.iterdir()))
    return [each for table in tables for each in annotations.rows(table)]


def kept(run: Path, rule: Any) -> list[Annotation]:
    rows = rows_of(run, rule)
    images = [[each for each in rows if each.key == key] for key in sorted({each.key for each in rows})]
    return [
        each for image in images for each, why in zip(image, verdicts_of_image(image, rule), strict=True) if not why
    ]


@pytest.mark.parametrize(
    ("policy", "of", "size", "num_kept"),
    [
        ({}, "texts", 120, 36),
        ({"sources": ["web"]}, "texts", 60, 18),
        ({"sources": "synthetic"}, "texts", 60, 18),
        ({"keep_rate_of": "images", "keep": "best", "rank": "clip-x"}, "images", 60, 18),
        ({"keep_rate_of": "web", "sources": ["web"]}, "web", 60, 18),
    ],
)
def test_a_share_is_exact_over_all_shards(
    make_run: MakeRun, policy: dict[str, Any], of: str, size: int, num_kept: int
) -> None:
    run = make_run(pairs(), {"clip-x": rng.uniform(-1, 1, 2 * NUMBER)})
    found = resolved(run, score="clip-x", threshold="keep-rate", keep_rate=0.3, **policy)
    assert len(kept(run, found.rule)) == num_kept
    if of != "texts":
        assert found.pool == {"of": of, "size": size, "keep_rate": 0.3, "threshold": found.rule.threshold}
    else:
        assert found.pool == {}, "as older runs, whose record has a threshold and no more"


def test_a_score_without_bounds_is_measured_first(make_run: MakeRun) -> None:
    values = rng.normal(5, 30, 2 * NUMBER)
    run = make_run(pairs(), {"aesthetic": values})
    found = resolved(run, score="aesthetic", threshold="keep-rate", keep_rate=0.25)
    wanted = np.sort(values)[-30]
    assert found.rule.threshold == pytest.approx(wanted, abs=np.ptp(values) / 2**18)
    assert len(kept(run, found.rule)) == 30


def test_raw_where_it_is_among_the_best_else_synthetic_above_the_same_number(make_run: MakeRun) -> None:
    """Nguyen et al. 2023: the number is the web texts' alone, and both are compared with it."""
    values = rng.uniform(-1, 1, 2 * NUMBER)
    run = make_run(pairs(), {"clip-x": values})
    fields = {"score": "clip-x", "rank": "clip-x", "threshold": "keep-rate", "keep_rate": 0.3}
    found = resolved(run, **fields, keep="web-first", keep_rate_of="web")
    synthetic, web = values[0::2], values[1::2]
    number = np.sort(web)[-18]
    assert found.rule.threshold == pytest.approx(number, abs=2e-6)
    texts = kept(run, found.rule)
    assert sum(each.source == "web" for each in texts) == 18
    assert sum(each.source == "synthetic" for each in texts) == np.sum((web < number) & (synthetic >= number))


@pytest.mark.parametrize("normalise", ["min-max", "z-score", "rank"])
def test_a_fused_score_is_the_weighted_sum_of_what_the_whole_pool_normalises(make_run: MakeRun, normalise: str) -> None:
    sieve = [None if i % 2 == 0 else value for i, value in enumerate(rng.uniform(0, 1, 2 * NUMBER))]  # web texts alone
    aesthetic = rng.normal(5, 2, 2 * NUMBER)
    run = make_run(pairs(), {"sieve": sieve, "aesthetic": aesthetic})
    found = resolved(
        run, score="fused", threshold="keep-rate", keep_rate=0.2, fused={"sieve": 0.75, "aesthetic": -0.25},
        normalise=normalise,
    )  # fmt: skip
    one = np.array(sieve[1::2], np.float32).astype(float)
    other = aesthetic[1::2].astype(np.float32).astype(float)

    def scaled(values: np.ndarray) -> np.ndarray:
        if normalise == "min-max":
            return (values - values.min()) / np.ptp(values)
        if normalise == "z-score":
            return (values - values.mean()) / values.std()
        return np.array([(values < value).mean() for value in values])

    wanted = 0.75 * scaled(one) - 0.25 * scaled(other)
    rows = rows_of(run, found.rule)
    assert [each.score("fused") for each in rows if each.source == "synthetic"] == [None] * NUMBER
    got = [each.score("fused") for each in rows if each.source == "web"]
    assert got == pytest.approx(wanted.tolist(), abs=2 / NUMBER if normalise == "rank" else 1e-6)
    assert len(kept(run, found.rule)) == 12
    terms = {term["score"]: term for term in found.pool["fused"]}
    assert (terms["sieve"]["at"][0], terms["sieve"]["at"][-1]) == pytest.approx((one.min(), one.max()), abs=4e-6)
    assert found.pool["size"] == NUMBER


def test_a_score_that_is_the_same_everywhere_adds_nothing(make_run: MakeRun) -> None:
    sieve = rng.uniform(0, 1, 2 * NUMBER)
    run = make_run(pairs(), {"sieve": sieve, "side": [224.0] * (2 * NUMBER)})
    for normalise in ("min-max", "z-score", "rank"):
        found = resolved(run, score="fused", threshold=0.5, fused={"sieve": 1.0, "side": 5.0}, normalise=normalise)
        assert [each.score("fused") for each in rows_of(run, found.rule)] == pytest.approx(
            [
                each.score("fused")
                for each in rows_of(run, found.rule.model_copy(update={"fused": found.rule.fused[:1]}))
            ]
        )


@pytest.mark.parametrize(
    ("samples", "repeats", "share"),
    [(96, 4.0, 0.2), (96, 2.0, 0.4), (480, 4.0, 1.0), (10**9, 4.0, 1.0), (1, 4.0, 1 / 480)],
)
def test_a_budget_chooses_the_share(make_run: MakeRun, samples: int, repeats: float, share: float) -> None:
    run = make_run(pairs())
    found = resolved(run, threshold="keep-rate", samples_seen=samples, max_repeats=repeats)
    assert found.pool["keep_rate"] == pytest.approx(share)
    assert found.pool["size"] == 120
    num_kept = len(kept(run, found.rule))
    assert num_kept == max(1, round(share * 120))
    if share < 1:
        assert found.pool["repeats"] == pytest.approx(repeats)
    else:
        assert found.pool["repeats"] == pytest.approx(samples / 120)


def test_only_the_columns_that_are_needed_are_read(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from capfilt.data import parquet

    read, real = [], parquet.read
    monkeypatch.setattr(
        parquet, "read", lambda path, columns=None, chosen=None: read.append(columns) or real(path, columns)
    )
    run = make_run(pairs(6, 1), {"sieve": [0.5] * 12})
    resolved(run, threshold="keep-rate")
    resolved(run, threshold="keep-rate", sources=["web"], keep_rate_of="images")
    assert read == [["itm"], ["itm", "source", "key"]]


def test_a_pool_without_the_scores_says_so(make_run: MakeRun) -> None:
    run = make_run(pairs(6, 1), {"sieve": [0.5, None] * 6, "side": [None, 1.0] * 6})
    with pytest.raises(DataError, match="no text has all of sieve, side"):
        resolved(run, score="fused", fused={"sieve": 1, "side": 1})
    with pytest.raises(DataError, match="no text has a score"):
        resolved(run, score="sieve", threshold="keep-rate", sources=["human"])
    with pytest.raises(DataError, match="has no nsfw"):
        resolved(run, score="nsfw", threshold="keep-rate")


@given(
    st.lists(st.integers(-(10**4), 10**4).map(lambda n: n / 64), min_size=1, max_size=50), st.floats(0.01, 1),
    st.sampled_from([(-200, 200), (-160.5, 157.25), (-300, 1000)]),
)  # fmt: skip
def test_a_histogram_keeps_enough_and_no_more_than_ties_ask(
    values: list[float], share: float, ends: tuple[float, float]
) -> None:
    histogram = Histogram(*ends)
    histogram.add(np.array(values))
    threshold, wanted = histogram.threshold(share), max(1, round(share * len(values)))
    assert np.sum(np.array(values) >= threshold) >= wanted
    assert np.sum(np.array(values) > threshold + (ends[1] - ends[0]) / 2**18) < wanted


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=9), max_size=6))
def test_moments_are_those_of_all_values(parts: list[list[float]]) -> None:
    moments, values = Moments(), np.array([value for part in parts for value in part])
    for part in parts:
        moments.add(np.array(part))
    assert moments.number == len(values)
    if len(values):
        assert (moments.low, moments.high) == (values.min(), values.max())
        assert moments.mean == pytest.approx(values.mean(), abs=1e-9)
        assert moments.squares / len(values) == pytest.approx(values.var(), abs=1e-6)
