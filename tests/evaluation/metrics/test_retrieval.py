"""Recalls against brute force over every order of the tied candidates, and BLIP's two stages against a
loop."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from capfilt.errors import DataError, ModelError, UsageError
from capfilt.evaluation.metrics import retrieval


def slow_share(scores: list[float], right: set[int], k: int) -> float:
    """Share of the orders that sort the scores downwards that have a right candidate among the first k."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return sum(bool(right & set(order[:k])) for order in orders) / len(orders)


def slow_recalls(scores_IT: np.ndarray, image_of_text: list[int]) -> dict[str, float]:
    num_images, num_texts = scores_IT.shape
    figures = {}
    for k in (1, 5, 10):
        row = {i: {t for t in range(num_texts) if image_of_text[t] == i} for i in range(num_images)}
        texts = [slow_share(scores_IT[i].tolist(), row[i], k) for i in range(num_images) if row[i]]
        images = [slow_share(scores_IT[:, t].tolist(), {image_of_text[t]}, k) for t in range(num_texts)]
        figures[f"tr@{k}"] = 100 * sum(texts) / len(texts)
        figures[f"ir@{k}"] = 100 * sum(images) / len(images)
    return figures


@st.composite
def problems(
    draw, max_images: int = 4, max_texts: int = 6, low: int = -2, high: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    num_images = draw(st.integers(1, max_images))
    num_texts = draw(st.integers(1, max_texts))
    scores = draw(hnp.arrays(np.float32, (num_images, num_texts), elements=st.integers(low, high).map(float)))
    return scores, draw(hnp.arrays(np.int64, num_texts, elements=st.integers(0, num_images - 1)))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_recalls_average_over_every_order_of_the_ties(problem) -> None:
    scores_IT, image_of_text = problem
    assert retrieval.recalls(scores_IT, image_of_text) == pytest.approx(slow_recalls(scores_IT, image_of_text.tolist()))


def test_recalls_by_hand() -> None:
    # 12 images of 2 texts: image i has its first text at place i and its second last; text t has its image
    # at place t // 2.
    num_images = 12
    i2t, t2i = np.zeros((num_images, 24)), np.zeros((num_images, 24))
    image_of_text = np.repeat(np.arange(num_images), 2)
    for i in range(num_images):
        others = [t for t in range(24) if t // 2 != i]
        i2t[i, [*others[:i], 2 * i, *others[i:], 2 * i + 1]] = np.arange(24, 0, -1)
    for t in range(24):
        others = [i for i in range(num_images) if i != t // 2]
        t2i[[*others[: t // 2], t // 2, *others[t // 2 :]], t] = np.arange(num_images, 0, -1)
    share = [100 * k / 12 for k in (1, 5, 10)]
    expected = dict(zip(("tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10"), share * 2, strict=True))
    assert retrieval.recalls(i2t, image_of_text, t2i) == pytest.approx(expected)


def test_one_of_several_own_captions_is_a_full_hit() -> None:
    scores = np.array([[5.0, 0, 0, 0, 0, 9, 9, 9, 9], [0.0, 0, 0, 0, 0, 1, 2, 3, 4]])
    image_of_text = np.array([0, 0, 0, 0, 0, 1, 1, 1, 1])
    figures = retrieval.recalls(scores, image_of_text)
    assert (figures["tr@1"], figures["tr@5"]) == (50.0, 100.0)


@pytest.mark.parametrize("value", [0.0, 1.0, -np.inf])
def test_a_constant_matrix_scores_chance(value: float) -> None:
    figures = retrieval.recalls(np.full((20, 100), value), np.repeat(np.arange(20), 5))
    assert [figures[f"ir@{k}"] for k in (1, 5, 10)] == pytest.approx([5.0, 25.0, 50.0])
    draws = np.cumprod([(95 - j) / (100 - j) for j in range(10)])
    assert [figures[f"tr@{k}"] for k in (1, 5, 10)] == pytest.approx([100 * (1 - draws[k - 1]) for k in (1, 5, 10)])


@settings(max_examples=60, deadline=None)
@given(problems(20, 30, -9, 9), st.randoms(use_true_random=False))
def test_neither_the_order_nor_the_scale_matters(problem, random) -> None:
    scores_IT, image_of_text = problem
    before = retrieval.recalls(scores_IT, image_of_text)
    images = random.sample(range(scores_IT.shape[0]), scores_IT.shape[0])
    texts = random.sample(range(scores_IT.shape[1]), scores_IT.shape[1])
    moved = retrieval.recalls(scores_IT[np.ix_(images, texts)], np.argsort(images)[image_of_text[texts]])
    assert moved == pytest.approx(before)
    assert retrieval.recalls(scores_IT**3 * 2 - 7, image_of_text) == before
    assert all(
        0 <= before[f"{way}@1"] <= before[f"{way}@5"] <= before[f"{way}@10"] <= 100 + 1e-9 for way in ("tr", "ir")
    )


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).integers(0, 9, (17, 40)).astype(np.float32)
    image_of_text = np.random.default_rng(1).integers(0, 17, 40)
    whole = retrieval.recalls(scores, image_of_text)
    monkeypatch.setattr(retrieval, "_BLOCK_CELLS", 100)
    assert retrieval.recalls(scores, image_of_text) == whole


def test_an_image_without_texts_only_distracts() -> None:
    scores = np.array([[1.0, 0.0], [9.0, 9.0], [0.0, 1.0]])
    figures = retrieval.recalls(scores, np.array([0, 2]))
    assert (figures["tr@1"], figures["ir@1"], figures["ir@5"]) == (100.0, 0.0, 100.0)


def test_no_texts_no_figures() -> None:
    assert retrieval.recalls(np.zeros((3, 0)), np.zeros(0, np.int64)) == {}


def test_what_has_no_rank_is_refused() -> None:
    scores = np.zeros((2, 3))
    owner = np.array([0, 1, 1])
    hole = np.array([[0, 0, 0], [0, np.nan, 0]])
    for matrices in ((hole, None), (scores, hole)):
        with pytest.raises(ModelError, match="retrieval scores are NaN"):
            retrieval.recalls(matrices[0], owner, matrices[1])
    with pytest.raises(DataError, match="transpose"):
        retrieval.recalls(scores, owner, scores.T)
    with pytest.raises(DataError, match="each of 3 texts"):
        retrieval.recalls(scores, owner[:2])
    with pytest.raises(DataError, match="names image 2; the scores have images 0 to 1"):
        retrieval.recalls(scores, np.array([0, 1, 2]))
    with pytest.raises(DataError, match="names image -1"):
        retrieval.recalls(scores, np.array([0, 1, -1]))
    with pytest.raises(DataError, match="holds float64"):
        retrieval.recalls(scores, owner.astype(float))


@pytest.mark.parametrize("top_k", [1, 3, 99])
def test_rerank_is_itm_plus_itc_for_each_querys_candidates(top_k: int) -> None:
    rng = np.random.default_rng(top_k)
    itc = rng.uniform(-1, 1, (6, 9)).astype(np.float32)
    logits = rng.normal(0, 3, (6, 9)).astype(np.float32)
    calls: list[tuple[int, int]] = []

    def itm(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
        calls.extend(zip(images.tolist(), texts.tolist(), strict=True))
        return logits[images, texts]

    i2t, t2i = retrieval.rerank(itc, top_k, itm)
    expected_i2t, expected_t2i = np.full((6, 9), -100.0, np.float32), np.full((6, 9), -100.0, np.float32)
    for i in range(6):
        for t in sorted(range(9), key=lambda t: -itc[i, t])[:top_k]:
            expected_i2t[i, t] = logits[i, t] + itc[i, t]
    for t in range(9):
        for i in sorted(range(6), key=lambda i: -itc[i, t])[:top_k]:
            expected_t2i[i, t] = logits[i, t] + itc[i, t]
    np.testing.assert_array_equal(i2t, expected_i2t)
    np.testing.assert_array_equal(t2i, expected_t2i)
    assert calls == sorted(set(calls))  # each pair once, image by image
    assert set(calls) == {(i, t) for i in range(6) for t in range(9) if max(i2t[i, t], t2i[i, t]) > -100}


def test_rerank_lets_itm_correct_itc() -> None:
    itc = np.array([[0.5, 0.6], [0.6, 0.5]])
    owner = np.array([0, 1])
    assert retrieval.recalls(itc, owner)["tr@1"] == 0
    i2t, t2i = retrieval.rerank(itc, 2, lambda images, texts: np.where(images == texts, 4.0, -4.0))
    assert retrieval.recalls(i2t, owner, t2i)["tr@1"] == retrieval.recalls(i2t, owner, t2i)["ir@1"] == 100


def test_rerank_refuses_what_it_cannot_order() -> None:
    itc = np.zeros((2, 2))
    with pytest.raises(UsageError, match="top_k is 0"):
        retrieval.rerank(itc, 0, lambda images, texts: images * 1.0)
    with pytest.raises(DataError, match=r"shape \(2,\)"):
        retrieval.rerank(itc[0], 1, lambda images, texts: images * 1.0)
    with pytest.raises(ModelError, match="1 of 1 ITC scores are NaN"):
        retrieval.rerank(np.array([[np.nan]]), 1, lambda images, texts: images * 1.0)
    with pytest.raises(ModelError, match="ITM logits are NaN"):
        retrieval.rerank(itc, 1, lambda images, texts: images * np.nan)
    with pytest.raises(ModelError, match=r"logits of shape \(3, 2\)"):
        retrieval.rerank(itc, 1, lambda images, texts: np.zeros((images.size, 2)))


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = retrieval.recalls(np.array([[-np.inf, 1.0], [np.inf, 0.0]]), np.array([1, 0]))
    assert found["tr@1"] == found["ir@1"] == 100.0
