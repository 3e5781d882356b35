"""Lists: the same bytes whatever computes them, and of two near vectors one visits the list of the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from capfilt.index import lists, pairs, units
from capfilt.index.near import Near


def vectors(num: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    """float16 unit vectors around twenty centres, a third near others."""
    draw = np.random.default_rng(seed)
    made = draw.standard_normal((20, dim))[draw.integers(0, 20, num)] + 0.7 * draw.standard_normal((num, dim))
    made[::3] = made[draw.integers(0, num, len(made[::3]))] + 0.2 * draw.standard_normal((len(made[::3]), dim))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("within", [0.02, 0.1])
def test_no_near_pair_is_lost_where_every_list_may_be_visited(within: float) -> None:
    """The proof of `assign`, with as many probes as lists."""
    all_vectors = vectors(900)
    rows, near = np.arange(900), Near(kind="vector", within=within)
    nearest = lists.Nearest(lists.train(all_vectors, 40, 0))
    keys, records = lists.records(rows, lists.assign(nearest, all_vectors, within, 40), all_vectors)
    order = np.argsort(keys, kind="stable")
    a, b, distance = units.join(near, keys[order], records[order])
    wanted = units.pairs_in_memory(near, all_vectors, rows)
    assert len(wanted.a) > 150
    assert np.array_equal(np.stack([a, b]), np.stack([wanted.a, wanted.b]))
    assert distance.tobytes() == wanted.distance.tobytes()
    assert len(records) < 900 * 20, "lists that are too far away are not visited"


def test_a_list_in_parts_gives_the_pairs_of_the_whole() -> None:
    all_vectors = vectors(300)
    whole = units.pairs_in_memory(Near(kind="vector", within=0.1), all_vectors, np.arange(300))
    records = lists.records(np.arange(300), np.zeros((300, 1), np.int32), all_vectors)[1]
    parts = [records[start : start + 100] for start in (0, 100, 200)]
    found = [pairs.pairs_of_list(0, parts[i], None if i == j else parts[j], 0.1) for i in range(3) for j in range(i, 3)]
    joined = pairs.Pairs.concat(found)
    assert set(zip(whole.a, whole.b, strict=True)) <= set(zip(joined.a, joined.b, strict=True))
    assert len(joined.a) - len(whole.a) < 0.2 * len(whole.a), "equal vectors of two parts are compared again, no others"


_DIGEST = """
import hashlib, sys
sys.path[:0] = [sys.argv[1]]
from test_lists import vectors
from capfilt.index import lists
many = vectors(6000, 48)
centroids = lists.train(many, 120, 0)
assigned = lists.assign(lists.Nearest(centroids), many, 0.05, 4)
print(hashlib.sha256(centroids.tobytes() + assigned.tobytes()).hexdigest())
"""


def test_threads_and_the_kernels_of_blas_do_not_change_a_byte() -> None:
    """faiss and numpy bring an OpenBLAS each; another core type rounds in another order."""
    digests = set()
    for settings in ({"OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "3", "OPENBLAS_CORETYPE": "Haswell"}):
        words = [sys.executable, "-c", _DIGEST, str(Path(__file__).parent)]
        done = subprocess.run(words, env={"PATH": "/usr/bin:/bin", **settings}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1


def test_the_number_of_lists() -> None:
    sizes = {49_999: 1, 50_000: 894, 100_000: 1264, 1_000_000: 16_384, 10_000_001: 65_536, 10**9: 131_072}
    assert {rows: lists.num_lists(rows) for rows in sizes} == sizes


def test_a_radius_that_keeps_one_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MAX_PAIRS", 1000)
    with pytest.raises(pairs.DataError, match=r"more than 1,000 pairs of 300 vectors .* one would stand for most"):
        units.pairs_in_memory(Near(kind="vector", within=0.9), vectors(300), np.arange(300))
