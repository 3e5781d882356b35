"""Near pairs of a pool, against every comparison; after kills at any place; with one list and with many."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from capfilt.cluster.session import Session, connect
from capfilt.cluster.worker_pool import Resources
from capfilt.data import embeddings
from capfilt.data.embeddings import Embedding, Vectors
from capfilt.errors import DataError, FolderError
from capfilt.index import lists, pair_files, pairs, pool, units
from capfilt.index.near import parse_near
from capfilt.index.pair_files import PairFiles
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.stages.near import pairs as near_pairs
from capfilt.stages.near import search
from capfilt.stages.near.pairs import find_near_pairs

DIM = 16
BY = parse_near("sha256,phash:3,vector:0.95")


class Pictures:
    """What a pool of small shards holds, row by row; a third of them are near or exact copies of others."""

    def __init__(self, folder: Path, num_shards: int = 6, rows: int = 50) -> None:
        self.folder = folder
        draw = np.random.default_rng(0)
        num = num_shards * rows
        self.sha256 = np.array([hashlib.sha256(bytes([i % 251, i // 251])).hexdigest() for i in range(num)])
        self.phash = draw.integers(0, 2**64, num, dtype=np.uint64)
        self.vector = draw.standard_normal((num, DIM))
        self.shard = np.repeat(np.arange(num_shards), rows)
        for row in range(0, num, 3):
            other = int(draw.integers(0, num))
            self.sha256[row] = self.sha256[other] if row % 2 else self.sha256[row]
            self.phash[row] = self.phash[other] ^ np.uint64(1 << int(draw.integers(64)) if row % 5 else 0)
            self.vector[row] = self.vector[other] + (0.25 * draw.standard_normal(DIM) if row % 4 else 0)
        self.vector = unit(self.vector)
        (folder / embeddings.FOLDER).mkdir(parents=True)
        for number in range(num_shards):
            self.write(f"{number:05d}", self.shard == number)

    def write(self, name: str, here: np.ndarray, dim: int = DIM) -> None:
        """The table of one shard."""
        rows = [
            Embedding(f"{i:06d}", f"{i:032x}", str(self.sha256[i]), int(self.phash[i]), 8, 8)
            for i in np.flatnonzero(here)
        ]
        vectors = Vectors("clip", "m" * 64, dim) if dim else None
        embeddings.write(self.folder / "embeddings" / f"{name}.parquet", rows, vectors, unit(self.vector[here, :dim]))

    def near(self, a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
        """Whether rows are near in a way, by comparing what was written."""
        if kind == "sha256":
            return np.asarray(self.sha256[a] == self.sha256[b])
        if kind == "phash":
            return np.bitwise_count(self.phash[a] ^ self.phash[b]) <= 3
        vectors = self.vector.astype(np.float16)
        return 1 - pairs.exact_cosines(vectors, a, vectors, b) <= 0.05


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1."""
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return Pictures(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with connect("local") as opened:
        yield opened


@pytest.fixture
def many_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight lists, several blocks, and units and lists in parts, in a pool of 300 rows."""
    monkeypatch.setattr(lists, "FLAT_BELOW", 10)
    monkeypatch.setattr(lists, "num_lists", lambda rows: 8 if rows > 10 else 1)
    monkeypatch.setattr(pool, "BLOCK_ROWS", 120)
    monkeypatch.setattr(units, "UNIT_RECORDS", 60)
    monkeypatch.setattr(units, "LIST_RECORDS", 40)


def find(session: Session, folder: Path, out: Path, by: str = "", scope: search.Scope = "pool") -> PairFiles:
    near = parse_near(by) if by else BY
    return find_near_pairs(session, folder, out, near, Resources(), Progress(quiet=True), scope)


def closure(found: PairFiles, kind: str, num_rows: int) -> set[tuple[int, int]]:
    """All pairs of rows that the pairs stand for: each row has the neighbours of the smallest row of its value."""
    hubs = np.arange(num_rows)
    for a, b, distance in found.of(kind):
        hubs[b[distance == 0]] = a[distance == 0]
    near = np.equal.outer(hubs, hubs)
    for a, b, _ in found.of(kind):
        hub_near = np.zeros((num_rows, num_rows), bool)
        hub_near[a, b] = hub_near[b, a] = True
        near |= hub_near[hubs][:, hubs]
    return {(int(i), int(j)) for i, j in zip(*np.nonzero(np.triu(near, 1)), strict=True)}


def wanted(pictures: Pictures, kind: str, scope: str = "pool") -> set[tuple[int, int]]:
    i, j = np.triu_indices(len(pictures.shard), 1)
    near = pictures.near(i, j, kind)
    if scope == "shard":
        near &= pictures.shard[i] == pictures.shard[j]
    return set(zip(i[near].tolist(), j[near].tolist(), strict=True))


@pytest.mark.parametrize("scope", ["pool", "shard"])
def test_every_comparison(session: Session, pictures: Pictures, tmp_path: Path, scope: search.Scope) -> None:
    found = find(session, pictures.folder, tmp_path, scope=scope)
    assert found.num_rows == 300
    assert found.kinds == ["sha256", "phash", "vector"]
    assert found.recall is None
    for kind in found.kinds:
        expected = wanted(pictures, kind, scope)
        assert closure(found, kind, 300) == expected
        assert len(expected) > 50 or scope == "shard"
    assert not (tmp_path / search.FOLDER).exists()
    assert find(session, pictures.folder, tmp_path, scope=scope) == found, "as a command finds them that goes on"
    assert find(session, pictures.folder, tmp_path, scope=scope).kinds == found.kinds


@pytest.mark.usefixtures("many_lists")
def test_many_lists_lose_no_hash_and_few_vectors(session: Session, pictures: Pictures, tmp_path: Path) -> None:
    found = find(session, pictures.folder, tmp_path)
    for kind in ("sha256", "phash"):
        assert closure(found, kind, 300) == wanted(pictures, kind)
    expected, got = wanted(pictures, "vector"), closure(found, "vector", 300)
    assert got <= expected
    assert len(got) >= 0.98 * len(expected)
    assert found.recall is not None
    assert found.recall.queries > 250
    assert found.recall.value == pytest.approx(len(got) / len(expected), abs=0.01)
    rows = [pair for a, b, _ in found.of("vector") for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert len(rows) == len(set(rows))


def bytes_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / pair_files.FOLDER).iterdir()}


class Killed(BaseException):
    """No `except Exception` catches it, like no handler catches a kill."""


@pytest.mark.usefixtures("many_lists")
def test_killed_anywhere_the_same_bytes(
    session: Session, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after each commit, of each stage, until it comes through."""
    monkeypatch.setattr(units, "UNIT_RECORDS", 300)
    monkeypatch.setattr(units, "LIST_RECORDS", 60)
    find(session, pictures.folder, tmp_path / "whole", "phash:3,vector:0.95")
    commit: Callable[..., object] = Ledger.commit
    seen: set[tuple[str, str, bool]] = set()

    def killing(ledger: Ledger, shard: str, *rest: object, **named: object) -> object:
        for after in (False, True):
            if after:
                done = commit(ledger, shard, *rest, **named)
            if (point := (ledger.stage, shard, after)) not in seen:
                seen.add(point)
                raise Killed
        return done

    monkeypatch.setattr(Ledger, "commit", killing)
    for _ in range(1000):
        try:
            find(session, pictures.folder, tmp_path / "killed", "phash:3,vector:0.95")
            break
        except Killed:
            continue
    assert {stage for stage, _, _ in seen} == {"near-lists", "near-split", "near-join"}
    assert len(seen) > 20
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_what_is_there_is_not_done_again(
    session: Session, pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find(session, pictures.folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(near_pairs, "run_stage", None)
        assert find(session, pictures.folder, tmp_path) == before
    missing = tmp_path / "pairs" / before.files["vector"][0]
    kept = missing.read_bytes()
    missing.unlink()
    assert find(session, pictures.folder, tmp_path) == before
    assert missing.read_bytes() == kept


def test_another_radius_or_pool_is_another_search(session: Session, pictures: Pictures, tmp_path: Path) -> None:
    find(session, pictures.folder, tmp_path, "phash:3")
    other = find(session, pictures.folder, tmp_path, "phash:0")
    assert all((distance == 0).all() for _, _, distance in other.of("phash"))


def test_empty_shards_count_for_nothing(session: Session, tmp_path: Path) -> None:
    pictures = Pictures(tmp_path / "pool")
    pictures.write("00000-empty", np.zeros(300, bool))
    found = find(session, pictures.folder, tmp_path / "out")
    assert closure(found, "vector", 300) == wanted(pictures, "vector")


def test_bad_pools_are_one_line(session: Session, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="embeddings"):
        find(session, tmp_path, tmp_path / "out")
    pictures = Pictures(tmp_path / "pool")
    pictures.write("00003", pictures.shard == 3, DIM // 2)
    with pytest.raises(DataError, match="vectors of one pool must be of one model"):
        find(session, pictures.folder, tmp_path / "out")
    for number in range(6):
        pictures.write(f"{number:05d}", pictures.shard == number, 0)
    with pytest.raises(DataError, match=r"has no vectors, which --by vector:0\.95 compares"):
        find(session, pictures.folder, tmp_path / "out")
    for number in range(6):
        pictures.write(f"{number:05d}", np.zeros(300, bool))
    with pytest.raises(DataError, match="no picture in any"):
        find(session, pictures.folder, tmp_path / "out")
