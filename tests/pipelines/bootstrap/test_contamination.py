"""A bootstrap's held-out splits: always compared with what is trained on, byte for byte."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from capfilt.cluster.session import connect
from capfilt.cluster.worker_pool import Resources
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.synthetic import world
from capfilt.errors import RunError
from capfilt.pipelines.bootstrap.contamination import check_held_out
from capfilt.runs.progress import Progress


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded world's four splits."""
    folder = tmp_path_factory.mktemp("splits")
    for split in world.SPLITS:
        world.write(world.WorldConfig(web=30, human=10, val=6, test=6, shard_size=10), 0, folder, split)
    return folder


@pytest.fixture
def leaking(splits: Path, tmp_path: Path) -> dict[str, str]:
    """The same with a test picture among the human ones, under another key and with another text."""
    shutil.copytree(splits, tmp_path / "data")
    human = [one for one in shards.read(str(tmp_path / "data/human/00000.tar")) if isinstance(one, Sample)]
    (url,) = shards.expand(str(tmp_path / "data/test"))
    test = next(one for one in shards.read(url) if isinstance(one, Sample))
    human[4] = replace(human[4], image=test.image, extension=test.extension)
    shards.write(tmp_path / "data/human/00000.tar", human)
    return {split: str(tmp_path / "data" / split) for split in world.SPLITS}


def check(named: dict[str, str], out: Path, allowed: bool = False) -> None:
    urls = {split: shards.expand(name) for split, name in named.items()}
    check_held_out(connect("local"), urls, out, allowed, Resources(), Progress(quiet=True))


def test_the_embedded_world_passes_and_is_not_read_again(splits: Path, tmp_path: Path) -> None:
    named = {split: str(splits / split) for split in world.SPLITS}
    check(named, tmp_path)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    check(named, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == done


def test_splits_that_share_their_shards_are_read_once(splits: Path, tmp_path: Path) -> None:
    same = {"web": splits / "web", "human": splits / "web", "val": splits / "test", "test": splits / "test"}
    check({split: str(path) for split, path in same.items()}, tmp_path)


def test_a_test_picture_among_the_human_ones_stops_the_run_unless_it_is_allowed(
    leaking: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = "1 samples of data.web and data.human are held-out pictures, byte for byte: the first is 000000004 of shard"
    with pytest.raises(RunError, match=first) as stopped:
        check(leaking, tmp_path / "out")
    assert "data.test" in str(stopped.value)
    assert "data.allow_contamination=true" in str(stopped.value)
    with caplog.at_level(logging.WARNING):
        check(leaking, tmp_path / "out", allowed=True)
    assert first in caplog.text


def test_the_run_ends_before_anything_is_trained(leaking: dict[str, str], tmp_path: Path, capfilt: Any) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"extends": "demo", "data": leaking | {"world": None}, "rounds": 0}))
    done = capfilt("bootstrap", recipe, "--out", tmp_path / "run", "--json")
    assert done.code == 1
    assert done.err.startswith("error: 1 samples of data.web and data.human are held-out pictures")
    assert not (tmp_path / "run/round-0").exists()
