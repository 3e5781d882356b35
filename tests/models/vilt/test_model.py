"""ViLT: its size, its pictures of any shape, and what it reads beside them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.errors import CapfiltError, ModelError
from capfilt.models import architecture_of, blank, build, preprocess_of
from capfilt.models.layers.vit import positions_of_shapes
from capfilt.models.vilt.config import ViltConfig
from capfilt.models.vilt.model import Vilt


@pytest.fixture
def model() -> Vilt:
    torch.manual_seed(0)
    tiny = build(architecture_of("vilt/tiny")).eval()
    assert isinstance(tiny, Vilt)
    return tiny


def pictures(*shapes: tuple[int, int]) -> Tensor:
    """Padded pictures of these heights and widths in patches of 8, [B, 4, H, W]."""
    draw = torch.Generator().manual_seed(1)
    images = torch.zeros(len(shapes), 4, 8 * max(h for h, _ in shapes), 8 * max(w for _, w in shapes))
    for image, (h, w) in zip(images, shapes, strict=True):
        image[:3, : 8 * h, : 8 * w] = torch.randn(3, 8 * h, 8 * w, generator=draw)
        image[3, : 8 * h, : 8 * w] = 1
    return images


def fused(model: Vilt, images: Tensor, ids: Tensor, mask: Tensor, chosen: Tensor | None = None) -> Tensor:
    return model.fuse(ids, mask, model.image_context(model.encode_image(images, chosen), "encoder"))


TEXTS = torch.tensor([[2, 30, 40, 50, 3], [2, 60, 3, 0, 0]])
MASK = (TEXTS > 0).long()


def weights(config: object) -> int:
    return sum(p.numel() for p in blank(config).parameters())  # type: ignore[arg-type]


def test_the_public_size_is_exact() -> None:
    """111,595,008 as transformers' ViltModel; the paper's 87.4 million are those without text embeddings."""
    config = architecture_of("vilt/b-32")
    assert isinstance(config, ViltConfig)
    bare = config.changed_heads(())
    assert weights(bare) == 111_595_008
    text = (30522 + 40 + 2 + 2) * 768
    assert weights(bare) - text == pytest.approx(87.4e6, rel=0.01)
    mlm = 768 * 768 + 3 * 768 + 30522 * 768 + 30522
    assert weights(config) == 111_595_008 + mlm + 2 * 768 + 2
    assert config.num_weights == pytest.approx(weights(config), rel=0.01)
    assert preprocess_of(config).multiple == 32
    assert preprocess_of(architecture_of("vilt/tiny")).multiple == 8


def test_positions_of_each_picture_are_interpolated_to_its_own_shape() -> None:
    table = torch.randn(1, 17, 6)
    shapes = [(4, 4), (2, 5), (1, 3), (7, 1)]
    there = torch.zeros(len(shapes), 7, 5, dtype=torch.bool)
    for row, (h, w) in zip(there, shapes, strict=True):
        row[:h, :w] = True
    positions = positions_of_shapes(table, there)
    grid = table[:, 1:].transpose(1, 2).view(1, 6, 4, 4)
    for row, (h, w) in zip(positions, shapes, strict=True):
        expected = F.interpolate(grid, (h, w), mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
        torch.testing.assert_close(row[:h, :w], expected, atol=1e-6, rtol=1e-6)
        assert not row[h:].any()
        assert not row[:, w:].any()


def test_padding_of_pictures_and_texts_changes_nothing(model: Vilt) -> None:
    images = pictures((3, 5), (4, 2))
    together = model.match(fused(model, images, TEXTS, MASK))
    for row, (h, w, length) in enumerate([(3, 5, 5), (4, 2, 3)]):
        alone = images[row : row + 1, :, : 8 * h, : 8 * w]
        logits = model.match(fused(model, alone, TEXTS[row : row + 1, :length], MASK[row : row + 1, :length]))
        torch.testing.assert_close(logits[0], together[row], atol=1e-5, rtol=1e-5)
        # Without the fourth channel all of a picture is one.
        torch.testing.assert_close(
            model.match(fused(model, alone[:, :3], TEXTS[row : row + 1], MASK[row : row + 1])),
            logits,
            atol=1e-5,
            rtol=0,
        )


def test_a_black_picture_is_no_padding(model: Vilt) -> None:
    """ViLT's own code takes zeros for padding; here the fourth channel says where a picture is."""
    images = pictures((3, 3))
    images[:, :3] = 0
    tokens = model.encode_image(images)
    assert tokens.shape == (1, 10, 65)
    assert bool(tokens[:, :, -1].all())


def test_chosen_patches_are_read_alone_in_any_order(model: Vilt) -> None:
    images = pictures((4, 4), (4, 4))
    every = model.match(fused(model, images, TEXTS, MASK))
    shuffled = torch.stack([torch.randperm(16), torch.randperm(16)])
    torch.testing.assert_close(model.match(fused(model, images, TEXTS, MASK, shuffled)), every, atol=1e-5, rtol=1e-5)
    some = model.match(fused(model, images, TEXTS, MASK, shuffled[:, :6]))
    assert (some - every).abs().max() > 1e-4
    unseen = torch.zeros(2, 16, dtype=torch.bool).scatter_(1, shuffled[:, 6:], True)
    changed = images.clone()
    changed[:, :3][unseen.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(2, 3, 32, 32)] = 9.0
    torch.testing.assert_close(model.match(fused(model, changed, TEXTS, MASK, shuffled[:, :6])), some)


def test_texts_of_an_image_are_scored_as_one_by_one(model: Vilt, monkeypatch: pytest.MonkeyPatch) -> None:
    context = model.image_context(model.encode_image(pictures((3, 5), (4, 2))), "encoder")
    ids = TEXTS[[0, 1, 1]]
    expected = model.match(model.fuse(ids, MASK[[0, 1, 1]], context.select(torch.tensor([0, 0, 1]))))
    for most in (256, 2):
        monkeypatch.setattr("capfilt.models.layers.image_context.MAX_PAIRS", most)
        scored = model.match(model.fuse_cls(ids, [5, 3, 3], context, [2, 1]))
        torch.testing.assert_close(scored, expected, atol=1e-5, rtol=1e-5)


def test_pictures_that_patches_do_not_divide_are_refused(model: Vilt) -> None:
    with pytest.raises(ModelError, match="20 x 16 px, which patches of 8 do not divide"):
        model.encode_image(torch.zeros(1, 4, 16, 20))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"text": {"vocab_size": 90, "width": 32}}, "text.width 32 must be vision.width 64"),
        ({"heads": ("vqa",)}, "a classifier has labels"),
        ({"heads": ("vqa", "nlvr2"), "labels": 2}, "one classifier at most"),
    ],
)
def test_architectures_that_cannot_be_are_refused(change: dict[str, object], why: str) -> None:
    tree = architecture_of("vilt/tiny").model_dump()
    with pytest.raises(ValueError, match=why):
        ViltConfig.model_validate(tree | change)


def test_a_picture_size_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(CapfiltError, match="image_size 36 is not a multiple of patch_size 8"):
        architecture_of("vilt/tiny", 36)
