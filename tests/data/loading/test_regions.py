"""Regions: what a json may say of them, how they come through a crop, and batches of them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capfilt.data import shards
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.loading.config import LoaderConfig, RegionConfig, Source
from capfilt.data.loading.loader import Loader
from capfilt.data.loading.regions import WHOLE, RegionLoader, RegionRows, crop
from capfilt.data.regions import Proposal, Region, proposals_of, regions_of
from capfilt.data.sample import Sample
from capfilt.data.synthetic import world
from capfilt.data.tasks import FailedRow
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import DataError

FORMAT = ImageFormat(32)


@pytest.mark.parametrize(
    ("regions", "said"),
    [
        ({"box": [0, 0, 1, 1]}, "regions is dict; it is a list of"),
        ([{"box": [0, 0, 1, 1]}], "region 0 has no text"),
        ([{"box": [0, 0, 1, 1], "text": " "}], "region 0 has no text"),
        ([{"box": [0, 0, 1], "text": "x"}], r"region 0: box is \[0, 0, 1\]; it is four numbers"),
        ([{"box": [0, 0, float("nan"), 1], "text": "x"}], "four numbers of pixels"),
        ([{"box": [1, 1, 2, 2], "text": "x"}, {"box": [3, 3, 0, 4], "text": "x"}], "region 1: box .* is empty"),
        ([{"box": [4, 3, 5, 4], "text": "x"}], r"box \[4, 3, 5, 4\] lies outside the picture of 8 x 9 pixels"),
        ([{"box": [-1, 3, 5, 4], "text": "x"}], "lies outside"),
    ],
)  # fmt: skip
def test_what_is_no_region_is_said(regions: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        regions_of({"regions": regions}, 8, 9)


def test_regions_are_read_as_they_are() -> None:
    assert regions_of({}, 8, 9) == []
    assert regions_of({"regions": [{"box": [4, 3.5, 4, 5.5], "text": "a cat", "id": 3}]}, 8, 9) == [
        Region(4, 3.5, 4, 5.5, "a cat", 3)
    ]


def test_regions_that_cannot_be_used_can_be_collected() -> None:
    good, empty = {"box": [0, 0, 1, 1], "text": "x"}, {"box": [1, 1, 0, 2], "text": "x", "id": 7}
    failed: list[FailedRow] = []
    assert regions_of({"regions": [empty, good, 5]}, 8, 9, failed) == [Region(0, 0, 1, 1, "x")]
    assert [row.id for row in failed] == [7, "region 2"]
    assert "is empty" in failed[0].reason


def test_proposals() -> None:
    meta = {"proposals": [{"box": [0, 0, 8, 9], "score": 1}, {"box": [1, 1, 2, 2]}]}
    assert proposals_of(meta, 8, 9) == [Proposal(0, 0, 8, 9, 1.0), Proposal(1, 1, 2, 2)]
    for entry, said in (({"box": [0, 0, 9, 9]}, "proposal 0: box .* lies outside"), (3, "proposal 0: box is None"),
                        ({"box": [0, 0, 1, 1], "score": "1"}, "proposal 0: score is '1'")):  # fmt: skip
        with pytest.raises(DataError, match=said):
            proposals_of({"proposals": [entry]}, 8, 9)


def marked() -> Image.Image:
    """Black, with one white region of 16 x 8 pixels from (24, 8) on."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[8:16, 24:40] = 255
    return Image.fromarray(pixels)


def test_boxes_and_patches_are_where_the_region_is_in_the_crop() -> None:
    regions, mirrored = [Region(24, 8, 16, 8, "white"), Region(0, 56, 8, 8, "far")], 0
    for seed in range(40):
        view = crop(marked(), regions, "all of it", FORMAT, 4, RegionConfig(), np.random.default_rng(seed))
        assert view.parts[0].box == WHOLE
        assert view.parts[0].seen.all()
        for part in view.parts[1:]:
            x, y, w, h = part.box
            assert -1e-9 <= x - w / 2 <= x + w / 2 <= 1 + 1e-9
            assert 1 <= part.seen[1:].sum() <= 16
            assert part.seen[0] == 1
            if part.text == "white" and min(w, h) > 0.1:
                rows, columns = np.nonzero(view.pixels[:, :, 0] > 127)
                assert abs((columns.min() + columns.max() + 1) / 64 - x) < 0.06
                assert abs((rows.min() + rows.max() + 1) / 64 - y) < 0.06
                patch = part.seen[1:].reshape(4, 4)
                assert patch[int(y * 4 - 1e-9), int(x * 4 - 1e-9)] == 1
                mirrored += x > 0.6
    assert mirrored, "some are on the other side"


