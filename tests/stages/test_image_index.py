from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.cluster.session import connect
from capfilt.cluster.worker_pool import Resources
from capfilt.errors import RunError
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.runs.tally import Tally
from capfilt.stages import image_index

SHARDS, IMAGES = 40, 5


def names_of(shard: int, image: int) -> dict[str, str]:
    number = shard * IMAGES + image
    sha256 = f"{number:032x}{number:032x}"
    own = number % 2  # of half of the images the uid is no part of the sha256
    return {"key": f"{shard:05d}{image:04d}", "uid": f"a{number:031x}" if own else sha256[:32], "sha256": sha256}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    Run.open(tmp_path / "run", "", {"verb": "annotate"})
    ledger = Ledger(tmp_path / "run", "annotate")
    (tmp_path / "run/annotations").mkdir()
    for shard in range(SHARDS):
        commit(ledger, shard, [names_of(shard, image) for image in range(IMAGES)])
    return ledger


def commit(ledger: Ledger, shard: int, images: list[dict[str, str]]) -> None:
    path = ledger.folder / f"annotations/{shard:05d}.parquet"
    pq.write_table(pa.Table.from_pylist([row for row in images for _ in range(2)]), path)
    ledger.commit(path.stem, "f", [path], Tally(samples=Counter({"in": IMAGES, "kept": IMAGES})))


def extend(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, block: int = 16) -> None:
    monkeypatch.setattr(image_index, "LEAST", 10)
    monkeypatch.setattr(image_index, "BLOCK", block)
    with connect("local") as session:
        image_index.extend(session, ledger, Resources(), Progress(quiet=True))


def test_every_name_leads_to_its_shard(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image_index.shards_with(ledger, "x") is None
    extend(ledger, monkeypatch)
    assert len(list(ledger.path.parent.glob("annotate.images-*"))) == 3
    everything = {f"{shard:05d}" for shard in range(SHARDS)}
    for shard in range(SHARDS):
        for column, name in names_of(shard, shard % IMAGES).items():
            assert image_index.shards_with(ledger, name) == ({f"{shard:05d}"}, everything), column
            assert image_index.shards_with(ledger, name.upper()) is not None
    assert image_index.shards_with(ledger, "nobody") == (set(), everything)


def test_explain_opens_what_the_index_names_and_what_it_lacks(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capfilt: Any
) -> None:
    extend(ledger, monkeypatch)
    commit(ledger, SHARDS, [{**names_of(SHARDS, 0), "key": "new"}])
    opened: list[str] = []
    read = Ledger.read
    monkeypatch.setattr(Ledger, "read", lambda self, path: opened.append(path.stem) or read(self, path))
    for name, shards in ((names_of(7, 3)["uid"], ["00007", "00040"]), ("new", ["00040"])):
        opened.clear()
        done = capfilt("explain", ledger.folder, name, "--json")
        assert done.code == 0, done.err
        assert [entry["shard"] for entry in json.loads(done.out)["found"]] == [shards[0]]
        assert opened == shards
    assert capfilt("explain", ledger.folder, "nobody").code == 1


def test_the_index_goes_where_a_shard_of_it_is_done_again(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    extend(ledger, monkeypatch)
    image_index.begin(ledger, ["00099"])
    assert image_index.shards_with(ledger, "x") is not None
    image_index.begin(ledger, ["00099", "00005"])
    assert image_index.shards_with(ledger, "x") is None


@pytest.mark.parametrize("cut", [1, 10, -100])
def test_a_damaged_part_is_named(cut: int, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    extend(ledger, monkeypatch, block=100)
    (part,) = ledger.path.parent.glob("annotate.images-*")
    part.write_bytes(part.read_bytes()[:cut] if cut != -100 else part.read_bytes().replace(b'"bits": ', b'"bits": 3'))
    with pytest.raises(RunError, match=r"annotate\.images-0 cannot be read .*; remove it"):
        for image in range(IMAGES):
            image_index.shards_with(ledger, names_of(SHARDS - 1, image)["key"])


def test_a_damaged_index_stops_no_stage_and_is_made_again(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    extend(ledger, monkeypatch)
    (ledger.path.parent / "annotate.images-1").write_bytes(b"{")
    extend(ledger, monkeypatch)
    key = names_of(30, 1)["key"]
    assert image_index.shards_with(ledger, key) == ({"00030"}, {f"{shard:05d}" for shard in range(SHARDS)})
