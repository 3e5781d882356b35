"""CLIP's architecture: its published sizes to the digit, and what its towers read and pass over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from capfilt import presets
from capfilt.errors import ModelError, RecipeError
from capfilt.models import blank, read_architecture
from capfilt.models.clip.config import ClipConfig
from capfilt.models.clip.model import Clip

MakeClip = Callable[..., Clip]
SIZES = {
    "vit-b-32": (151_277_313, "gelu"),
    "vit-b-32-quickgelu": (151_277_313, "quick_gelu"),
    "vit-b-16": (149_620_737, "gelu"),
    "vit-b-16-quickgelu": (149_620_737, "quick_gelu"),
    "vit-l-14": (427_616_513, "gelu"),
    "vit-l-14-quickgelu": (427_616_513, "quick_gelu"),
}


def texts(*rows: list[int]) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


class TestPresets:
    @pytest.mark.parametrize("name", SIZES)
    def test_it_has_as_many_weights_as_published(self, name: str) -> None:
        model = blank(read_architecture(presets.find("models", f"clip/{name}")))
        assert (sum(p.numel() for p in model.parameters()), model.config.activation) == SIZES[name]

    def test_every_preset_is_here_and_says_its_activation(self) -> None:
        named = {name.removeprefix("clip/") for name in presets.names("models") if name.startswith("clip/")}
        assert named == {*SIZES, "tiny"}
        assert all("\nactivation: " in presets.find("models", f"clip/{name}").read_text() for name in named)

    def test_an_activation_is_never_guessed(self, tmp_path: Path) -> None:
        path = tmp_path / "mine.yaml"
        lines = presets.find("models", "clip/tiny").read_text().splitlines()
        path.write_text("\n".join(line for line in lines if not line.startswith("activation")))
        with pytest.raises(RecipeError, match="key 'activation' is missing"):
            read_architecture(path)
        path.write_text("\n".join(lines).replace("patch_size", "activation: quick_gelu, patch_size"))
        with pytest.raises(RecipeError, match="activation is said once"):
            read_architecture(path)


class TestTexts:
    def test_what_stands_behind_the_end_changes_nothing(self, small_clip: MakeClip) -> None:
        model = small_clip()
        end = model.config.vocabulary_size - 1
        ids = texts([802, 5, 6, end], [802, 5, 6, end, 7, 8], [802, 5, 6, end, end, end], [802, 9, 6, end])
        states = model.encode_text(ids, torch.ones_like(ids))
        assert states.shape == (4, 1, 16)
        torch.testing.assert_close(states[1:3], states[:1].expand(2, -1, -1))
        assert (states[3] - states[0]).abs().max() > 1e-3
        torch.testing.assert_close(model.encode_cls(ids[:1, :4], [4]), states[:1])

    def test_a_token_sees_those_before_it_alone(self, small_clip: MakeClip) -> None:
        model = small_clip()
        ids = texts([802, 5, 6, 7, 803])
        other = ids.clone()
        other[0, 3] = 99
        one, two = model.text(ids), model.text(other)
        torch.testing.assert_close(one[:, :3], two[:, :3])
        assert ((one - two)[:, 3:].abs().amax(dim=2) > 1e-4).all()

    def test_a_text_that_is_too_long_is_one_line(self, small_clip: MakeClip) -> None:
        with pytest.raises(
            ModelError, match="a text of 9 tokens, and the model has 8 positions; lower max_length to 8"
        ):
            small_clip(max_positions=8).text(torch.ones(1, 9, dtype=torch.long))


class TestPictures:
    def test_positions_are_resized_as_open_clip_does(self, small_clip: MakeClip) -> None:
        saved, other = small_clip(image_size=64), small_clip(image_size=32)
        tensors = dict(saved.state_dict())
        other.adapt(tensors)
        grid = saved.vision.positions[0, 1:].reshape(1, 8, 8, 24).permute(0, 3, 1, 2)
        wanted = F.interpolate(grid, (4, 4), mode="bicubic", antialias=True, align_corners=False)
        torch.testing.assert_close(tensors["vision.positions"][0, 1:], wanted[0].flatten(1).T)
        torch.testing.assert_close(tensors["vision.positions"][:, 0], saved.vision.positions[:, 0])
        plain = F.interpolate(grid, (4, 4), mode="bicubic", align_corners=False)
        assert (plain - wanted).abs().max() > 0.01

    def test_unit_vectors_are_fp32_under_autocast_and_float64_in_float64(self, small_clip: MakeClip) -> None:
        model, pictures = small_clip(), torch.randn(2, 3, 16, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.project_image(model.encode_image(pictures)).dtype == torch.float32
        fine = small_clip().double()
        image = fine.project_image(fine.encode_image(pictures.double()))
        assert image.dtype == torch.float64
        torch.testing.assert_close(image.norm(dim=1), torch.ones(2, dtype=torch.double))


def test_it_compares_and_does_nothing_else(small_clip: MakeClip) -> None:
    model = small_clip()
    assert model.capabilities == {"encode_image", "encode_text"}
    assert model.config.for_role("filter") == model.config
    assert model.config.scored_length == 77
    assert ClipConfig.model_validate(model.config.model_dump()) == model.config
    with pytest.raises(AssertionError, match="a model of the family clip cannot decode"):
        model.decode(torch.ones(1, 2, dtype=torch.long), None, None)  # type: ignore[arg-type]
