"""Pairs of hashes within a radius, against every comparison."""

from __future__ import annotations

import numpy as np
import pytest

from capfilt.index import hamming


def planted(num: int, radius: int) -> np.ndarray:
    """Random hashes; a third are copies of others with 0 to radius + 1 bits flipped."""
    draw = np.random.default_rng(radius)
    hashes = draw.integers(0, 2**64, num, dtype=np.uint64)
    copies = hashes[draw.integers(0, num * 2 // 3, num // 3)]
    for row in range(len(copies)):
        for bit in draw.choice(64, draw.integers(0, radius + 2), replace=False):
            copies[row] ^= np.uint64(1) << np.uint64(bit)
    hashes[-len(copies) :] = copies
    return hashes


def every_comparison(hashes: np.ndarray, radius: int) -> set[tuple[int, int, int]]:
    equal = hamming.stars(hashes, np.arange(len(hashes)))
    found = {(int(a), int(b), 0) for a, b in zip(equal.pairs.a, equal.pairs.b, strict=True)}
    for place, hub in enumerate(equal.hubs):
        bits = np.bitwise_count(equal.values ^ equal.values[place])
        for other in np.flatnonzero((bits > 0) & (bits <= radius)):
            found.add((*sorted((int(hub), int(equal.hubs[other]))), int(bits[other])))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("radius", range(13))
def test_no_pair_is_missed_or_given_twice(radius: int) -> None:
    hashes = planted(600, radius)
    a, b, distance = hamming.near_pairs(hashes, np.arange(len(hashes)), radius)
    got = list(zip(a.tolist(), b.tolist(), distance.astype(int).tolist(), strict=True))
    assert len(set(got)) == len(got)
    assert len(got) > 100
    assert set(got) == every_comparison(hashes, radius)


@pytest.mark.parametrize("radius", range(1, 13))
def test_any_bits_within_the_radius_leave_a_table_untouched(radius: int) -> None:
    """The pigeonhole for the worst case too: flipped bits spread over as many bands as they can."""
    tables = hamming.masks(radius)
    draw = np.random.default_rng(0)
    for _ in range(300):
        flipped = sum(1 << int(bit) for bit in draw.choice(64, radius, replace=False))
        assert any(int(mask) & flipped == 0 for mask in tables)
    spread = sum(1 << (i * 64 // radius) for i in range(radius))
    assert any(int(mask) & spread == 0 for mask in tables)


def test_a_million_equal_hashes_are_a_star() -> None:
    pairs = hamming.near_pairs(np.full(1_000_000, 7, np.uint64), np.arange(1_000_000), 3)
    assert len(pairs.a) == 999_999
    assert not pairs.a.any()
    assert not pairs.distance.any()


def test_partitions_keep_together_what_has_a_key() -> None:
    hashes = planted(600, 3)
    for mask in hamming.masks(3):
        where = dict(zip((hashes & mask).tolist(), hamming.partition(hashes, mask).tolist(), strict=True))
        assert hamming.partition(hashes, mask).tolist() == [where[key] for key in (hashes & mask).tolist()]
        assert len(set(where.values())) > 100
        assert max(where.values()) < hamming.PARTITIONS
