from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference_pixels import normalised, squashed

from capfilt.data import shards
from capfilt.data.images import decode
from capfilt.data.images.preprocess import ImageFormat, Preprocess
from capfilt.data.sample import Sample
from capfilt.errors import ShardError
from capfilt.inference.batches import Pictures, pictures

FORMAT = ImageFormat(8)
WRONG = {3: b"not a picture", 4: b"", 11: b"\xff\xd8\xff\xe0 broken"}


def png(i: int, side: int = 9) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (side, side + 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, count: int, wrong: dict[int, bytes]) -> list[str]:
    keys = [f"{i:05}" for i in range(count)]
    shards.write(path, (Sample(key, wrong.get(i, png(i)), "png", f"text {i}") for i, key in enumerate(keys)))
    return keys


@pytest.mark.parametrize("batch_size", [1, 4, 5, 13, 100])
def test_every_key_comes_once_and_in_order(tmp_path: Path, batch_size: int) -> None:
    keys = write(tmp_path / "0.tar", 13, WRONG)
    batches = list(pictures(shards.read(str(tmp_path / "0.tar")), batch_size, [FORMAT]))
    sizes = [len(batch.samples) + len(batch.faults) for batch in batches]
    assert sizes == [batch_size] * (13 // batch_size) + ([13 % batch_size] if 13 % batch_size else [])
    assert [sample.key for batch in batches for sample in batch.samples] == [
        k for i, k in enumerate(keys) if i not in WRONG
    ]
    faults = {fault.key: fault.reason for batch in batches for fault in batch.faults}
    assert set(faults) == {keys[i] for i in WRONG}
    assert set(faults.values()) <= {"not an image", "broken image", "truncated image"}


def test_pixels_are_those_of_their_samples(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", 13, WRONG)
    for batch in pictures(shards.read(str(tmp_path / "0.tar")), 4, [FORMAT]):
        assert batch.pixels[FORMAT.resizing].shape[0] == len(batch.samples)
        for sample, actual in zip(batch.samples, batch.on(torch.device("cpu"), [FORMAT]).pixels(FORMAT), strict=True):
            wanted = normalised(squashed(decode.decode(sample.image), 8))
            assert torch.equal(actual, torch.from_numpy(wanted))


def test_a_batch_of_faults_alone_has_no_pixels(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", 3, dict.fromkeys(range(3), b"no"))
    (batch,) = pictures(shards.read(str(tmp_path / "0.tar")), 4, [FORMAT])
    assert (len(batch.samples), len(batch.faults), batch.pixels[FORMAT.resizing].shape[0]) == (0, 3, 0)


def test_an_empty_shard_has_no_batches(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", 0, {})
    assert list(pictures(shards.read(str(tmp_path / "0.tar")), 4, [FORMAT])) == []


def test_a_cut_shard_gives_what_came_before_and_a_fault(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", 13, {})
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    batches = list(pictures(shards.read(str(tmp_path / "1.tar")), 4, [FORMAT]))
    read = [sample.key for batch in batches for sample in batch.samples]
    assert read == [f"{i:05}" for i in range(len(read))]
    assert 3 < len(read) < 10
    assert [fault.key for batch in batches for fault in batch.faults] == [f"{len(read):05}"]


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no shard at"):
        next(pictures(shards.read(str(tmp_path / "none.tar")), 4, [FORMAT]))


def test_decoding_runs_a_few_batches_ahead_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "0.tar", 60, {})
    begun: list[str] = []
    read = shards.read

    def noted(url: str) -> Iterator[Sample]:
        for item in read(url):
            begun.append(item.key)
            yield item  # type: ignore[misc]

    monkeypatch.setattr(shards, "read", noted)
    batches = pictures(shards.read(str(tmp_path / "0.tar")), 4, [FORMAT])
    first: Pictures = next(batches)
    assert len(first.samples) == 4
    deadline = time.monotonic() + 60
    while len(begun) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(begun) <= 4 * 4 + 1  # a shard never lies in memory whole
    before = threading.active_count()
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() < before
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "loader"))]


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_what_a_decoding_thread_raises_comes_where_its_batch_would(tmp_path: Path, threads: int) -> None:
    keys = write(tmp_path / "0.tar", 13, {})
    tenth = Image.open(io.BytesIO(png(9))).tobytes()

    def measure(picture: Image.Image) -> float:
        if picture.tobytes() == tenth:
            raise RuntimeError("the tenth")
        return 1.0

    found = list[str]()
    read = shards.read(str(tmp_path / "0.tar"))
    with pytest.raises(RuntimeError, match="the tenth"):
        for batch in pictures(read, 3, [FORMAT], threads=threads, measures={"one": measure}):
            found += [sample.key for sample in batch.samples]
    assert found == keys[:9]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("decode", "loader"))]


def test_a_picture_is_decoded_once_and_resized_once_for_each_size_and_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "0.tar", 5, {})
    grey = Preprocess(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    middle = Preprocess(resample="bilinear", shape="shortest edge", resized=9)
    formats = [FORMAT, ImageFormat(8, grey), ImageFormat(6), ImageFormat(8, middle)]
    calls: list[str] = []
    for owner, name in ((decode, "decode"), (Preprocess, "to_pixels")):
        real = getattr(owner, name)

        def counted(*args: object, real: Any = real, name: str = name) -> object:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(owner, name, counted)
    (batch,) = pictures(shards.read(str(tmp_path / "0.tar")), 5, formats)
    assert Counter(calls) == {"decode": 5, "to_pixels": 3 * 5}
    images = batch.on(torch.device("cpu"), formats)
    for sample, *actual in zip(batch.samples, *(images.pixels(one) for one in formats), strict=True):
        for one, pixels in zip(formats, actual, strict=True):
            alone = one.preprocess.to_pixels(decode.decode(sample.image), one.size)
            assert torch.equal(pixels, one.preprocess.normalise(torch.from_numpy(alone)[None])[0])
