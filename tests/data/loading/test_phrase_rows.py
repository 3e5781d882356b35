"""Phrases with their boxes, as batches: what a crop and a mirror make of a box, and rows that cannot be used."""

from __future__ import annotations

import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from row_shards import picture, write_shard

from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.loader import Loader
from capfilt.data.loading.phrase_rows import PhraseRows
from capfilt.data.loading.task_rows import loader_of
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import DataError

TOKENIZER = Tokenizer.load("world")
BOX = (12, 6, 6, 12)


def boxed() -> bytes:
    """A black picture of 36 x 24 pixels with a red box."""
    pixels = np.zeros((24, 36, 3), np.uint8)
    left, top, width, height = BOX
    pixels[top : top + height, left : left + width, 0] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def loader(url: str, **settings: Any) -> Loader:
    config = LoaderConfig.model_validate({"batch_size": 4, "max_length": 12, "shuffle": 4, **settings})
    return loader_of("phrases", [Source(shards=url)], config, TOKENIZER, 36, 0)


def batches(url: str, count: int, **settings: Any) -> list[PhraseRows]:
    made = loader(url, **settings).batches()
    taken = list(islice(made, count))
    made.close()  # type: ignore[attr-defined]
    return [batch for batch in taken if isinstance(batch, PhraseRows)]


def red(image: Any) -> tuple[float, float, float, float]:
    """Where a picture is red, as a box in shares of it."""
    rows, columns = np.nonzero((image[0] - image[1]).numpy() > 1.5)
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    return (left + right) / 72, (top + bottom) / 72, (right - left) / 36, (bottom - top) / 36


@pytest.mark.parametrize("augment", [{}, {"flip": True}, {"crop": [0.5, 1.0], "flip": True}])
def test_a_box_goes_where_its_part_of_the_picture_goes(augment: dict[str, Any], tmp_path: Path) -> None:
    regions = [{"text": text, "box": BOX} for text in ("a red square", "the left square")]
    url = write_shard(tmp_path / "00000.tar", {"json": {"regions": regions}, "png": boxed()})
    places, sided = set(), set()
    for batch in batches(url, 6, augment=augment):
        for image, box, ids in zip(batch.images, batch.boxes.tolist(), batch.ids.tolist(), strict=True):
            assert box == pytest.approx(red(image), abs=0.03)
            says = "left" in TOKENIZER.decode([i for i in ids if i])
            (sided if says else places).add(tuple(round(side, 3) for side in box))
    whole = (round(15 / 36, 3), 0.5, round(6 / 36, 3), 0.5)
    if not augment:
        assert places == sided == {whole}
    elif "crop" not in augment:
        assert sided == {whole}
        assert places == {whole, (round(21 / 36, 3), *whole[1:])}
    else:
        assert len(places) > 4


def test_a_phrase_that_cannot_be_used_is_counted_and_another_stands_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, empty = {"text": "a ring", "box": BOX}, {"text": "a ring", "box": [1, 1, 0, 2]}
    url = write_shard(
        tmp_path / "00000.tar",
        {"json": {"regions": [good, empty, {"text": "?", "box": BOX}, 5]}},
        {"json": {"regions": [good]}, "png": b"broken"},
        {"json": {"regions": "none"}},
        {"json": {"regions": [good]}, "png": picture(2)},
    )
    with caplog.at_level("WARNING"):
        first, second = batches(url, 2)
    assert (first.unreadable, second.unreadable) == (2, 2), "of four phrases"
    assert caplog.text.count("is empty; its width and height are above 0; such a phrase is left out") == 1
    assert first.boxes.shape == (4, 4)
    with pytest.raises(DataError, match="randaugment turns and moves pictures"):
        loader(url, augment={"randaugment": [2, 5]})
