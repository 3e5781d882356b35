"""Grounding: the boxes of both methods by hand, and shards whose regions have faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from row_shards import picture, write_shard

from capfilt.data.images import decode
from capfilt.data.images.preprocess import ImageFormat, Preprocess
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.errors import DataError
from capfilt.evaluation.tasks import grounding
from capfilt.evaluation.tasks.config import GroundingEvalConfig
from capfilt.inference.local_model import LocalModel
from capfilt.models import architecture_of, build

CPU = torch.device("cpu")
WHOLE = (0.0, 0.0, 36.0, 24.0)


@pytest.fixture(scope="module")
def xvlm() -> LocalModel:
    torch.manual_seed(5)
    model = build(architecture_of("xvlm/tiny")).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    return LocalModel(model, tokenizer_of("world", model.config.tokenizer_kind))


def measure(local: LocalModel, *urls: str, **settings: Any) -> dict[str, Any]:
    config = GroundingEvalConfig(**{"batch_size": 2, **settings})
    return dict(grounding.measure(local, urls, config, CPU).figures)


def region(number: int, text: str, *box: float) -> dict[str, Any]:
    return {"id": number, "text": text, "box": box}


def test_boxes_are_the_head_s_in_pixels_of_each_picture(
    xvlm: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a red circle", "two blue squares on a gray background", "a ring"]
    boxes = [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]
    first = [region(0, texts[0], *boxes[0]), region(1, texts[1], *boxes[1])]
    tall = picture(1, (20, 30))
    url = write_shard(
        tmp_path / "00000.tar",
        {"json": {"regions": first}},
        {"json": {"regions": [region(2, texts[2], *boxes[2])]}, "png": tall},
    )
    given: list[Any] = []
    monkeypatch.setattr(grounding.grounding, "accuracy", lambda *columns: given.append(columns) or {})
    measured = measure(xvlm, url)
    assert measured["grounding"]["method"] == "boxes"
    predicted, wanted = given[0]
    assert wanted == boxes
    for text, data, box in zip(texts, [picture(0), picture(0), tall], predicted, strict=True):
        image = decode.decode(data)
        pixels = xvlm.image_format.preprocess.normalise(torch.from_numpy(xvlm.image_format.to_pixels(image))[None])
        ids = torch.from_numpy(xvlm.tokenizer.encode([text], 40)[0])
        with torch.inference_mode():
            context = xvlm.model.image_context(xvlm.model.encode_image(pixels), "encoder")
            states = xvlm.model.fuse(ids, torch.ones_like(ids), context)
            x, y, width, height = xvlm.model.predict_box(states)[0].tolist()
        shares = [x - width / 2, y - height / 2, width, height]
        assert box == pytest.approx(
            [share * side for share, side in zip(shares, 2 * image.size, strict=True)], abs=1e-3
        )
    assert np.ptp(np.array(predicted)[:2], axis=0).max() > 0.1, "the text decides"


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        (Preprocess(), (0, 0, 36, 24)),
        (Preprocess(resized=20), (3.6, 2.4, 28.8, 19.2)),
        (Preprocess(shape="shortest edge"), (6, 0, 24, 24)),
        (Preprocess(shape="shortest edge", resized=32), (11.0 - 2.0, 3, 18, 18)),
    ],
)
def test_a_box_is_in_the_part_that_the_model_saw(rule: Preprocess, part: tuple[float, ...]) -> None:
    size = {20: 16, 32: 24}.get(rule.resized, 16)
    assert grounding.seen(ImageFormat(size, rule), 36, 24) == pytest.approx(part)


def test_the_proposal_with_the_most_heat_over_the_root_of_its_area_is_chosen() -> None:
    torch.manual_seed(0)
    heat = torch.rand(4, 4)
    rng = np.random.default_rng(0)
    corners = np.sort(rng.uniform(0, (36, 24), (40, 2, 2)), axis=1)
    boxes = tuple(tuple(map(float, (*low, *(high - low)))) for low, high in corners)
    phrase = grounding.Phrase(0, "x", WHOLE, (36, 24), boxes)
    drawn = F.interpolate(heat[None, None], size=(24, 36), mode="bicubic")[0, 0]
    for power in (0.0, 0.5, 1.0):
        scores = [
            float(drawn[int(y) : int(y + h), int(x) : int(x + w)].sum()) / (w * h) ** power for x, y, w, h in boxes
        ]
        assert grounding.best_proposal(heat, phrase, WHOLE, power) == boxes[int(np.argmax(scores))]
    inside = grounding.best_proposal(heat, phrase, (6.0, 0.0, 24.0, 24.0), 0.0)
    assert inside == max(boxes, key=lambda box: min(box[0] + box[2], 30) - max(box[0], 6) if box == inside else 0)


def test_the_hot_box_holds_what_hangs_together_with_the_hottest_spot() -> None:
    heat = torch.zeros(6, 6)
    heat[1, 1], heat[2, 2] = 1.0, 0.9  # between them it is 0.475
    heat[5, 5] = 0.95
    left, top, wide, high = grounding.hot_box(heat, WHOLE, 0.4)
    assert 0 < left < 12 < left + wide < 24
    assert 0 < top < 8 < top + high < 16
    assert grounding.hot_box(torch.zeros(6, 6), WHOLE, 0.5) == WHOLE


def test_every_phrase_is_scored_or_left_out_with_a_reason(xvlm: LocalModel, tmp_path: Path) -> None:
    good = region(1, "a ring", 1, 2, 30, 20)
    proposals = [{"box": [0, 0, 36, 24]}, {"box": [30, 20, 4, 4], "score": 0.5}]
    url = write_shard(
        tmp_path / "00000.tar",
        {"json": {"regions": [good, region(2, "a ring", 1, 2, 0, 2), region(3, "a ring", 30, 2, 9, 2)]}},
        {"json": {"regions": [region(1, "a ring", 1, 2, 3, 4)]}},
        {"json": {"regions": [region(4, "a ring", 1, 2, 3, 4)], "proposals": [{"box": [1, 2]}]}},
        {"json": {"regions": [region(5, "a ring", 1, 2, 3, 4), region(6, "?", 1, 2, 3, 4)]}, "png": b"none"},
        {"json": {"regions": "a ring"}},
        {"json": {"regions": [region(7, "a ring", 31, 21, 2, 2)], "proposals": proposals}},
        {"json": {"captions": ["no regions"]}},
    )
    measured = measure(xvlm, url, method="heatmap")
    figures = measured["grounding"]
    assert (figures["phrases"], figures["method"]) == (2, "heatmap")
    assert figures["whole_picture"]["accuracy"] == 50.0
    assert figures["random_proposal"]["best_accuracy"] == 0.0
    assert figures["random_box"]["accuracy"] < 50
    assert measured["rows"] == 9
    assert sum(measured["left_out"].values()) == 7
    assert measured["left_out"]["picture: not an image"] == 2
    assert measured["left_out"]["its id comes twice"] == 1
    assert "random_proposal" not in measure(xvlm, url)["grounding"], "a head for boxes chooses among none"
    with pytest.raises(DataError, match="nothing can be evaluated"):
        measure(xvlm, write_shard(tmp_path / "00001.tar", {"json": {"captions": ["no regions"]}}))


def test_a_model_that_has_no_head_for_boxes_has_its_heatmaps(small_blip: Callable[..., Any], tmp_path: Path) -> None:
    local = LocalModel(small_blip(), tokenizer_of("world", "wordpiece"))
    url = write_shard(tmp_path / "00000.tar", {"json": {"regions": [region(1, "a ring", 1, 2, 30, 20)]}})
    figures = measure(local, url)["grounding"]
    assert figures["method"] == "heatmap"
    assert math.isfinite(figures["mean_iou"])
