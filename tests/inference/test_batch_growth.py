from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from capfilt.inference import batch_growth
from capfilt.inference.batch_growth import BatchSize
from capfilt.inference.config import AnnotateConfig
from capfilt.pipelines.bootstrap.config import RoundAnnotateConfig


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_growth, "has_room", lambda: True)


def sizes(size: BatchSize, seconds: Callable[[int], float], fits: int = 10**6, batches: int = 40) -> list[int]:
    """The sizes of the batches of a worker whose device takes so long for one."""
    found = []
    for _ in range(batches):
        found.append(size.size)
        size.note(size.size, seconds(size.size), None if size.size <= fits else size.size // 2)
    return found


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        (lambda _: 1.0, 512),  # the host starts kernels all the time
        (lambda count: float(count), 64),  # the device computes all the time
        (lambda count: max(1.0, count / 256), 256),
        (lambda count: 1.0 if count <= 128 else 1.92, 128),  # twice as many are 4 % faster
    ],
)
def test_batches_grow_as_long_as_that_is_faster(seconds: Callable[[int], float], best: int) -> None:
    size = BatchSize(64, grows=True)
    found = sizes(size, seconds)
    assert found[-1] == best
    assert not size.grows
    assert found == sorted(found[:20]) + [best] * 20 or max(found) == 2 * best


def test_where_memory_runs_out_the_half_stays() -> None:
    found = sizes(BatchSize(64, grows=True), lambda _: 1.0, fits=150)
    assert found == [64] * 4 + [128] * 4 + [256] + [128] * 31


@pytest.mark.parametrize("size", [64, 256])
def test_what_memory_of_a_moment_allows_is_not_below_the_default_for_good(size: int) -> None:
    """A neighbour on the device may let go of what it holds: `OomBackoff` does the default in pieces until then."""
    now = BatchSize(64, grows=True)
    now.size = size
    now.note(size, 1.0, limit=1)
    assert (now.size, now.grows) == (64, False)


def test_others_on_the_device_keep_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_growth, "has_room", lambda: False)
    assert set(sizes(BatchSize(64, grows=True), lambda _: 1.0)) == {64}


def test_the_first_batch_of_a_size_and_those_of_another_are_of_no_account() -> None:
    size = BatchSize(64, grows=True)
    size.note(64, 100.0, None)
    for count in (64, 17, 64, 32, 64):
        assert size.size == 64
        size.note(count, 1.0, None)
    assert size.size == 128


def test_a_batch_with_a_broken_picture_counts() -> None:
    """Of 512 pictures from the web one often cannot be read, and a size that is never measured would stay."""
    size = BatchSize(64, grows=True)
    for count in (64, 63, 62, 63):
        size.note(count, 1.0, None)
    assert size.size == 128


def test_what_is_set_stays() -> None:
    assert set(sizes(BatchSize(64, grows=False), lambda _: 1.0)) == {64}


def test_what_a_recipe_does_not_set_is_not_set_in_a_round_either() -> None:
    """Nor where a job travels to its worker."""
    given = RoundAnnotateConfig(captions=2, scores=("side",)).whole
    assert given == AnnotateConfig(captions=2)
    assert pickle.loads(pickle.dumps(given)).model_fields_set == {"captions"}
