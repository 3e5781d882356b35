"""`capfilt index` and `capfilt retrieve`: a pool of pictures searched by text and by picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tars import tar_of

import capfilt as api
from capfilt.data import embeddings, shards
from capfilt.data.embeddings import Vectors
from capfilt.data.sample import Sample
from capfilt.data.text.byte_bpe import ByteBpeTokenizer
from capfilt.errors import DataError, UsageError
from capfilt.index import lists, pool, search
from capfilt.models.checkpoints import store


@pytest.fixture(scope="module")
def tar(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of the embedded world, and one whose key wants to be a script."""
    folder = tmp_path_factory.mktemp("shards")
    first = sorted(small_world.rglob("*.tar"))[0]
    (sample, *_) = (one for one in shards.read(str(first)) if isinstance(one, Sample))
    hostile = (f"<script>x&{'k' * 20}.{sample.extension}", sample.image), (f"<script>x&{'k' * 20}.txt", b"a ring")
    (folder / "00000.tar").write_bytes(tar_of(*hostile, has_end=False) + first.read_bytes())
    return folder / "00000.tar"


@pytest.fixture(scope="module")
def index(tar: Path, small_clip: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    store.save(small_clip(max_positions=50), folder / "model")
    ByteBpeTokenizer.load("world").save(folder / "model")
    api.embed(str(tar), model=folder / "model", out=folder / "e", address="local")
    made = api.build_index(folder / "e", out=folder / "i", address="local")
    assert (made.pictures, made.lists, made.recall) == (17, 1, None)
    return folder / "i"


def test_a_text_finds_what_its_cosines_say(index: Path, capfilt: Any) -> None:
    done = capfilt("retrieve", "--index", index, "a red ring", "--k", "5", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    table = embeddings.read(index.parent / "e/embeddings/00000.parquet")
    import torch

    from capfilt.inference.filters.dual_encoder import DualEncoderFilter
    from capfilt.inference.local_model import LocalModel

    model = DualEncoderFilter(LocalModel.load(index.parent / "model", torch.device("cpu")))
    cosines = embeddings.matrix(table).astype(np.float64) @ model.text_features(["a red ring"])[0]
    best = np.argsort(-cosines)[:5]
    assert [hit["key"] for hit in answer["hits"]] == [table["key"][int(row)].as_py() for row in best]
    assert [hit["uid"] for hit in answer["hits"]] == [table["uid"][int(row)].as_py() for row in best]
    assert [hit["cosine"] for hit in answer["hits"]] == pytest.approx(cosines[best].tolist(), abs=2e-3)
    shown = capfilt("retrieve", "--index", index, "a red ring", "--k", "2")
    assert shown.code == 0
    assert answer["hits"][0]["uid"] in shown.out
    assert answer["hits"][2]["uid"] not in shown.out


def test_a_picture_finds_itself_and_the_page_shows_it_as_text(index: Path, tar: Path, tmp_path: Path) -> None:
    samples = [one for one in shards.read(str(tar)) if isinstance(one, Sample)]
    (tmp_path / "query.png").write_bytes(samples[4].image)
    found = api.retrieve(index, image=tmp_path / "query.png", k=17, html=tmp_path / "page.html")
    hits = list(found.rows())
    assert hits[0].key == samples[4].key
    assert hits[0].cosine > 0.999
    assert len({hit.key for hit in hits}) == 17
    page = (tmp_path / "page.html").read_text()
    assert page.count('src="data:image/webp') == 18
    assert "<script>x" not in page
    assert page.count(f"&lt;script&gt;x&amp;{'k' * 20}") == 2


def test_a_page_without_the_shards_says_so(index: Path, tmp_path: Path) -> None:
    moved = tmp_path / "i"
    shutil.copytree(index, moved)
    said = json.loads((moved / "index.json").read_text())
    (moved / "index.json").write_text(json.dumps({**said, "shards": {"00000": str(tmp_path / "gone.tar")}}))
    api.retrieve(moved, "a red ring", html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "without pictures of 00000" in page
    assert page.count("no picture") >= 17


def test_what_cannot_be_searched_is_one_line(index: Path, tar: Path, small_clip: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give a text"):
        api.retrieve(index)
    with pytest.raises(UsageError, match="is empty"):
        api.retrieve(index, " ")
    with pytest.raises(UsageError, match="no such file"):
        api.retrieve(index, image=tmp_path / "none.jpg")
    with pytest.raises(api.ImageError, match="not an image"):
        (tmp_path / "text.jpg").write_text("no picture")
        api.retrieve(index, image=tmp_path / "text.jpg")
    with pytest.raises(UsageError, match="is no index"):
        api.retrieve(tmp_path, "a ring")
    store.save(small_clip(seed=5), tmp_path / "other")
    with pytest.raises(DataError, match="not the model that made the vectors"):
        api.retrieve(index, "a ring", model=tmp_path / "other")
    api.embed(str(tar), out=tmp_path / "hashes", address="local")
    with pytest.raises(DataError, match="no vectors to search"):
        api.build_index(tmp_path / "hashes", out=tmp_path / "i", address="local")
    api.embed(str(tar), model=tmp_path / "other", out=tmp_path / "e", address="local")
    with pytest.raises(api.RunError, match="embeddings"):
        api.build_index(tmp_path / "e", out=index, address="local")


def test_a_descriptor_reads_no_text(tmp_path: Path) -> None:
    table = embeddings.Embedding("k", "0" * 32, "0" * 64, 0, 8, 8)
    embeddings.write(tmp_path / "e/embeddings/0.parquet", [table], Vectors("copy", "m" * 64, 4), np.eye(4)[:1])
    (tmp_path / "e/plan.json").write_text('{"verb": "embed"}')
    api.build_index(tmp_path / "e", out=tmp_path / "i", address="local")
    with pytest.raises(UsageError, match="copy-detection descriptor, which reads no text"):
        api.retrieve(tmp_path / "i", "a ring")
    with pytest.raises(UsageError, match="give --model copy=FILE"):
        api.retrieve(tmp_path / "i", image=tmp_path / "x.jpg")


def test_lists_find_most_and_say_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "num_lists", lambda _: 16)
    monkeypatch.setattr(pool, "BLOCK_ROWS", 150)
    monkeypatch.setattr(search, "PROBES", 4)
    monkeypatch.setattr(lists, "QUERIES", 150)
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((16, 8))
    vectors = centres[draw.integers(0, 16, 600)] + 0.4 * draw.standard_normal((600, 8))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    for number in range(6):
        rows = range(number * 100, (number + 1) * 100)
        table = [embeddings.Embedding(f"{i:04d}", f"{i:032x}", f"{i:064x}", i, 8, 8) for i in rows]
        path = tmp_path / f"e/embeddings/{number}.parquet"
        embeddings.write(path, table, Vectors("clip", "m" * 64, 8), vectors[rows])
    (tmp_path / "e/plan.json").write_text('{"verb": "embed"}')
    made = api.build_index(tmp_path / "e", out=tmp_path / "i", address="local")
    assert made.recall is not None
    assert 0.8 < made.recall < 1
    from capfilt.stages.near.index import PictureIndex

    opened, found, wanted = PictureIndex(tmp_path / "i"), 0, 0
    for row in range(0, 600, 7):
        exact = np.argsort(-(vectors.astype(np.float64) @ vectors[row]), kind="stable")[:11]
        hits = opened.search(vectors[row].astype(np.float32), 11)
        assert [int(hit.key) for hit in hits] == [int(hit.uid, 16) for hit in hits]
        assert [hit.row + 100 * int(hit.shard) for hit in hits] == [int(hit.key) for hit in hits]
        found, wanted = found + len({int(hit.key) for hit in hits} & set(exact[1:].tolist())), wanted + 10
    assert found / wanted == pytest.approx(made.recall, abs=0.05)
    before = {path.name: path.read_bytes() for path in (tmp_path / "i/index").iterdir()}
    api.build_index(tmp_path / "e", out=tmp_path / "again", address="local")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again/index").iterdir()} == before
