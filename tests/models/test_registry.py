"""What the table of families says of each agrees with its code."""

from __future__ import annotations

import pytest
import torch

from capfilt import presets
from capfilt.models import FAMILIES, blank
from capfilt.models.registry import read_architecture


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_exported_in_a_layout_that_its_code_has(name: str) -> None:
    family = FAMILIES[name]
    assert family.name == name
    assert (family.written_as == "hf") == (family.code.transformers is not None)
    assert (family.written_as == "pth") <= (family.code.original is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_blank_model_draws_no_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw on the meta device runs through torch's slowest path, which imports torch._dynamo for a second."""
    drawn: list[str] = []
    for draw in ("normal_", "uniform_", "trunc_normal_"):
        monkeypatch.setattr(
            torch.Tensor, draw, lambda tensor, *_, **__: drawn.append("a draw") or tensor, raising=False
        )
    tensors = blank(read_architecture(presets.find("models", f"{name}/tiny"))).state_dict()
    assert {tensor.device.type for tensor in tensors.values()} == {"meta"}
    assert not drawn
