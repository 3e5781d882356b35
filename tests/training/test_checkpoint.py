from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from capfilt.errors import ModelError
from capfilt.training import checkpoint


def pair(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    """A module that has taken a step, and its optimizer."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def flat(state: object) -> list[object]:
    """All leaves of a nest of dicts and lists."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    if isinstance(state, list | tuple):
        return [leaf for item in state for leaf in flat(item)]
    return [state.tolist() if isinstance(state, torch.Tensor) else state]


def test_a_state_comes_back_whole(tmp_path: Path) -> None:
    (module, optimizer), (other, its) = pair(0), pair(1)
    checkpoint.save(tmp_path, module, optimizer, 7, "me")
    assert flat(other.state_dict()) != flat(module.state_dict())
    assert checkpoint.resume(tmp_path, other, its, "me") == 7
    assert flat(other.state_dict()) == flat(module.state_dict())
    assert flat(its.state_dict()) == flat(optimizer.state_dict())


def test_without_a_state_a_training_begins_at_0(tmp_path: Path) -> None:
    assert checkpoint.resume(tmp_path, *pair(0), "me") == 0


def test_a_newer_state_replaces_the_older_and_leaves_no_scraps(tmp_path: Path) -> None:
    module, optimizer = pair(0)
    for step in (3, 6):
        checkpoint.save(tmp_path, module, optimizer, step, "me")
    assert checkpoint.resume(tmp_path, module, optimizer, "me") == 6
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    checkpoint.discard(tmp_path)
    checkpoint.discard(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, *pair(0), 7, "me")
    module, optimizer = pair(1)
    before = flat(module.state_dict())
    with pytest.raises(ModelError, match="belongs to another training"):
        checkpoint.resume(tmp_path, module, optimizer, "you")
    assert flat(module.state_dict()) == before


@pytest.mark.parametrize("keep", [0, 100, 2000])
def test_a_damaged_state_is_refused(tmp_path: Path, keep: int) -> None:
    checkpoint.save(tmp_path, *pair(0), 7, "me")
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"state\.pt is damaged .* delete it to begin again"):
        checkpoint.resume(tmp_path, *pair(0), "me")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    torch.save({"identity": Trap()}, tmp_path / "state.pt")
    with pytest.raises(ModelError, match="is damaged"):
        checkpoint.resume(tmp_path, *pair(0), "me")
    assert not (tmp_path / "sprung").exists()


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path: Path) -> None:
    module, optimizer = pair(0)
    checkpoint.save(tmp_path, module, optimizer, 3, "me")
    with torch.no_grad():
        module[0].bias[1] = torch.nan  # type: ignore[index, operator]
    with pytest.raises(ModelError, match=r"1 weights are not finite after step 6, first 0\.bias"):
        checkpoint.save(tmp_path, module, optimizer, 6, "me")
    assert checkpoint.resume(tmp_path, module, optimizer, "me") == 3
