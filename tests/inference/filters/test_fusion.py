from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.data.text.tokenizer import Tokenizer, clean_caption
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.inference.roles import NEEDS
from capfilt.models import Blip
from capfilt.models.layers.bert import TextTransformer
from capfilt.models.layers.image_context import ImageContext
from capfilt.models.layers.towers_model import TowersModel

MakeBlip = Callable[..., Blip]
TEXTS = [
    ["a red circle"],
    ["a large striped green square", "photo", "", "two blue crosses on a gray background, and a ring above a star"],
    ["A Red CIRCLE!!", "ring"],
    ["x" * 10_000, "small tan ring", "nothing of the kind"],
]


@pytest.fixture(scope="module")
def filter_(small_blip: MakeBlip) -> FusionFilter:
    return FusionFilter(LocalModel(small_blip(roles=("encoder",)), Tokenizer.load("world")), max_length=16)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(4))


def scored(
    filter_: FusionFilter, tokens: Tensor, texts: list[list[str]], context: ImageContext | None = None
) -> list[list[tuple[float, float]]]:
    """(itm, itc) of each text."""
    scores = filter_.score_tokens(tokens, texts, context)
    assert scores["itm"] is not None
    assert scores["itc"] is not None
    return [list(zip(*both, strict=True)) for both in zip(scores["itm"], scores["itc"], strict=True)]


def by_hand(filter_: FusionFilter, image: Tensor, text: str, first: int | None = None) -> tuple[float, float]:
    """One image, one text, nothing beside them."""
    model = filter_.model
    ids = torch.from_numpy(filter_.tokenizer.encode([clean_caption(text)], 16)[0])
    alone = ids.clone()
    alone[:, 0] = model.config.text.enc if first is None else first
    states = model.text(alone, "encoder", None, model.image_context(image[None], "encoder"))
    odds = model.match_head(states[:, 0])[0].double()
    one = model.image_projection(image[0]).double()
    other = model.text_projection(model.text(ids, "encoder", None)[0, 0]).double()
    itm = odds.exp()[1] / odds.exp().sum()
    return itm.item(), F.cosine_similarity(one, other, dim=0).item()


def test_many_are_scored_as_one_by_one(filter_: FusionFilter, images: Tensor) -> None:
    actual = scored(filter_, images, TEXTS)
    assert [len(row) for row in actual] == [1, 4, 2, 3]
    for image, texts, row in zip(images, TEXTS, actual, strict=True):
        for text, (itm, itc) in zip(texts, row, strict=True):
            assert (itm, itc) == pytest.approx(by_hand(filter_, image, text), abs=1e-6)
            assert scored(filter_, image[None], [[text]])[0][0] == pytest.approx((itm, itc), abs=1e-6)
    assert len({round(itm, 4) for row in actual for itm, _ in row}) > 6


def test_an_image_without_texts_beside_others_has_no_scores(filter_: FusionFilter, images: Tensor) -> None:
    actual = scored(filter_, images[:2], [[], ["a red circle"]])
    assert actual[0] == []
    assert actual[1][0] == pytest.approx(by_hand(filter_, images[1], "a red circle"), abs=1e-6)


def test_an_image_is_scored_alike_in_any_batch_and_order(filter_: FusionFilter, images: Tensor) -> None:
    actual = scored(filter_, images, TEXTS)
    for order in ([3, 1, 0, 2], [2, 0], [1]):
        some = [i for i in order if i < len(TEXTS)]
        again = scored(filter_, images[some], [TEXTS[i][::-1] for i in some])
        for i, row in zip(some, again, strict=True):
            np.testing.assert_allclose(row[::-1], actual[i], atol=1e-6)


@pytest.mark.parametrize("most", [1, 4, 5])
def test_many_texts_are_read_some_at_a_time(
    filter_: FusionFilter, images: Tensor, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    wanted = scored(filter_, images, TEXTS)
    monkeypatch.setattr("capfilt.inference.filters.dual_encoder.MAX_TEXTS", most)
    for keys in (None, filter_.model.image_context(images, "encoder")):
        for row, other in zip(scored(filter_, images, TEXTS, keys), wanted, strict=True):
            np.testing.assert_allclose(row, other, atol=1e-6)


def test_no_work_is_done_twice(filter_: FusionFilter, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten alike captions of an image are read beside it once; a text that images share is read alone once."""
    read: list[tuple[int, bool]] = []
    cls_states = TextTransformer.cls_states

    def noted(self: TextTransformer, ids: Tensor, lengths: list[int], *image: object) -> Tensor:
        read.append((sum(lengths), bool(image)))
        return cls_states(self, ids, lengths, *image)  # type: ignore[arg-type]

    monkeypatch.setattr(TextTransformer, "cls_states", noted)
    actual = scored(filter_, images[:2], [["a red circle"] * 10 + ["photo"], ["A red circle!", "photo"]])
    red, photo = (int(filter_.tokenizer.encode([text], 16)[1].sum()) for text in ("a red circle", "photo"))
    assert sorted(read) == [(red + photo, False), (2 * (red + photo), True)], "padding is no work either"
    assert len(set(actual[0])) == 2
    assert actual[0][0] == actual[0][9]


def test_keys_that_are_there_are_not_projected_again(
    filter_: FusionFilter, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = filter_.model.image_context(images, "encoder")
    wanted = scored(filter_, images, TEXTS)
    monkeypatch.delattr(TowersModel, "image_context")
    assert scored(filter_, images, TEXTS, keys) == wanted


def test_pairs_are_scored_at_enc(filter_: FusionFilter, images: Tensor) -> None:
    cls = filter_.tokenizer.cls
    gaps = [
        abs(scored(filter_, image[None], [[text]])[0][0][0] - by_hand(filter_, image, text, first=cls)[0])
        for image, (text, *_) in zip(images, TEXTS, strict=True)
    ]
    assert max(gaps) > 0.01


def test_texts_are_cleaned_first(filter_: FusionFilter, images: Tensor) -> None:
    same = scored(filter_, images[:1], [["a red circle", "A Red CIRCLE!!"]])[0]
    assert same[0] == same[1]


def test_features_are_what_the_cosine_is_of(filter_: FusionFilter, images: Tensor) -> None:
    texts = [row[-1] for row in TEXTS]
    image, text = filter_.image_features(images), filter_.text_features(texts)
    assert image.shape == text.shape == (4, 8)
    wanted = [row[0][1] for row in scored(filter_, images, [[t] for t in texts])]
    np.testing.assert_allclose((image * text).sum(axis=1), wanted, atol=1e-6)


def test_the_match_logit_is_the_positive_column(filter_: FusionFilter, images: Tensor) -> None:
    texts = [row[0] for row in TEXTS]
    actual = filter_.match_logits(images, texts)
    ids, mask = (torch.from_numpy(x) for x in filter_.tokenizer.encode([clean_caption(t) for t in texts], 16))
    model = filter_.model
    logits = model.match(model.fuse(ids, mask, model.image_context(images, "encoder"))).detach()
    np.testing.assert_allclose(actual, logits[:, 1].numpy(), atol=1e-6)
    itm = [row[0][0] for row in scored(filter_, images, [[t] for t in texts])]
    np.testing.assert_allclose(logits.softmax(dim=1)[:, 1].numpy(), itm, atol=1e-6)


def test_it_asks_for_the_encoder(small_blip: MakeBlip) -> None:
    assert small_blip(roles=("encoder",)).capabilities >= {*NEEDS["filter"], "fuse"}
    assert not small_blip(roles=("decoder",)).capabilities >= NEEDS["filter"]
