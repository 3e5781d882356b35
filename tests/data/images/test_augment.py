from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from reference_pixels import squashed

from capfilt.data.images.augment import OPERATIONS, AugmentConfig, augment, crop_box, enhancement, generator
from capfilt.data.images.preprocess import CLIP_PREPROCESS, ImageFormat, Preprocess
from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.loader import Batch, Loader
from capfilt.data.text.tokenizer import Tokenizer

BLIP = AugmentConfig(crop=(0.2, 1.0), flip=True, randaugment=(2, 5))


@pytest.fixture
def picture() -> Image.Image:
    """48 x 40 pixels of a smooth, colourful slope with a little noise."""
    y, x = np.mgrid[:40, :48]
    noise = np.random.default_rng(0).integers(0, 20, (40, 48, 3))
    return Image.fromarray((np.stack([3 * x, 4 * y, 2 * (x + y)], axis=-1) + 30 + noise).clip(0, 255).astype(np.uint8))


def test_nothing_is_the_squash_and_draws_nothing(picture: Image.Image) -> None:
    rng = np.random.default_rng(0)
    assert np.array_equal(augment(picture, 32, AugmentConfig(), rng), squashed(picture, 32))
    assert rng.random() == np.random.default_rng(0).random()


def test_a_view_is_a_function_of_seed_row_and_uid(picture: Image.Image) -> None:
    one, again = (augment(picture, 32, BLIP, generator(1, 7, "a")) for _ in range(2))
    assert one.shape == (32, 32, 3)
    assert one.dtype == np.uint8
    assert np.array_equal(one, again)
    others = [augment(picture, 32, BLIP, generator(*key)) for key in ((2, 7, "a"), (1, 8, "a"), (1, 7, "b"))]
    assert not any(np.array_equal(one, other) for other in others)


def test_every_other_picture_is_mirrored(picture: Image.Image) -> None:
    plain = squashed(picture, 32)
    found = [augment(picture, 32, AugmentConfig(flip=True), generator(0, i, "a")) for i in range(200)]
    mirrored = sum(np.array_equal(x, plain[:, ::-1]) for x in found)
    assert mirrored + sum(np.array_equal(x, plain) for x in found) == 200
    assert 70 < mirrored < 130


def test_crops_have_the_share_and_the_aspect_and_lie_within() -> None:
    shares, lefts = [], []
    for i in range(400):
        left, top, right, bottom = crop_box(400, 300, (0.2, 1.0), generator(0, i, "a"))
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        assert 0.74 < (right - left) / (bottom - top) < 1.35
        shares.append((right - left) * (bottom - top) / 120_000)
        lefts.append(left)
    assert 0.19 < min(shares) < 0.25
    assert 0.85 < max(shares) < 1.01
    assert len(set(lefts)) > 100


@pytest.mark.parametrize("size", [(1000, 3), (3, 1000), (1, 1)])
def test_a_picture_that_no_crop_fits_gives_its_middle(size: tuple[int, int]) -> None:
    left, top, right, bottom = crop_box(*size, (0.9, 1.0), generator(0, 0, "a"))
    assert abs(left + right - size[0]) <= 1
    assert abs(top + bottom - size[1]) <= 1
    assert min(right - left, bottom - top) >= 1
    assert max(right - left, bottom - top) <= 4


def test_the_ten_operations_are_the_public_ones() -> None:
    assert list(OPERATIONS) == [
        "Identity", "AutoContrast", "Brightness", "Sharpness", "Equalize",
        "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate",
    ]  # fmt: skip


def changes(name: str, picture: Image.Image, magnitude: int, sign: int = 1) -> bool:
    return not np.array_equal(OPERATIONS[name](picture, magnitude, sign), picture)


def test_at_magnitude_5_brightness_and_sharpness_do_nothing(picture: Image.Image) -> None:
    assert enhancement(5) == 1.0
    assert enhancement(7) == pytest.approx(1.36)
    assert {name for name in OPERATIONS if not changes(name, picture, 5)} == {"Identity", "Brightness", "Sharpness"}
    assert {name for name in OPERATIONS if not changes(name, picture, 7)} == {"Identity"}


