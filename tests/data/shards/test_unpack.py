"""Packed bytes, whole, cut, damaged, and made to burst."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import time
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.shards import unpack
from capfilt.data.shards.unpack import DamagedError, decompressed
from capfilt.errors import TimeLimitError
from capfilt.runs import deadline

PACKS: list[Callable[[bytes], bytes]] = [gzip.compress, bz2.compress, lzma.compress]


def opened(data: bytes) -> io.BufferedReader:
    return decompressed(io.BytesIO(data))


@pytest.mark.parametrize("pack", PACKS)
@settings(max_examples=25, deadline=None)
@given(parts=st.lists(st.binary(max_size=3000), min_size=1, max_size=4), padding=st.integers(0, 9))
def test_packed_streams_in_a_row_are_one(pack: Callable[[bytes], bytes], parts: list[bytes], padding: int) -> None:
    assert opened(b"".join(map(pack, parts)) + bytes(padding)).read() == b"".join(parts)


@pytest.mark.parametrize("pack", PACKS)
def test_a_long_answer_is_printed_in_parts(pack: Callable[[bytes], bytes]) -> None:
    data = random.Random(0).randbytes(700_000) + bytes(3_000_000)
    file = opened(pack(data))
    assert file.read(5) + file.read(1_000_000) + file.read() == data


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data + b"behind it", lambda data: data[:20]])
def test_damage_is_said(pack: Callable[[bytes], bytes], damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(DamagedError):
        opened(damage(pack(random.Random(0).randbytes(5000)))).read()


@pytest.mark.parametrize(
    "bomb",
    [
        lambda: gzip.compress(bytes(300 * 2**20), 1),
        lambda: bz2.compress(bytes(90 * 2**20)) * 50,
        lambda: lzma.compress(bytes(90 * 2**20), preset=0) * 50,
        lambda: gzip.compress(bytes(2**20)) * 500,
    ],
    ids=["gzip", "bzip2", "xz", "many gzips"],
)
def test_a_bomb_is_refused_after_64_mib(bomb: Callable[[], bytes]) -> None:
    file, given = opened(bomb()), 0
    tracemalloc.start()
    with pytest.raises(DamagedError, match=r"a bomb: \d+ packed bytes unpack to \d+ and more, 100 times are allowed"):
        while data := file.read(2**20):
            given += len(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert unpack.FREE_BYTES - 2**21 < given <= unpack.FREE_BYTES + 2**20
    assert peak < 8 * 2**20


def test_what_compresses_well_is_no_bomb() -> None:
    """Jsons that repeat one another, at 60 to 1."""
    random_ = random.Random(0)
    data = b"".join(b'{"url":"https://example.org/%d","text":"%s"}' % (i, b"a dog " * 120) for i in range(100_000))
    packed = gzip.compress(data + random_.randbytes(10), 1)
    assert 40 < len(data) / len(packed) < unpack.MAX_RATIO
    assert len(data) > unpack.FREE_BYTES
    file = opened(packed)
    assert sum(len(piece) for piece in iter(lambda: file.read(2**20), b"")) == len(data) + 10


def test_an_xz_may_not_ask_for_more_memory_than_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = lzma.compress(bytes(1000), preset=9)
    assert opened(packed).read() == bytes(1000)
    monkeypatch.setattr(unpack, "MAX_DICTIONARY", 2**20)
    with pytest.raises(DamagedError, match="limit"):
        opened(packed).read()


def test_a_limit_of_time_ends_what_unpacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "MAX_RATIO", 10**9)
    file = opened(gzip.compress(bytes(64 * 2**20), 1) * 100)  # ten seconds and more
    begun = time.monotonic()
    with deadline.time_limit(0.2), pytest.raises(TimeLimitError, match=r"took longer than 0\.2 s"):
        while file.read(2**20):
            pass
    assert time.monotonic() - begun < 5
