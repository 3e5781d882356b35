"""Our CLIP against transformers', by the comparisons of benchmarks/parity_clip.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def parity(pytestconfig: pytest.Config) -> ModuleType:
    """The module benchmarks/parity_clip.py, which imports transformers: once for all that is here."""
    path = pytestconfig.rootpath / "benchmarks" / "parity_clip.py"
    spec = importlib.util.spec_from_file_location("parity_clip", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity_clip"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("direction", ["in", "out"])
def test_every_answer_is_the_same(parity: ModuleType, direction: str, size: int, tmp_path: Path) -> None:
    pair = parity.DIRECTIONS[direction](parity.SHAPES[size], tmp_path)
    assert pair.ours.config.activation == parity.SHAPES[size]["act"]
    far = parity.compare(pair)
    assert len(far) == 6
    assert max(far.values()) <= parity.LIMIT, far


def test_no_tensor_could_be_wrong_unseen(parity: ModuleType, tmp_path: Path) -> None:
    """What the comparisons are worth: each notices a change of any single tensor."""
    import torch

    pair = parity.theirs_to_ours(parity.SHAPES[0], tmp_path)
    unseen = []
    for key, weight in pair.ours.named_parameters():
        before = weight.detach().clone()
        weight.data += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        if max(parity.compare(pair).values()) <= parity.LIMIT:
            unseen.append(key)
        weight.data.copy_(before)
    assert unseen == []


def test_the_other_activation_is_another_model(parity: ModuleType, tmp_path: Path) -> None:
    pair = parity.theirs_to_ours(parity.SHAPES[0], tmp_path)
    other = parity.store.load(tmp_path, activation="gelu").eval()
    far = parity.compare(parity.Pair(pair.theirs, other))
    assert min(far[what] for what in ("image tokens", "text states")) > 1e-4, far