def test_moved_pictures_are_moved_by_the_public_amounts_and_filled_with_grey() -> None:
    white = Image.new("RGB", (40, 40), "white")

    def grey(name: str, sign: int, magnitude: int = 5) -> np.ndarray:
        return (np.asarray(OPERATIONS[name](white, magnitude, sign)) == 128).all(axis=-1)

    for sign, edge in ((1, slice(35, 40)), (-1, slice(0, 5))):
        wanted = np.zeros((40, 40), bool)
        wanted[:, edge] = True
        assert np.array_equal(grey("TranslateX", sign), wanted)
        assert np.array_equal(grey("TranslateY", sign), wanted.T)
    # The last of 40 rows is shifted by 0.15 x 39.5 = 5.9 pixels, the first by nothing.
    assert grey("ShearX", 1).sum(axis=1)[[0, -1]] == pytest.approx([0, 5.9], abs=1)
    assert np.array_equal(grey("ShearY", 1), grey("ShearX", 1).T)
    # What a square shares with itself turned is an octagon of equal sides; four corner triangles are lost.
    c, s = np.cos(np.deg2rad(15)), np.sin(np.deg2rad(15))
    lost = 2 * 40**2 * s * c / (1 + s + c) ** 2
    assert grey("Rotate", 1).sum() == pytest.approx(lost, rel=0.15)
    assert np.array_equal(grey("Rotate", -1), grey("Rotate", 1)[:, ::-1])


def test_operations_are_drawn_evenly_with_replacement_and_applied_half_the_time(
    picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda image, m, s, name=name: seen.append(name) or image)
    runs = []
    for i in range(1000):
        seen.clear()
        augment(picture, 8, AugmentConfig(randaugment=(2, 5)), generator(0, i, "a"))
        runs.append(tuple(seen))
    assert Counter(map(len, runs)) == pytest.approx({0: 250, 1: 500, 2: 250}, abs=60)
    counts = Counter(name for run in runs for name in run)
    assert len(counts) == 10
    assert all(60 < count < 145 for count in counts.values())
    assert any(len(run) == 2 and run[0] == run[1] for run in runs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": (0.0, 1.0)},
        {"crop": (0.5, 0.2)},
        {"crop": (0.5, 1.2)},
        {"randaugment": (0, 5)},
        {"randaugment": (2, 11)},
    ],
)
def test_nonsense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig(**wrong)


class TestInTheLoader:
    def batches(self, folder: Path, count: int, start: int = 0, rank: int = 0, ranks: int = 1) -> list[Batch]:
        config = LoaderConfig(batch_size=8, max_length=24, shuffle=32, augment=BLIP, prompt="a picture of ")
        sources = [Source(shards=str(folder / "human"))]
        stream = Loader(sources, config, Tokenizer.load("world"), 16, 0, rank, ranks).batches(start)
        found = list(islice(stream, count))
        stream.close()  # type: ignore[attr-defined]
        return found

    def test_a_resumed_run_and_two_ranks_see_the_same_views(self, small_world: Path) -> None:
        whole = self.batches(small_world, 14)
        for a, b in zip(whole[9:], self.batches(small_world, 5, start=9), strict=True):
            assert torch.equal(a.images, b.images)
        halves = [self.batches(small_world, 3, rank=rank, ranks=2) for rank in (0, 1)]
        for step in range(3):
            assert torch.equal(torch.cat([half[step].images for half in halves]), whole[step].images)
            assert torch.equal(torch.cat([half[step].image_ids for half in halves]), whole[step].image_ids)

    def test_an_image_is_augmented_differently_each_time(self, small_world: Path) -> None:
        views: dict[str, list[bytes]] = {}
        for batch in self.batches(small_world, 24):  # two epochs, two texts a picture
            for uid, image in zip(batch.uids, batch.images, strict=True):
                views.setdefault(uid, []).append(image.numpy().tobytes())
        assert {len(seen) for seen in views.values()} == {4}
        assert all(len(set(seen)) == 4 for seen in views.values())

    def test_each_text_begins_with_the_prompt_which_is_not_counted_as_its_words(self, small_world: Path) -> None:
        tokenizer = Tokenizer.load("world")
        wanted = tokenizer.encode(["a picture of"], 24)[0][0, :-1].tolist()
        (batch,) = self.batches(small_world, 1)
        assert all(row[: len(wanted)] == wanted for row in batch.ids.tolist())
        for prompt in ("a picture of ", ""):
            loader = Loader([Source(shards=str(small_world / "human"))], LoaderConfig(prompt=prompt), tokenizer, 16, 0)
            assert loader.prompt_tokens == (len(wanted) if prompt else 0)


def test_a_format_decides_what_becomes_of_a_picture(picture: Image.Image) -> None:
    clip = ImageFormat(32, CLIP_PREPROCESS)
    plain = augment(picture, clip, AugmentConfig(), generator(0, 0, "a"))
    assert np.array_equal(plain, clip.to_pixels(picture))
    assert not np.array_equal(plain, squashed(picture, 32)), "it is wider than tall"
    crop = AugmentConfig(crop=(0.5, 1.0))
    seen = [augment(picture, one, crop, generator(0, 0, "a")) for one in (clip, ImageFormat(32), 32)]
    assert all(np.array_equal(seen[0], other) for other in seen[1:]), "all of a random crop is kept"
    padded = ImageFormat(32, Preprocess(shape="padded", multiple=8))
    assert augment(picture, padded, crop, generator(0, 0, "a")).shape[0] % 8 == 0
