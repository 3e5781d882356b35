"""Rows of what a text attends to are those of its tensors, whichever there are."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_flatten

from capfilt.models.layers.image_context import ImageContext, cls_of_pairs

KEYS, VALUES = torch.arange(24.0).view(3, 2, 4), torch.arange(24.0).view(3, 2, 4) + 100


def test_layers_come_back_as_they_were_given() -> None:
    context = ImageContext.of_layers([(KEYS, VALUES), (VALUES, KEYS)])
    assert (context.rows, context.device) == (3, torch.device("cpu"))
    assert [(k is KEYS, v is VALUES) for k, v in context.layers] == [(True, True), (False, False)]


def test_rows_are_chosen_and_repeated_as_torch_does() -> None:
    states = torch.randn(3, 5, 4)
    mask = torch.rand(3, 1, 1, 5) < 0.5
    context = ImageContext((KEYS, VALUES, states), mask)
    for chosen, index in (
        (context.select(slice(1, 3)), [1, 2]),
        (context.select(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (context.repeat(2), [0, 1, 2, 0, 1, 2]),
        (context.repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        assert chosen.rows == len(index)
        for tensor, one in zip(chosen.tensors, (KEYS, VALUES, states), strict=True):
            assert torch.equal(tensor, one[index])
        assert chosen.mask is not None
        assert torch.equal(chosen.mask, mask[index])


def test_what_several_layers_share_is_chosen_once() -> None:
    chosen = ImageContext.of_layers([(KEYS, KEYS), (VALUES, KEYS)]).select(torch.tensor([2, 0]))
    assert [tensor is chosen.tensors[0] for tensor in chosen.tensors] == [True, True, False, True]
    assert torch.equal(chosen.tensors[2], VALUES[[2, 0]])


def test_hooks_that_walk_over_outputs_find_the_tensors() -> None:
    """FSDP gathers weights for the backward pass by hooks on the tensors that a method returns."""
    flat, _ = tree_flatten({"context": ImageContext((KEYS, VALUES))})
    leaves = [leaf for leaf in flat if leaf is not None]
    assert [leaf is tensor for leaf, tensor in zip(leaves, (KEYS, VALUES), strict=True)] == [True, True]


def test_laid_out_for_decoding_every_row_lies_together_with_the_same_numbers() -> None:
    context = ImageContext.of_layers([(torch.randn(3, 5, 2, 4).transpose(1, 2), torch.randn(3, 2, 5, 4))])
    laid_out = context.laid_out()
    assert all(tensor.is_contiguous() for tensor in laid_out.tensors)
    assert not context.tensors[0].is_contiguous()
    assert all(torch.equal(one, two) for one, two in zip(laid_out.tensors, context.tensors, strict=True))


def test_no_number_is_read_from_the_device_to_lay_pairs_out() -> None:
    """A GPU would be waited for. The meta device has no numbers."""
    seen = []

    def fuse(ids: torch.Tensor, mask: torch.Tensor, image: ImageContext) -> torch.Tensor:
        seen.append((ids.shape, mask.shape, image.rows))
        return ids[:, :, None].float()

    image = ImageContext((KEYS.to("meta"),))
    cls = cls_of_pairs(fuse, torch.zeros(4, 7, dtype=torch.long, device="meta"), [2, 5, 3, 1], image, [1, 0, 3])
    assert cls.shape == (4, 1, 1)
    assert seen == [((4, 5), (4, 5), 4)]
