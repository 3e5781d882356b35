"""A bootstrap's held-out splits: always compared with what is trained on, byte for byte."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from capfilt.cluster.session import connect
from capfilt.cluster.worker_pool import Resources
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.synthetic import world
from capfilt.errors import RunError
from capfilt.pipelines.bootstrap.pool.cleaning import check_held_out
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
    done = {stage: sorted(path.stem for path in (tmp_path / "ledger" / stage).glob("*.json"))
            for stage in ("held-out", "decontaminate-exact")}  # fmt: skip
    named = {split: sorted(shards.by_name(shards.expand(str(splits / split)))) for split in ("test", "web")}
    assert done == {"held-out": named["test"], "decontaminate-exact": named["web"]}


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


@pytest.fixture(scope="module")
def repeated(splits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The splits, with a test picture and two copies of one picture in the web's first shard."""
    home = tmp_path_factory.mktemp("repeated")
    shutil.copytree(splits, home / "data")
    web = [one for one in shards.read(str(home / "data/web/00000.tar")) if isinstance(one, Sample)]
    test = next(one for url in shards.expand(str(home / "data/test")) for one in shards.read(url))
    assert isinstance(test, Sample)
    web[3] = replace(web[3], image=test.image, extension=test.extension)
    for number in (5, 6):
        web[number] = replace(web[number], image=web[0].image, text=f"another text of it, {number}")
    shards.write(home / "data/web/00000.tar", web)
    return {split: str(home / "data" / split) for split in world.SPLITS}


def test_copies_and_held_out_pictures_go_before_round_0(repeated: dict[str, str], tmp_path: Path, capfilt: Any) -> None:
    """By bytes: drawn pictures are near each other by hash."""
    by = {"dedup": {"by": "sha256", "merge_texts": True}, "decontaminate": {"by": "sha256", "self_test": 5}}
    tree = {"extends": "demo", "data": repeated | by | {"world": None}, "rounds": 0, "model": "blip/tiny"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    words = ["bootstrap", tmp_path / "mine.yaml", "--out", tmp_path / "run", "--set", "pretrain.steps=1", "--json"]
    words += ["--set", "pretrain.image_size=16", "--set", "pretrain.loader.batch_size=4"]
    done = capfilt(*words)
    assert done.code == 0, done.err
    kept = tmp_path / "run/data/web-kept"
    assert [path.name for path in sorted(kept.glob("*.tar"))] == ["00000.tar"], "the others are used where they lie"
    before = [one for one in shards.read(f"{repeated['web']}/00000.tar") if isinstance(one, Sample)]
    after = {one.key: one for one in shards.read(str(kept / "00000.tar")) if isinstance(one, Sample)}
    gone = {before[number].key for number in (3, 5, 6)} | {before[0].key} - set(after)
    assert len(after) == 7
    stands = next(one for one in after.values() if one.sha256 == before[0].sha256)
    assert len(stands.captions) == 3, "it has the texts of its copies"
    rows = {row["key"]: row["reason"] for row in pq.read_table(kept / "left-out/00000.parquet").to_pylist()}
    assert set(rows) == {one.key for one in before} - set(after) <= gone | {before[0].key}
    assert sorted(reason.rpartition(" ")[0] for reason in rows.values()) == ["duplicate of"] * 2 + ["held-out image"]
    tally = json.loads((kept / "ledger/leave-out/00000.json").read_text())["tally"]
    assert tally["samples"] == {"in": 10, "kept": 7, "dropped": 3, "failed": 0}
    assert "held-out image" in capfilt("explain", tmp_path / "run", before[3].key).out
    page = (tmp_path / "run/report.html").read_text()
    assert "contaminated: 1 of 30 samples (sha256)" in page
    log = [json.loads(line) for line in (tmp_path / "run/round-0/pretrain/log.jsonl").read_text().splitlines()]
    assert len(log) == 1
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/data").rglob("*") if path.is_file()}
    assert capfilt(*words).code == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run/data").rglob("*") if path.is_file()} == files


@pytest.mark.parametrize("by", ["vector:0.9", "looks", "phash:99"])
def test_a_recipe_compares_hashes_alone(by: str, repeated: dict[str, str], tmp_path: Path, capfilt: Any) -> None:
    tree = {"extends": "demo", "data": repeated | {"world": None, "decontaminate": {"by": by}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    done = capfilt("bootstrap", tmp_path / "mine.yaml", "--out", tmp_path / "run")
    assert done.code == 2
    assert "data.decontaminate.by" in done.err
