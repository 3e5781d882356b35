"""Grounding: where in a picture a phrase is, by a head for boxes, or by Grad-CAM without ever having seen a box.

A box of the model is in shares of what it saw of the picture, which for some models is the middle of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.data.images import decode
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.regions import REGIONS, proposals_of, regions_of
from capfilt.data.sample import Sample
from capfilt.data.tasks import FailedRow
from capfilt.errors import DataError, ImageError
from capfilt.evaluation.metrics import grounding
from capfilt.evaluation.tasks import Measured
from capfilt.evaluation.tasks.config import GroundingEvalConfig
from capfilt.evaluation.tasks.rows import RowBatch, RowReader
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.heatmap import heatmaps
from capfilt.inference.local_model import LocalModel

FINE = 9
"""A heatmap is drawn so many times finer than its patches before a box is put around what is hot; odd, so that the
middle of a patch has the patch's own heat."""

Box = tuple[float, float, float, float]
"""Left, top, width, height, in pixels of the upright picture."""


class Phrase(NamedTuple):
    """A text, and where in its picture it is."""

    id: object
    """None where the shard gives none."""
    text: str
    box: Box
    size: tuple[int, int]
    """Width and height of the picture, pixels."""
    proposals: tuple[Box, ...]


def measure(local: LocalModel, urls: Sequence[str], config: GroundingEvalConfig, device: torch.device) -> Measured:
    """The share of phrases whose box overlaps the right one by half, and the mean overlap, beside random boxes.

    Raises:
        DataError: no phrase can be used.
    """
    by_boxes = config.by_boxes(local.model.config)
    reader = RowReader(local, phrases_of, config.batch_size, device)
    phrases: list[Phrase] = []
    boxes: list[Box] = []
    for batch in reader.batches(urls):
        phrases += batch.flat
        boxes += predicted_boxes(local, batch) if by_boxes else heatmap_boxes(local, batch, config)
    wanted, sizes = [phrase.box for phrase in phrases], [phrase.size for phrase in phrases]
    figures = grounding.accuracy(boxes, wanted)
    figures["method"] = "boxes" if by_boxes else "heatmap"
    figures["random_box"] = grounding.random_box(wanted, sizes)
    figures["whole_picture"] = grounding.whole_picture(wanted, sizes)
    if not by_boxes and any(phrase.proposals for phrase in phrases):
        figures["random_proposal"] = grounding.random_proposal(wanted, [phrase.proposals for phrase in phrases])
    return Measured({"grounding": figures} | reader.left_out.figures())


def phrases_of(sample: Sample, failed: list[FailedRow]) -> list[Phrase]:
    """The phrases of a sample; all fail where its picture or its proposals cannot be used. DataError: no list."""
    entries = sample.meta.get(REGIONS) or ()
    try:
        size = decode.decode(sample.image).size if entries else (0, 0)
    except ImageError as error:
        failed += [FailedRow(number, f"picture: {error}") for number in range(len(entries))]
        return []
    regions = regions_of(sample.meta, *size, failed)
    try:
        proposals = tuple((p.left, p.top, p.width, p.height) for p in proposals_of(sample.meta, *size))
    except DataError as error:
        failed += [FailedRow(region.id or number, str(error)) for number, region in enumerate(regions)]
        return []
    return [Phrase(one.id, one.text, (one.left, one.top, one.width, one.height), size, proposals) for one in regions]


@torch.inference_mode()
def predicted_boxes(local: LocalModel, batch: RowBatch[Phrase]) -> list[Box]:
    """The boxes of a model with a head for them, a phrase each."""
    model = local.model
    filter_ = FusionFilter(local, model.config.scored_length)
    texts = [local.tokenizer.clean(phrase.text) for phrase in batch.flat]
    ids_BT, lengths = filter_.token_ids(texts)
    mask_BT = (torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None]).to(ids_BT)
    tokens = model.encode_image(batch.pixels)
    context = model.image_context(tokens, "encoder").select(torch.tensor(batch.sample_of_row, device=tokens.device))
    places_B4 = model.predict_box(model.fuse(ids_BT, mask_BT, context)).cpu().double().numpy()
    boxes = []
    for phrase, (x, y, width, height) in zip(batch.flat, places_B4, strict=True):
        left, top, wide, high = seen(local.image_format, *phrase.size)
        boxes.append((left + (x - width / 2) * wide, top + (y - height / 2) * high, width * wide, height * high))
    return boxes


