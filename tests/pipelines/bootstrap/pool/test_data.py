from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from capfilt.cluster.session import connect
from capfilt.cluster.worker_pool import Resources
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.synthetic import world
from capfilt.data.synthetic.world import WorldConfig
from capfilt.errors import ShardError, ShortfallError
from capfilt.pipelines.bootstrap.pool.data import DataConfig, input_names, named_shards, prepare_data
from capfilt.runs.progress import Progress

SMALL = WorldConfig(web=5, human=2, val=0, test=1, shard_size=2)


def collect(config: DataConfig, folder: Path, seed: int = 0) -> dict[str, list[str]]:
    return prepare_data(connect("local"), config, seed, folder, Resources(), Progress(quiet=True))


def test_the_world_is_written_once_without_its_empty_splits(tmp_path: Path) -> None:
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


def test_named_shards_are_used_where_they_lie(tmp_path: Path) -> None:
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
def test_incomplete_and_double_sources_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(**fields)


class TestDownload:
    def test_a_list_of_urls_is_the_web(self, hostile: Any, tmp_path: Path, picture: Any) -> None:
        rows = "".join(f"{hostile.url(f'/ok?seed={i}')},text {i}\n" for i in range(3))
        (tmp_path / "list.csv").write_text(f"url,caption\n{rows}{hostile.url('/status/404')},gone\n")
        splits = collect(DataConfig(world=SMALL), tmp_path / "world")
        limits = {"allow_private": ("127.0.0.0/8",)}
        web = {"urls": str(tmp_path / "list.csv"), "caption_col": "caption", "shard_size": 2, "limits": limits}
        data = DataConfig.model_validate({"download": web, "human": splits["human"][0]})
        assert [data.has(split) for split in world.SPLITS] == [True, True, False, False]
        fetched = collect(data, tmp_path / "data")
        assert [shards.name(url) for url in fetched["web"]] == ["00000", "00001"]
        texts = [item.text for url in fetched["web"] for item in shards.read(url) if isinstance(item, Sample)]
        assert texts == ["text 0", "text 1", "text 2"]
        summary = json.loads((tmp_path / "data/web/summary.json").read_text())
        assert summary["failed"] == {"http-404": 1}
        num_requests = len(hostile.seen)
        assert collect(data, tmp_path / "data") == fetched
        assert len(hostile.seen) == num_requests

    def test_a_list_of_which_nothing_comes_is_no_web(self, hostile: Any, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text(f"{hostile.url('/status/404')}\n")
        human = collect(DataConfig(world=SMALL), tmp_path / "world")["human"][0]
        web = {"urls": [str(tmp_path / "list.txt")], "limits": {"allow_private": ("127.0.0.0/8",)}}
        data = DataConfig.model_validate({"download": web, "human": human})
        with pytest.raises(ShortfallError, match=r"data\.download: 0 of 1 pictures came; 1 failed by: http-404"):
            collect(data, tmp_path / "data")
        assert json.loads((tmp_path / "data/web/summary.json").read_text())["enough"] is False

    def test_a_plan_knows_the_list_by_its_contents(self, tmp_path: Path) -> None:
        (tmp_path / "list.txt").write_text("http://127.0.0.1:9/1\n")
        human = collect(DataConfig(world=SMALL), tmp_path / "world")["human"][0]
        data = DataConfig.model_validate({"download": {"urls": [str(tmp_path / "list.txt")]}, "human": human})
        before = input_names(data)
        assert before["lists"][0]["name"] == "list.txt"
        (tmp_path / "list.txt").write_text("http://127.0.0.1:9/2\n")
        assert input_names(data)["lists"] != before["lists"]

    def test_shards_or_a_download_and_not_both(self) -> None:
        with pytest.raises(ValidationError, match="both `web` shards and a `download`"):
            DataConfig.model_validate({"download": {"urls": "a.txt"}, "web": "x", "human": "y"})
        with pytest.raises(ValidationError, match="both the embedded world and shards"):
            DataConfig.model_validate({"download": {"urls": "a.txt"}, "world": SMALL})
