"""How a model wants its pictures: as transformers' processors do it, or refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference_pixels import normalised, squashed

from capfilt.data.images.preprocess import BLIP_PREPROCESS, ImageFormat, Preprocess
from capfilt.errors import ImageError, ModelError

ODD = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 2}
SQUARE = {"image_processor_type": "BlipImageProcessor", "size": {"height": 32, "width": 32}}


def picture(width: int = 50, height: int = 37) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def written(folder: Path, said: Any, name: str = "preprocessor_config.json") -> Path:
    (folder / name).write_text(json.dumps(said))
    return folder


def ours(preprocess: Preprocess, image: Image.Image, size: int) -> torch.Tensor:
    return preprocess.normalise(torch.from_numpy(preprocess.to_pixels(image, size))[None])


def test_without_a_file_it_is_blip_s(tmp_path: Path) -> None:
    found = Preprocess.read(tmp_path, 16)
    assert found == Preprocess()
    pixels = squashed(picture(), 16)
    assert np.array_equal(found.to_pixels(picture(), 16), pixels)
    torch.testing.assert_close(ours(found, picture(), 16), torch.from_numpy(normalised(pixels[None])))
    found.save(tmp_path, 16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "said",
    [
        SQUARE,
        {**SQUARE, **ODD},
        {**SQUARE, "do_normalize": False},
        {**SQUARE, "rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0]},
        {**SQUARE, "do_rescale": False},
        {**SQUARE, "resample": 1},
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "crop_size": 32},
        {"image_processor_type": "CLIPImageProcessor", "size": 32, "crop_size": {"height": 32, "width": 32}, **ODD},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(50, 37), (21, 64), (33, 32)])
def test_pixels_are_those_of_transformers(said: dict[str, Any], shape: tuple[int, int], tmp_path: Path) -> None:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    cls = BlipImageProcessorPil if said["image_processor_type"].startswith("Blip") else CLIPImageProcessorPil
    theirs = torch.from_numpy(np.stack(cls(**said)(picture(*shape))["pixel_values"]))
    found = Preprocess.read(written(tmp_path, said), 32)
    torch.testing.assert_close(ours(found, picture(*shape), 32), theirs, rtol=0, atol=2e-5)
    found.save(tmp_path, 32)
    again = Preprocess.read(tmp_path, 32)
    torch.testing.assert_close(ours(again, picture(*shape), 32), theirs, rtol=0, atol=2e-5)


def test_of_two_files_the_processor_s_own_wins(tmp_path: Path) -> None:
    written(tmp_path, {**SQUARE, "image_mean": [0.1, 0.1, 0.1]})
    written(tmp_path, {"processor_class": "BlipProcessor"}, "processor_config.json")
    assert Preprocess.read(tmp_path, 32).mean == (0.1, 0.1, 0.1)
    written(tmp_path, {"image_processor": {**SQUARE, "image_mean": [0.2, 0.2, 0.2]}}, "processor_config.json")
    assert Preprocess.read(tmp_path, 32).mean == (0.2, 0.2, 0.2)
    assert Preprocess.read(tmp_path / "model.pth", 32).mean == (0.2, 0.2, 0.2)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({**SQUARE, "size": {"height": 32, "width": 48}}, "size is {'height': 32, 'width': 48}"),
        ({**SQUARE, "size": {"shortest_edge": 32}}, "shortest_edge and a crop"),
        ({**SQUARE, "size": {"longest_edge": 32}}, "what can be done"),
        ({**SQUARE, "size": {"height": 64, "width": 64}}, "it makes pictures of 64 px, and the model reads 32 px"),
        ({**SQUARE, "size": "32"}, "size is '32'"),
        ({**SQUARE, "size": {"height": 10**12, "width": 10**12}}, "the model reads 32 px"),
        ({**SQUARE, "do_resize": False}, "do_resize is false"),
        ({**SQUARE, "do_pad": True}, "do_pad is True"),
        ({**SQUARE, "do_flip_channel_order": True}, "do_flip_channel_order"),
        ({**SQUARE, "do_center_crop": True, "crop_size": 48}, "crop_size is 48"),
        ({**SQUARE, "do_center_crop": True, "crop_size": {"height": 8, "width": 9}}, "crop_size is"),
        ({**SQUARE, "resample": 9}, "resample is 9"),
        ({**SQUARE, "resample": "bicubic"}, "resample is 'bicubic'"),
        ({**SQUARE, "image_mean": [0.5]}, "mean"),
        ({**SQUARE, "image_mean": 0.5}, "mean"),
        ({**SQUARE, "image_std": [0.5, 0.0, 0.5]}, "std above 0"),
        ({**SQUARE, "image_std": [0.5, float("nan"), 0.5]}, "must be finite"),
        ({**SQUARE, "rescale_factor": 0}, "cannot be done"),
        ({**SQUARE, "rescale_factor": -1}, "cannot be done"),
        ({**SQUARE, "image_processor_type": "ViTImageProcessor"}, "whose own image_mean, image_std, resample are not"),
        ([], "holds a list"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_one_line(said: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(why)) as told:
        Preprocess.read(written(tmp_path, said), 32)
    assert str(told.value).startswith(f"{tmp_path}: how it wants its pictures")
    assert "\n" not in str(told.value)


def test_all_is_written_down_of_a_processor_that_is_not_known(tmp_path: Path) -> None:
    said = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, **ODD}
    found = Preprocess.read(written(tmp_path, said), 32)
    assert (found.mean, found.std, found.resample) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear")


def test_a_thin_picture_does_not_grow_without_bounds(tmp_path: Path) -> None:
    said = {"image_processor_type": "CLIPImageProcessor", "size": 224, "crop_size": 224}
    found = Preprocess.read(written(tmp_path, said), 224)
    with pytest.raises(ImageError, match="too many pixels"):
        found.to_pixels(picture(100_000, 1), 224)


def test_formats_that_differ_in_their_mean_alone_share_a_resized_picture() -> None:
    one = ImageFormat(32)
    assert one.resizing == ImageFormat(32, Preprocess(mean=(0.5, 0.5, 0.5), resized=32)).resizing
    for other in (
        ImageFormat(31),
        ImageFormat(32, Preprocess(resample="bilinear")),
        ImageFormat(32, Preprocess(resized=33)),
    ):
        assert one.resizing != other.resizing


def test_a_batch_of_blip_is_normalised_as_it_always_was() -> None:
    every = np.stack([np.arange(256, dtype=np.uint8)] * 3, axis=-1).reshape(16, 16, 3)
    made = BLIP_PREPROCESS.normalise(BLIP_PREPROCESS.stack([every, every[::-1]]))
    assert torch.equal(made, torch.from_numpy(normalised(np.stack([every, every[::-1]]))))


class TestPadded:
    """Pictures that keep their shape, as ViLT reads them."""

    RULE = Preprocess(shape="padded", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    @pytest.mark.parametrize("sides", [(640, 480), (480, 640), (100, 100), (1000, 90), (33, 500), (385, 384)])
    def test_sides_are_those_of_transformers(self, sides: tuple[int, int]) -> None:
        from transformers.models.vilt.image_processing_pil_vilt import get_resize_output_image_size

        height, width = get_resize_output_image_size(np.zeros((3, *reversed(sides))), 384, int(1333 / 800 * 384), 32)
        made = self.RULE.to_pixels(picture(*sides), 384)
        assert made.shape == (max(height, 32), max(width, 32), 3)

    def test_a_batch_is_as_large_as_its_largest_and_says_where_pictures_are(self) -> None:
        pixels = [self.RULE.to_pixels(picture(*sides), 64) for sides in ((96, 64), (64, 96))]
        batch = self.RULE.stack(pixels)
        assert batch.shape == (2, 96, 96, 4)
        made = self.RULE.normalise(batch)
        assert made.shape == (2, 4, 96, 96)
        assert made[:, 3].sum(dim=(1, 2)).tolist() == [64 * 96, 96 * 64]
        for row, one in zip(made, pixels, strict=True):
            height, width = one.shape[:2]
            torch.testing.assert_close(row[:3, :height, :width], torch.from_numpy(one).permute(2, 0, 1) / 127.5 - 1)
            assert row[:, height:].abs().sum() + row[:, :, width:].abs().sum() == 0

    def test_formats_of_other_bounds_share_no_pixels(self) -> None:
        other = self.RULE.model_copy(update={"multiple": 16})
        assert ImageFormat(64, self.RULE).resizing != ImageFormat(64, other).resizing
        assert ImageFormat(64, self.RULE).resizing == ImageFormat(64, Preprocess(shape="padded")).resizing
