from __future__ import annotations

from pathlib import Path

import pytest
import torch

from capfilt.data.loading import features
from capfilt.data.loading.features import Features
from capfilt.errors import DataError


@pytest.mark.parametrize("dtype", features.DTYPES)
def test_what_is_written_is_read_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    seen = torch.randn(5, 3, 4).to(dtype)
    batches = [(["a", "b", "c"], seen[:3]), (["d", "a"], seen[3:])]
    assert features.write(tmp_path / "0.safetensors", batches) == 4
    kept = Features({"0.tar": tmp_path / "0.safetensors"})
    for uid, one in zip("abcd", seen, strict=False):
        found = kept.of("0.tar", uid)
        assert found is not None
        assert found.dtype == dtype
        assert torch.equal(found, one), "of an image that comes twice the first is kept"
    assert kept.of("0.tar", "unreadable") is None


def test_it_is_a_safetensors_file_like_any_other(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    seen = torch.randn(2, 3, 4)
    features.write(tmp_path / "0.safetensors", [(["a", "b"], seen)])
    assert torch.equal(load_file(tmp_path / "0.safetensors")["b"], seen[1])


def test_a_shard_without_pictures_has_none(tmp_path: Path) -> None:
    assert features.write(tmp_path / "0.safetensors", []) == 0
    assert Features({"0.tar": tmp_path / "0.safetensors"}).of("0.tar", "a") is None


def test_a_kill_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    def dying() -> object:
        yield ["a"], torch.randn(1, 3, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features.write(tmp_path / "0.safetensors", dying())
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_which_nothing_was_kept_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"9\.tar: no features were kept"):
        Features({}).of("9.tar", "a")
