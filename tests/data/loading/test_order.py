from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.data.loading.order import RowOrder, Span
from capfilt.errors import DataError

Row = tuple[str, int]


def read(epoch: int, span: Span) -> Iterator[Row]:
    return ((span.url, i) for i in range(span.first, span.first + span.count))


def order(sizes: list[int], lanes: int = 4, seed: int = 0, repeat: float = 1) -> RowOrder:
    rows = {f"s{i}": size for i, size in enumerate(sizes)}
    return RowOrder([(list(rows), repeat)], rows, lanes, seed)


def epoch_rows(order: RowOrder, epoch: int) -> list[list[Row]]:
    """Each lane's rows of an epoch, in the order in which they are read."""
    return [[row for span in order.spans(lane, epoch) for row in read(epoch, span)] for lane in range(order.lanes)]


sizes = st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any)


@given(sizes, st.integers(1, 7), st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_has_every_row_once_in_lanes_of_like_length(
    sizes: list[int], lanes: int, seed: int, epoch: int
) -> None:
    made = order(sizes, lanes, seed)
    parts = epoch_rows(made, epoch)
    assert Counter(row for part in parts for row in part) == Counter(
        (f"s{i}", row) for i, size in enumerate(sizes) for row in range(size)
    )
    assert [len(part) for part in parts] == [made.length(lane, epoch) for lane in range(lanes)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(sizes, st.integers(1, 5), st.integers(1, 12), st.integers(0, 200))
def test_a_walk_goes_on_from_any_row_as_if_it_had_never_stopped(
    sizes: list[int], lanes: int, window: int, position: int
) -> None:
    made = order(sizes, lanes)
    for lane in range(lanes):
        whole = list(islice(made.walk(lane, 0, window, read), position + 20))
        rest = list(islice(order(sizes, lanes).walk(lane, position, window, read), 20))
        assert rest == whole[position:]


@given(sizes, st.integers(1, 5), st.integers(1, 12))
def test_a_walk_is_the_segments_shuffled_within_windows(sizes: list[int], lanes: int, window: int) -> None:
    made = order(sizes, lanes)
    for lane in range(lanes):
        walk = made.walk(lane, 0, window, read)
        for epoch in range(3):
            straight = epoch_rows(made, epoch)[lane]
            found = list(islice(walk, len(straight)))
            assert Counter(found) == Counter(straight)
            assert all(abs(straight.index(row) - place) < max(window, 2) for place, row in enumerate(found))


def test_lanes_keep_step_however_long_it_goes_on() -> None:
    """Where lanes do not divide the rows, who has the longer segment changes, so that none runs ahead."""
    made = order([7, 3, 13], lanes=5)
    begun = [sum(made.length(lane, epoch) for epoch in range(100)) for lane in range(5)]
    assert sum(begun) == 2300
    assert max(begun) - min(begun) <= 1


@pytest.mark.parametrize("repeat", [0.3, 1, 2.5])
def test_a_place_is_found_without_the_order_of_what_lies_before(repeat: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that is resumed in its thousandth epoch shuffles that one alone."""
    made, shuffled = order([3, 1, 4, 1, 5], lanes=2, repeat=repeat), list[int]()
    whole = RowOrder.shards
    monkeypatch.setattr(RowOrder, "shards", lambda self, epoch: shuffled.append(epoch) or whole(self, epoch))
    epoch, _ = made.locate(1, 7000)
    assert epoch > 300
    next(made.walk(1, 7000, 4, read))
    assert shuffled == [epoch]


def test_other_seeds_and_epochs_have_other_orders() -> None:
    found = [order([10] * 20, seed=seed).shards(epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(one) for one in found}) == 4
    assert order([10] * 20).shards(1) == found[1]


def test_large_windows_shuffle_a_lane_and_windows_of_one_do_not() -> None:
    made = order([40], lanes=1)
    assert list(islice(made.walk(0, 0, 1, read), 40)) == epoch_rows(made, 0)[0]
    shuffled = list(islice(made.walk(0, 0, 40, read), 40))
    assert shuffled != epoch_rows(made, 0)[0]


@pytest.mark.parametrize(("repeat", "turns"), [(2, [2, 2]), (0.2, [0, 1]), (1.5, [1, 2])])
def test_a_source_may_be_walked_several_times_or_in_part(repeat: float, turns: list[int]) -> None:
    made = order([3] * 10, repeat=repeat)
    for epoch in range(5):
        counts = Counter(made.shards(epoch))
        assert all(turns[0] <= counts[f"s{i}"] <= turns[1] for i in range(10))
        assert counts.total() == 10 * repeat
    several = Counter(url for epoch in range(10) for url in made.shards(epoch))
    assert set(several.values()) == {10 * repeat}  # parts go round: ten epochs have had every shard as often


def test_sources_are_mixed() -> None:
    rows = {"a": 4, "b": 4, "c": 2}
    made = RowOrder([(["a", "b"], 1), (["c"], 3)], rows, 1, 0)
    assert Counter(made.shards(0)) == {"a": 1, "b": 1, "c": 3}
    assert made.length(0, 0) == 14


def test_shards_without_a_row_are_refused() -> None:
    with pytest.raises(DataError, match="no readable pair in 2 shards, first s0"):
        order([0, 0])
