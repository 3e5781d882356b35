from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.survey import draw


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Ten shards of 20 to 29 samples; the bytes are no pictures, which nobody looks at here."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(10):
        made = [Sample(f"{shard}-{i:03d}", b"x" * 3000, "jpg", "a text", {}) for i in range(20 + shard)]
        shards.write(folder / f"{shard:05d}.tar", made)
    return shards.expand(str(folder))


def test_a_draw_is_the_seed_s_and_each_sample_comes_once(urls: list[str]) -> None:
    first, again, other = (draw(urls, 60, seed, 10) for seed in (0, 0, 1))
    assert first == again
    keys = [item.key for _, item in first.items]
    assert len(set(keys)) == 60
    assert set(keys) != {item.key for _, item in other.items}
    assert first.is_census
    assert first.num_samples == sum(range(20, 30)) == sum(first.counts.values())
    assert keys != sorted(keys), "in random order"


def test_every_sample_is_as_likely(urls: list[str]) -> None:
    drawn = Counter(item.key for seed in range(30) for _, item in draw(urls[:4], 43, seed, 4).items)
    assert len(drawn) == sum(range(20, 24))
    assert min(drawn.values()) >= 4, "expected are 15 of 30, give or take 2.7"
    assert max(drawn.values()) <= 26


def test_of_many_shards_some_are_read_and_the_rest_is_estimated(urls: list[str]) -> None:
    some = draw(urls, 30, 3, 4)
    assert len(some.counts) == len({url for url, _ in some.items}) == 4
    assert not some.is_census
    assert some.num_samples == pytest.approx(245, rel=0.05)
    beginnings = draw(urls, 30, 3, 4, first=10)
    assert list(beginnings.counts.values()) == [10] * 4
    assert beginnings.num_samples == pytest.approx(245, rel=0.15), "by the bytes of what was read"
    assert all(int(item.key[-3:]) < 10 for _, item in beginnings.items)


def test_what_cannot_be_read_is_drawn_too(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"no tar at all, and longer than a header " * 100)
    drawn = draw(shards.expand(str(tmp_path)), 5, 0, 3)
    assert [type(item) for _, item in drawn.items] == [FailedSample]
