from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from capfilt.cluster.session import connect
from capfilt.cluster.spread import Resources
from capfilt.data import shards, world
from capfilt.data.sample import Sample
from capfilt.data.world import WorldConfig
from capfilt.errors import ShardError
from capfilt.pipelines.corpus import DataConfig, gather, named_shards
from capfilt.reports.progress import Progress

SMALL = WorldConfig(web=5, human=2, val=0, test=1, shard_size=2)


def collect(config: DataConfig, folder: Path, seed: int = 0) -> dict[str, list[str]]:
    return gather(connect("local"), config, seed, folder, Resources(), Progress(quiet=True))


def test_the_world_is_written_once_and_a_split_of_none_is_no_split(tmp_path: Path) -> None:
    data = DataConfig(world=SMALL)
    splits = collect(data, tmp_path / "data")
    assert {split: [shards.name(url) for url in urls] for split, urls in splits.items()} == {
        "web": ["00000", "00001", "00002"], "human": ["00000"], "test": ["00000"],
    }  # fmt: skip
    assert [data.has(split) for split in world.SPLITS] == [True, True, False, True]
    keys = [item.key for url in splits["web"] for item in shards.read(url) if isinstance(item, Sample)]
    assert keys == [world.sample(SMALL, 0, "web", i).key for i in range(5)]
    stamp = Path(splits["web"][0]).stat().st_mtime_ns
    assert collect(data, tmp_path / "data") == splits
    assert Path(splits["web"][0]).stat().st_mtime_ns == stamp


def test_shards_are_found_where_they_are_named(tmp_path: Path) -> None:
    splits = collect(DataConfig(world=SMALL), tmp_path / "data")
    spec = str(tmp_path / "data/web/{00000..00001}.tar")
    named = DataConfig(web=spec, human=(splits["human"][0],))
    expected = {"web": splits["web"][:2], "human": splits["human"]}
    assert named_shards(named) == expected
    assert collect(named, tmp_path / "elsewhere") == expected
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(ShardError, match="no shard found"):
        collect(DataConfig(web=spec, human=str(tmp_path / "absent")), tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"web": "a"}, {"human": "a"}, {"world": SMALL, "web": "a"}, {"world": SMALL, "test": "a"},
        {"world": SMALL.model_copy(update={"web": 0})},
    ],
)  # fmt: skip
def test_one_source_and_a_whole_one(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(**fields)
