"""The second picture of a sample, `KEY.right.jpg` beside `KEY.jpg`, which readers of shards hand on among its extras.

`shards.read(url, extras=True)` reads it; without `extras` samples come without their second picture.
"""

from __future__ import annotations

from collections.abc import Mapping

from capfilt.data.shards.members import IMAGES
from capfilt.errors import DataError

RIGHT = tuple(f"right.{extension}" for extension in IMAGES)
"""The extensions of a right picture, as the `extras` of a sample have them."""


def right_picture(extras: Mapping[str, bytes]) -> bytes:
    """The bytes of a sample's right picture, still encoded; its left one is its `image`.

    Raises:
        DataError: there is none, or several of several formats.
    """
    names = [name for name in RIGHT if name in extras]
    if len(names) == 1:
        return extras[names[0]]
    what = f"there are several right pictures ({', '.join(names)})" if names else "there is no right picture"
    raise DataError(f"{what}; a pair is KEY.jpg, the left one, and KEY.right.jpg (or png, webp)")