def test_colours_change_and_boxes_stay_right() -> None:
    """X-VLM's RandAugment of pictures with boxes: no operation moves a pixel."""
    regions, config, changed = [Region(24, 8, 16, 8, "white")], RegionConfig(randaugment=(2, 7)), 0
    picture = Image.fromarray(np.asarray(marked()) // 2 + 40)  # neither black nor white: every operation has an effect
    for seed in range(20):
        views = [
            crop(picture, regions, "", FORMAT, 4, drawn, np.random.default_rng(seed))
            for drawn in (RegionConfig(), config)
        ]
        for plain, other in zip(views[0].parts, views[1].parts, strict=True):
            assert plain.box == other.box
            assert (plain.seen == other.seen).all()
        before, after = (view.pixels[:, :, 0].astype(int) for view in views)
        changed += bool((before != after).any())
        inside = before > before.max() - 20
        assert after[inside].min() > after[before < before.min() + 20].max(), "bright is where it was"
    assert changed > 5
    with pytest.raises(ValueError, match="randaugment"):
        RegionConfig(randaugment=(2, 11))


def test_regions_that_say_left_stay_as_they_are() -> None:
    regions = [Region(0, 0, 32, 64, "the left half")]
    config = RegionConfig(careful_flip=True)
    boxes = [crop(marked(), regions, "", FORMAT, 4, config, np.random.default_rng(n)).parts[0].box for n in range(20)]
    assert all(x - w / 2 == pytest.approx(0) for x, _, w, _ in boxes)


def test_a_part_that_is_mostly_outside_is_left_out() -> None:
    regions = [Region(0, 0, 4, 4, "corner"), Region(30, 30, 4, 4, "other")]
    views = [crop(marked(), regions, "", FORMAT, 4, RegionConfig(), np.random.default_rng(n)) for n in range(30)]
    assert {len(view.parts) for view in views} == {1, 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    config = world.WorldConfig(web=0, human=24, val=0, test=0, shard_size=12, regions=True)
    world.write(config, 0, folder, "human")
    return folder / "human"


def loader(folder: Path, rank: int = 0, world_size: int = 1, **regions: Any) -> RegionLoader:
    config = RegionConfig.model_validate({"images": 8, "texts": 12, **regions})
    sources, tokenizer = [Source(shards=str(folder))], Tokenizer.load("world")
    settings = LoaderConfig(max_length=16, shuffle=8, lanes=4, batch_size=8)
    rows = {str(path): 1 for path in folder.glob("*.tar")}
    pairs = Loader(sources, settings, tokenizer, FORMAT, 0, rank, world_size, rows)
    return RegionLoader(pairs, sources, config, 4)


def test_every_batch_has_so_many_texts_and_goes_on_where_it_stopped(folder: Path) -> None:
    batches = list(islice(loader(folder).batches(), 4))
    for batch in batches:
        assert isinstance(batch, RegionRows)
        assert batch.images.shape == (8, 3, 32, 32)
        assert len(batch.ids) == 12 == len(batch.boxes) == len(batch.seen) == len(batch.image)
        assert batch.seen.shape[1] == 17
        assert (batch.seen[:, 0] == 1).all()
        assert batch.is_region.any()
        assert (batch.seen[~batch.is_region] == 1).all()
        assert int(batch.image.max()) < 8
    again = next(loader(folder).batches(start=3))
    assert again.uids == batches[3].uids
    assert (again.boxes == batches[3].boxes).all()  # type: ignore[attr-defined]
    more = next(loader(folder, texts=100).batches())
    assert len(more.ids) == 100


def test_ranks_share_the_pictures(folder: Path) -> None:
    whole, halves = next(loader(folder).batches()), [next(loader(folder, rank, 2).batches()) for rank in range(2)]
    assert [uid for half in halves for uid in half.uids] == list(whole.uids)
    assert all(len(half.ids) == 6 for half in halves)
    with pytest.raises(DataError, match=r"objectives\.regions\.texts 12 cannot be split over 8 ranks"):
        loader(folder, 0, 8)


def test_the_world_says_where_its_things_are() -> None:
    config = world.WorldConfig(image_size=64, regions=True)
    for index in range(12):
        sample, shown = world.sample(config, 3, "human", index), world.scene(config, 3, "human", index)
        regions = regions_of(sample.meta, 64, 64)
        assert len(regions) == len(shown.things)
        for region, thing in zip(regions, shown.things, strict=True):
            assert abs(region.left + region.width / 2 - 64 * thing.x) <= 1
            assert abs(region.height - 128 * thing.radius) <= 2
        plain = world.sample(config.model_copy(update={"regions": False}), 3, "human", index)
        assert {**plain.meta, "regions": sample.meta["regions"]} == sample.meta
        assert plain.image == sample.image


def test_pictures_without_regions_are_no_rows_and_none_at_all_is_said(folder: Path, tmp_path: Path) -> None:
    samples = [item for item in shards.read(str(next(folder.glob("*.tar")))) if isinstance(item, Sample)]
    for sample in samples[1:]:
        sample.meta.pop("regions")
    samples[0].meta["regions"][0]["box"] = [0, 0, 99, 1]  # read, and left out
    samples[1].meta["regions"] = [{"box": [0, 0, 9, 9], "text": "a thing"}]
    shards.write(tmp_path / "00000.tar", iter(samples))
    batch = next(loader(tmp_path, images=2, texts=2).batches())
    assert set(batch.uids) == {samples[1].uid}
    assert batch.unreadable == 1
    samples[0].meta.pop("regions")
    samples[1].meta.pop("regions")
    (tmp_path / "none").mkdir()
    shards.write(tmp_path / "none" / "00000.tar", iter(samples))
    with pytest.raises(DataError, match=r"no picture of 1 shards has regions"):
        loader(tmp_path / "none")
