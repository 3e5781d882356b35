from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

from capfilt.data import shards
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import FailedSample, Sample
from capfilt.errors import ShardError
from capfilt.inference.batches import Pictures, batches_of
from capfilt.stages.inputs import ShardsJob
from capfilt.stages.shard_reading import ReadAhead, ShardReading

FORMAT = ImageFormat(8)
BATCH = 4
MOST = 4 * BATCH + 1
"""Samples of a shard that may be in memory."""


class Job(ShardsJob):
    name: str = "annotate"

    def identity(self, item: str) -> str:
        return f"identity of {shards.name(item)}"


class Reader:
    """A worker's reading, which notes what was read when."""

    def __init__(self, folder: Path):
        self.read: list[str] = []
        self.ahead = ReadAhead(Job(out=folder), self.decode)

    def decode(self, reading: ShardReading, read: Iterable[Sample | FailedSample]) -> Iterator[Pictures]:
        def noted() -> Iterator[Sample | FailedSample]:
            for item in read:
                self.read.append(f"{shards.name(reading.url)} {item.key}")
                yield item

        return batches_of(noted(), BATCH, [FORMAT], threads=2)

    def of(self, name: str) -> int:
        return sum(one.startswith(name) for one in self.read)


@pytest.fixture
def urls(tmp_path: Path, picture: Callable[..., bytes]) -> list[str]:
    """Three shards of thirty pictures."""
    for shard in range(3):
        samples = [Sample(f"{i:03}", picture("PNG", seed=100 * shard + i), "png", "a ring") for i in range(30)]
        shards.write(tmp_path / f"{shard}.tar", samples)
    return [str(tmp_path / f"{shard}.tar") for shard in range(3)]


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "loader"))] == []


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not met() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert met()


def test_the_next_shard_is_begun_when_this_one_is_read_and_no_more_than_its_first_batches(
    tmp_path: Path, urls: list[str]
) -> None:
    reader = Reader(tmp_path)
    reader.ahead.expect(urls[1])
    with reader.ahead.shard(urls[0]) as reading:
        next(reading.batches)
        time.sleep(0.1)
        assert 0 < reader.of("0") <= MOST
        assert reader.of("1") == 0, "this one is not read yet"
        rest = list(reading.batches)
        wait_until(lambda: reader.of("1") >= 3 * BATCH)
        time.sleep(0.1)
        assert reader.of("1") <= MOST - BATCH, "nobody has taken a batch"
    reader.ahead.expect(urls[2])
    with reader.ahead.shard(urls[1]) as reading:
        assert reader.of("2") == 0
        batches = list(reading.batches)
    assert reader.of("0") == reader.of("1") == 30, "each is read once"
    wait_until(lambda: reader.of("2") > 0)
    reader.ahead.close()
    assert len(rest) + 1 == len(batches) == 8


def test_what_was_read_ahead_is_what_would_have_been_read(tmp_path: Path, urls: list[str]) -> None:
    found = []
    for ahead in (True, False):
        reader, own = Reader(tmp_path), list[object]()
        for number, url in enumerate(urls):
            reader.ahead.expect(urls[number + 1] if ahead and number < 2 else None)
            with reader.ahead.shard(url) as reading:
                for batch in reading.batches:
                    own += [[sample.uid for sample in batch.samples], batch.pixels[FORMAT.resizing]]
            read = reading.digest.result()
            assert read is not None
            assert read.sha256 == hashlib.sha256(Path(url).read_bytes()).hexdigest()
            own += [read, reading.identity, dict(reading.members)]
        found.append(own)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*found, strict=True))


def test_an_error_comes_with_its_own_shard(tmp_path: Path, urls: list[str]) -> None:
    reader = Reader(tmp_path)
    reader.ahead.expect(str(tmp_path / "none.tar"))
    with reader.ahead.shard(urls[0]) as reading:
        assert len(list(reading.batches)) == 8
    with reader.ahead.shard(str(tmp_path / "none.tar")) as reading, pytest.raises(ShardError, match="no shard"):
        next(reading.batches)
    with reader.ahead.shard(urls[1]) as reading:
        assert len(list(reading.batches)) == 8


def test_another_shard_than_was_expected_is_read_from_its_beginning(tmp_path: Path, urls: list[str]) -> None:
    reader = Reader(tmp_path)
    reader.ahead.expect(urls[1])
    with reader.ahead.shard(urls[0]) as reading:
        list(reading.batches)
        wait_until(lambda: reader.of("1") > 0)
    with reader.ahead.shard(urls[2]) as reading:
        assert [sample.key for batch in reading.batches for sample in batch.samples] == [f"{i:03}" for i in range(30)]
    assert reader.of("1") < 30


def test_a_shard_that_is_given_up_begins_no_other(tmp_path: Path, urls: list[str]) -> None:
    reader = Reader(tmp_path)
    reader.ahead.expect(urls[1])
    with pytest.raises(KeyError), reader.ahead.shard(urls[0]) as reading:
        next(reading.batches)
        raise KeyError
    assert reader.of("1") == 0
