"""Our BLIP-2 against transformers', by the comparisons of benchmarks/parity_blip2.py."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

NAMES = ["Blip2ForImageTextRetrieval", "opt", "t5"]


@pytest.mark.parametrize("shape", [0, 1])
@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_the_same(parity: ModuleType, name: str, direction: str, shape: int, tmp_path: Path) -> None:
    far = parity.compare(parity.DIRECTIONS[direction](name, shape, tmp_path))
    assert len(far) >= 5
    assert max(far.values()) <= parity.LIMIT, far


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_could_be_wrong_unseen(parity: ModuleType, name: str, tmp_path: Path) -> None:
    """What the comparisons are worth: each notices a change of any single tensor."""
    pair = parity.ours_to_theirs(name, 1, tmp_path)
    unseen = []
    for key, weight in pair.ours.named_parameters():
        before = weight.detach().clone()
        weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        if max(parity.compare(pair).values()) <= parity.LIMIT:
            unseen.append(key)
        weight.data.copy_(before)
    # A bias of keys shifts all scores of a query alike: softmax does not see it. ITC's temperature is no answer.
    assert {key for key in unseen if not key.endswith(("key.bias", "k_proj.bias", "temperature"))} == set()


def test_the_page_lists_every_comparison(parity: ModuleType, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    page = (pytestconfig.rootpath / "docs" / "parity.md").read_text().partition(parity.HEADING)[2]
    assert "python benchmarks/parity_blip2.py" in page
    rows = re.findall(r"^\| (Blip2.+?) \| (theirs|ours), .* \| (.*) \| (\S+) \|$", page, re.M)
    told = {(title, direction, what) for title, direction, what, _ in rows}
    for name, title in parity.TITLES.items():
        far = parity.compare(parity.theirs_to_ours(name, 0, tmp_path / name))
        assert {(title, direction, what) for what in far for direction in ("theirs", "ours")} <= told
    assert all(float(far) <= parity.LIMIT for *_, far in rows)
