from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from capfilt.inference.scores.rules import MEASURES


def grey(*levels):
    """A picture with as many pixels of each grey level."""
    pixels = np.tile(np.array(levels, np.uint8), (4, 3))
    return Image.fromarray(pixels).convert("RGB")


def test_side_and_aspect():
    picture = Image.new("RGB", (60, 20))
    assert (MEASURES["side"](picture), MEASURES["aspect"](picture)) == (20, 3)
    assert MEASURES["aspect"](picture.rotate(90, expand=True)) == 3


def test_entropy_is_in_bits():
    assert MEASURES["entropy"](grey(7)) == 0
    assert MEASURES["entropy"](grey(0, 255)) == pytest.approx(1)
    assert MEASURES["entropy"](grey(*range(256))) == pytest.approx(8)