def heatmap_boxes(local: LocalModel, batch: RowBatch[Phrase], config: GroundingEvalConfig) -> list[Box]:
    """The boxes of a model that never learned any: by where its attention speaks for a match."""
    boxes: list[Box] = []
    length = local.model.config.scored_length
    for number, phrases in enumerate(batch.rows):
        texts = [phrase.text for phrase in phrases]
        maps = torch.from_numpy(heatmaps(local, batch.pixels[number : number + 1], texts, length, config.layer))
        for heat, phrase in zip(maps, phrases, strict=True):
            part = seen(local.image_format, *phrase.size)
            if phrase.proposals:
                boxes.append(best_proposal(heat, phrase, part, config.area_power))
            else:
                boxes.append(hot_box(heat, part, config.hot))
    return boxes


def seen(image_format: ImageFormat, width: int, height: int) -> Box:
    """The part of a picture of this size, pixels, that its model sees: all of it, or the middle."""
    rule, size = image_format.preprocess, image_format.size
    share = size / (rule.resized or size)
    if rule.shape == "shortest edge":
        side = share * min(width, height)
        return (width - side) / 2, (height - side) / 2, side, side
    if rule.shape == "squash":
        return (1 - share) / 2 * width, (1 - share) / 2 * height, share * width, share * height
    return 0.0, 0.0, float(width), float(height)


def best_proposal(heat_SS: Tensor, phrase: Phrase, part: Box, power: float) -> Box:
    """The proposal with the most heat in it over a power of its area; the first of equals (ALBEF section 5).

    The heatmap is brought to the size of the picture, bicubic, with no heat where the model did not see.
    """
    width, height = phrase.size
    left, top, wide, high = (round(side) for side in part)
    drawn = F.interpolate(heat_SS[None, None], size=(max(high, 1), max(wide, 1)), mode="bicubic")[0, 0]
    picture = torch.zeros(height, width)
    picture[top : top + high, left : left + wide] = drawn[: height - top, : width - left]
    total = F.pad(picture.double().cumsum(0).cumsum(1), (1, 0, 1, 0))

    def heat_over_area(box: Box) -> float:
        x, y, right, bottom = int(box[0]), int(box[1]), int(box[0] + box[2]), int(box[1] + box[3])
        inside = total[bottom, right] - total[y, right] - total[bottom, x] + total[y, x]
        share: float = float(inside) / (box[2] * box[3]) ** power
        return share

    return max(phrase.proposals, key=heat_over_area)


def hot_box(heat_SS: Tensor, part: Box, share: float) -> Box:
    """The box around what is as hot as `share` of the hottest spot and hangs together with it, corners included."""
    side = FINE * heat_SS.shape[0]
    drawn = F.interpolate(heat_SS[None, None], size=(side, side), mode="bilinear", align_corners=False)
    hot = (drawn >= share * heat_SS.max()).float()
    row, column = (FINE * int(place) + FINE // 2 for place in np.unravel_index(int(heat_SS.argmax()), heat_SS.shape))
    region = torch.zeros_like(drawn)
    region[0, 0, row, column] = 1
    while True:
        grown = F.max_pool2d(region, 3, stride=1, padding=1) * hot
        if torch.equal(grown, region):
            break
        region = grown
    rows, columns = (torch.nonzero(region[0, 0].amax(dim=axis))[:, 0] for axis in (1, 0))
    left, top, wide, high = part
    x, right, y, bottom = (int(edge) / side for edge in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1))
    return left + x * wide, top + y * high, (right - x) * wide, (bottom - y) * high
