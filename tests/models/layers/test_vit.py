from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from capfilt.models.layers.config import VisionConfig
from capfilt.models.layers.vit import VisionTransformer, resize_positions

SMALL = VisionConfig(image_size=16, patch_size=8, width=8, depth=2, heads=2, hidden=16, init_std=0.3)


def cubic(x: float, a: float = -0.75) -> float:
    """The kernel of bicubic interpolation, as image libraries define it."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def slow_bicubic(line: np.ndarray, size: int) -> np.ndarray:
    """Resize the first axis: pixel middles are aligned, edges repeat."""
    old = len(line)
    out = np.zeros((size, *line.shape[1:]))
    for i in range(size):
        middle = (i + 0.5) * old / size - 0.5
        for j in range(int(np.floor(middle)) - 1, int(np.floor(middle)) + 3):
            out[i] += cubic(middle - j) * line[min(max(j, 0), old - 1)]
    return out


@pytest.fixture(scope="module")
def tower() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(SMALL).double().eval()


def test_tokens_are_cls_and_then_patches_row_by_row(tower: VisionTransformer) -> None:
    image = torch.randn(1, 3, 16, 16, dtype=torch.double)
    tokens = tower(image)
    assert tokens.shape == (1, 1 + 4, 8)
    kernel = tower.patches.weight.flatten(1)
    x = [tower.cls[0, 0]]
    for row in range(2):
        for column in range(2):
            patch = image[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].flatten()
            x.append(kernel @ patch + tower.patches.bias)
    states = torch.stack(x)[None] + tower.positions
    for block in tower.blocks:
        states = states + block.attention(block.attention_norm(states))
        states = states + block.feed_forward(block.feed_forward_norm(states))
    torch.testing.assert_close(tokens, tower.norm(states))


def test_pictures_of_a_batch_do_not_see_each_other(tower: VisionTransformer) -> None:
    images = torch.randn(3, 3, 16, 16, dtype=torch.double)
    together = tower(images)
    torch.testing.assert_close(together, torch.cat([tower(image[None]) for image in images]))


def test_stochastic_depth_grows_linearly_to_its_rate() -> None:
    config = SMALL.model_copy(update={"depth": 5, "drop_path": 0.2})
    rates = VisionTransformer(config).rates
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_fresh_weights_have_the_configured_spread() -> None:
    torch.manual_seed(0)
    wide = VisionTransformer(SMALL.model_copy(update={"width": 64, "heads": 2, "hidden": 256, "init_std": 0.02}))
    assert float(wide.blocks[0].feed_forward.up.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(wide.blocks[0].attention.qkv.bias.detach().abs().max()) == 0


@pytest.mark.parametrize("wrong", [{"image_size": 20}, {"heads": 3}])
def test_sizes_that_do_not_divide_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="is not a multiple of"):
        VisionConfig(**{**SMALL.model_dump(), **wrong})


class TestResizePositions:
    @pytest.mark.parametrize(("patch", "old", "new"), [(16, 224, 384), (16, 224, 480), (16, 384, 224), (8, 32, 64)])
    def test_is_bicubic_over_the_grid(self, patch: int, old: int, new: int) -> None:
        torch.manual_seed(0)
        side, wanted = old // patch, new // patch
        positions = torch.randn(1, 1 + side * side, 4)
        found = resize_positions(positions, new, patch)
        grid = positions[0, 1:].double().numpy().reshape(side, side, 4)
        slow = slow_bicubic(slow_bicubic(grid, wanted).swapaxes(0, 1), wanted).swapaxes(0, 1)
        assert found.shape == (1, 1 + wanted * wanted, 4)
        np.testing.assert_allclose(found[0, 1:].numpy(), slow.reshape(-1, 4), atol=1e-5)

    def test_keeps_cls(self) -> None:
        positions = torch.randn(1, 1 + 14 * 14, 4)
        assert torch.equal(resize_positions(positions, 384, 16)[:, 0], positions[:, 0])

    def test_changes_nothing_at_the_same_size(self) -> None:
        positions = torch.randn(1, 1 + 14 * 14, 4)
        assert torch.equal(resize_positions(positions, 224, 16), positions)

    def test_keeps_the_format(self) -> None:
        positions = torch.randn(1, 5, 4, dtype=torch.bfloat16)
        assert resize_positions(positions, 32, 8).dtype == torch.bfloat16


def test_stochastic_depth_is_of_training_alone() -> None:
    deep = VisionTransformer(SMALL.model_copy(update={"drop_path": 0.9}))
    pictures = torch.randn(8, 3, 16, 16)
    assert torch.equal(deep.eval()(pictures), deep(pictures))
    assert not torch.equal(deep.train()(pictures), deep(pictures))


class TestRecompute:
    """Blocks that keep no activations, as BLIP's fine-tuning has for its last ones."""

    def passed(self, recompute: int) -> tuple[list[torch.Tensor], int]:
        """The gradients of a pass with stochastic depth, and how many numbers were kept for it."""
        torch.manual_seed(0)
        deep = VisionTransformer(SMALL.model_copy(update={"depth": 4, "drop_path": 0.5})).double().train()
        deep.recompute = recompute
        kept = []

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept.append(x.numel())
            return x

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = deep(torch.randn(2, 3, 16, 16, dtype=torch.double))
            forward = sum(kept)
            out.square().sum().backward()
        return [out, *(p.grad for p in deep.parameters())], forward

    def test_gradients_are_the_same_and_less_is_kept(self) -> None:
        plain, most = self.passed(0)
        for recompute in (1, 4):
            again, kept = self.passed(recompute)
            torch.testing.assert_close(again, plain, atol=0, rtol=0)
            assert kept < most
            most = kept

    def test_without_gradients_nothing_is_computed_twice(self) -> None:
        deep = VisionTransformer(SMALL)
        deep.recompute = 2
        calls = []
        for block in deep.blocks:
            block.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            deep(torch.randn(1, 3, 16, 16))
        assert len(calls) == 2
