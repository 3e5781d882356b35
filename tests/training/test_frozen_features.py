from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.loading.loader import Loader
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ModelError
from capfilt.models import Blip2
from capfilt.training.frozen_features import fingerprint_of, prepare

CPU = torch.device("cpu")


def prepared(model: Blip2, world: Path, folder: Path) -> dict[str, int]:
    prepare(model, [Source(shards=str(world / "human"))], folder, folder, CPU)
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(("frozen", "rtol"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_batches_are_what_the_tower_sees_of_their_pictures(
    small_blip2: Callable[..., Blip2], small_world: Path, tmp_path: Path, frozen: str, rtol: float
) -> None:
    model = small_blip2(frozen=frozen)
    sources = [Source(shards=str(small_world / "human"))]
    kept = prepare(model, sources, tmp_path, tmp_path, CPU)
    given = (sources, LoaderConfig(batch_size=8, shuffle=32), Tokenizer.load("world"), 16, 0)
    plain, cached = Loader(*given), Loader(*given)
    cached.features = kept
    for one, other in islice(zip(plain.batches(), cached.batches(), strict=True), 3):
        assert one.uids == other.uids
        assert torch.equal(one.ids, other.ids)
        seen = model.encode_frozen(one.images)
        assert other.images.shape == seen.shape
        torch.testing.assert_close(other.images.float(), seen.float(), rtol=rtol, atol=rtol)
        torch.testing.assert_close(
            model.encode_image(other.images), model.encode_image(one.images), rtol=rtol, atol=4 * rtol
        )


def test_what_is_kept_is_not_computed_again(
    small_blip2: Callable[..., Blip2], small_world: Path, tmp_path: Path
) -> None:
    first = prepared(small_blip2(), small_world, tmp_path)
    assert len(first) == 3
    (gone, *_) = sorted(first)
    (tmp_path / gone).unlink()
    again = prepared(small_blip2(), small_world, tmp_path)
    assert again.keys() == first.keys()
    assert {name for name in first if again[name] != first[name]} == {gone}


def test_another_tower_size_or_format_is_another_file(
    small_blip2: Callable[..., Blip2], small_world: Path, tmp_path: Path
) -> None:
    models = [small_blip2(), small_blip2(seed=1), small_blip2(image_size=24), small_blip2(frozen="bf16")]
    assert len({fingerprint_of(model.frozen_tower) for model in models}) == 4
    towers = [small_blip2("opt").frozen_tower, small_blip2().frozen_tower]
    assert fingerprint_of(towers[0]) == fingerprint_of(towers[1]), "a tower is a tower in either stage"
    assert [len(prepared(model, small_world, tmp_path)) for model in models[:2]] == [3, 6]


def test_a_tower_that_is_trained_is_refused(
    small_blip: Callable[..., object], small_world: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="and this one is trained"):
        prepare(small_blip(), [Source(shards=str(small_world / "human"))], tmp_path, tmp_path, CPU)  # type: ignore[arg-type]
