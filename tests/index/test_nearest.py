"""The nearest references, against a loop over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.index import nearest
from capfilt.index.nearest import NOTHING, nearest_hashes, nearest_vectors

HASHES = st.lists(st.sampled_from([0, 1, 3, 7, 2**63, 2**64 - 1, 0x0F0F]) | st.integers(0, 2**64 - 1), max_size=12)


@given(HASHES, HASHES, st.integers(0, 64), st.integers(1, 40))
def test_the_nearest_hash_is_that_of_a_loop(
    queries: list[int], references: list[int], radius: int, at_once: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "PAIRS_AT_ONCE", at_once)
        rows, bits = nearest_hashes(np.array(queries, np.uint64), np.array(references, np.uint64), radius)
    for query, row, distance in zip(queries, rows, bits, strict=True):
        all_bits = [(query ^ reference).bit_count() for reference in references]
        if min(all_bits, default=65) > radius:
            assert row == NOTHING
            assert np.isnan(distance)
        else:
            assert (row, distance) == (all_bits.index(min(all_bits)), min(all_bits))


@given(st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(0, 9), st.floats(-1, 1), st.integers(1, 40))
def test_the_nearest_vector_is_that_of_a_loop(
    seed: int, queries: int, references: int, least: float, at_once: int
) -> None:
    generator = np.random.default_rng(seed)
    few = generator.normal(size=(6, 5))  # drawn with replacement: equal vectors are among them
    units = (few / np.linalg.norm(few, axis=1, keepdims=True)).astype(np.float16)
    asked, known = units[generator.integers(6, size=queries)], units[generator.integers(6, size=references)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest, "PAIRS_AT_ONCE", at_once)
        rows, cosines = nearest_vectors(asked, known, least)
    for query, row, cosine in zip(asked, rows, cosines, strict=True):
        wanted = [exact(query.astype(np.float64), one.astype(np.float64)) for one in known]
        if max(wanted, default=-2) < least:
            assert row == NOTHING
            assert np.isnan(cosine)
        else:
            assert (row, cosine) == (wanted.index(max(wanted)), max(wanted))


def exact(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.sqrt((one * one).sum() * (other * other).sum()))


def test_the_size_of_a_block_does_not_change_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 64))
    units = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    whole = nearest_vectors(units, units[:100], 0.2)
    monkeypatch.setattr(nearest, "PAIRS_AT_ONCE", 700)
    for one, other in zip(whole, nearest_vectors(units, units[:100], 0.2), strict=True):
        assert one.tobytes() == other.tobytes()
