"""A filter that reads texts beside images alone gives itm and no itc, and ranks by every pair (ViLT)."""

from __future__ import annotations

import logging
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import Sample
from capfilt.data.shards import write
from capfilt.data.text.bert_tokenizers import BertTokenizer
from capfilt.errors import DataError, RecipeError
from capfilt.evaluation import evaluate
from capfilt.evaluation.config import EvaluateConfig
from capfilt.evaluation.eval_set import encode_pairs
from capfilt.evaluation.metrics import retrieval
from capfilt.inference.batches import Images
from capfilt.inference.filters import local_filter
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.inference.roles import check_capabilities, check_filter, scores_given
from capfilt.models import architecture_of, build, preprocess_of
from capfilt.models.checkpoints import store

CPU = torch.device("cpu")
SHAPES = [(32, 32), (60, 32), (32, 45), (90, 30)]
TEXTS = [["a red ring"], ["a blue cross", "a green square"], ["a white disc"], ["a small yellow triangle"]]


@pytest.fixture(scope="module")
def local() -> LocalModel:
    torch.manual_seed(0)
    config = architecture_of("vilt/tiny")
    return LocalModel(build(config).eval(), BertTokenizer.load("world"), preprocess_of(config))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SHAPES]


def images(local: LocalModel, pictures: list[Image.Image]) -> Images:
    rule: ImageFormat = local.image_format
    stacked = rule.preprocess.stack([rule.to_pixels(picture) for picture in pictures])
    return Images({rule: rule.preprocess.normalise(stacked)})


def test_it_can_be_the_filter_and_gives_itm_alone(local: LocalModel, tmp_path: Path) -> None:
    able = local.model.capabilities
    assert scores_given(able) == ("itm",)
    check_capabilities("filter", "m", able)
    store.save(local.model, tmp_path)
    local.tokenizer.save(tmp_path)
    check_filter(tmp_path, ["itm"])
    with pytest.raises(RecipeError, match=r"itc is needed, and .* gives itm alone: set score=itm"):
        check_filter(tmp_path, ["itc"])
    with pytest.raises(RecipeError, match="m cannot be the captioner: it cannot decode"):
        check_capabilities("captioner", "m", able)


def test_a_text_has_the_same_score_in_any_batch(local: LocalModel, pictures: list[Image.Image]) -> None:
    filter_ = local_filter(local)
    together = filter_.score(images(local, pictures), TEXTS)
    assert together["itc"] is None
    assert together["itm"] is not None
    assert [len(of_image) for of_image in together["itm"]] == [1, 2, 1, 1]
    for picture, texts, scores in zip(pictures, TEXTS, together["itm"], strict=True):
        assert all(0 <= score <= 1 for score in scores)
        for text, score in zip(texts, scores, strict=True):
            alone = filter_.score(images(local, [picture]), [[text]])["itm"]
            assert alone is not None
            assert alone[0][0] == pytest.approx(score, abs=1e-5)
    assert len({round(score, 6) for of_image in together["itm"] for score in of_image}) == 5


def test_retrieval_ranks_every_pair_by_itm(
    local: LocalModel, pictures: list[Image.Image], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches of pictures of unequal shapes are padded when they are put together."""
    samples = []
    for number, (picture, texts) in enumerate(zip(pictures, TEXTS, strict=True)):
        picture.save(stream := BytesIO(), "png")
        captions = [{"text": text, "source": "human"} for text in texts]
        samples.append(Sample(f"{number:03d}", stream.getvalue(), "png", texts[0], {"captions": captions}))
    tar = tmp_path / "00000.tar"
    write(tar, samples)
    pairs = encode_pairs(local, [str(tar)], 1, CPU)
    shapes = {local.image_format.to_pixels(picture).shape for picture in pictures}
    assert len(shapes) == 4
    assert pairs.tokens.shape == (4, 1 + max(h * w for h, w, _ in shapes) // 64, 65)
    filter_ = local_filter(local)
    assert isinstance(filter_, FusionFilter)
    logits = np.array(
        [filter_.match_logits(tokens[None].expand(5, -1, -1), pairs.flat_texts) for tokens in pairs.tokens]
    )
    figures = evaluate.examine(local, [str(tar)], EvaluateConfig(batch_size=2), CPU)
    assert figures == {"retrieval": pytest.approx(retrieval.recalls(logits, pairs.image_of_text))}
    with pytest.raises(DataError, match="5 texts beside 4 images each, 20 pairs, of which itm_pairs allows 19"):
        evaluate.examine(local, [str(tar)], EvaluateConfig(itm_pairs=19), CPU)
    assert "retrieval is not measured" in caplog.records[0].message
    assert caplog.records[0].levelno == logging.WARNING
