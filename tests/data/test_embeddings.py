from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.data import embeddings, parquet
from capfilt.data.embeddings import Embedding, Vectors
from capfilt.errors import DataError, FolderError

ITC = Vectors("itc", "f" * 64, 8)


def rows(count: int) -> list[Embedding]:
    return [Embedding(f"{i:05d}", f"{i:032x}", f"{i:064x}", 2**64 - 1 - i, 640, 480 + i) for i in range(count)]


def unit(count: int, dim: int = 8) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(count, dim))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_pictures_come_back_in_the_order_of_their_shard(tmp_path: Path) -> None:
    embeddings.write(tmp_path / "a.parquet", rows(3)[::-1])
    table = embeddings.read(tmp_path / "a.parquet")
    assert table.schema.equals(embeddings.SCHEMA)
    assert [Embedding(**row) for row in table.to_pylist()] == rows(3)[::-1]
    assert embeddings.vectors_of(tmp_path / "a.parquet") is None


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_vectors_come_back_as_float16_and_can_be_left_out(count: int, tmp_path: Path) -> None:
    values = unit(count)
    embeddings.write(tmp_path / "a.parquet", rows(count), ITC, values)
    table = embeddings.read(tmp_path / "a.parquet")
    assert embeddings.matrix(table).dtype == np.float16
    assert (embeddings.matrix(table) == values.astype(np.float16)).all()
    assert embeddings.vectors_of(tmp_path / "a.parquet") == ITC
    assert embeddings.read(tmp_path / "a.parquet", with_vectors=False).schema.names == embeddings.SCHEMA.names


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 5.0])
def test_a_vector_that_is_no_unit_vector_is_neither_written_nor_read(value: float, tmp_path: Path) -> None:
    values = unit(5000)
    values[4500] = value
    with pytest.raises(DataError, match="vector of key '04500' is not of unit length"):
        embeddings.write(tmp_path / "a.parquet", rows(5000), ITC, values)
    embeddings.write(tmp_path / "a.parquet", rows(5000), ITC, unit(5000))
    table = embeddings.read(tmp_path / "a.parquet")
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float16).ravel()), 8)
    spoiled = table.set_column(6, ITC.schema.field("vector"), column)
    pq.write_table(spoiled.replace_schema_metadata(ITC.schema.metadata), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="key '04500' is not finite or not of unit length"):
        embeddings.read(tmp_path / "a.parquet")


def test_tables_are_those_of_the_pool_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a-1", "a"):
        embeddings.write(tmp_path / "embeddings" / f"{name}.parquet", rows(1))
    assert [*embeddings.tables(tmp_path)] == ["a", "a-1", "b"]
    assert embeddings.check_same_model(embeddings.tables(tmp_path).values()) is None
    with pytest.raises(FolderError, match="holds no embeddings/: give the --out of `capfilt embed`"):
        embeddings.tables(tmp_path / "embeddings")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Vectors("itc", "e" * 64, 8),
            "itc vectors of 8 numbers by eeeeeeeeeeee and .* by ffffffffffff: vec",
        ),
        (Vectors("itc", "f" * 64, 16), "itc vectors of 16 numbers"),
        (Vectors("copy", "f" * 64, 8), "copy vectors"),
        (None, "has no vectors"),
    ],
)
def test_vectors_of_two_models_are_no_pool(other: Vectors | None, message: str, tmp_path: Path) -> None:
    embeddings.write(tmp_path / "a.parquet", rows(2), ITC, unit(2))
    embeddings.write(tmp_path / "b.parquet", rows(2), other, other and unit(2, other.dim))
    assert embeddings.check_same_model([tmp_path / "a.parquet"]) == ITC
    with pytest.raises(DataError, match=message):
        embeddings.check_same_model([tmp_path / "a.parquet", tmp_path / "b.parquet"])


def test_other_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"key": ["a"]}), path)
    with pytest.raises(DataError, match="holds other columns than `capfilt embed` writes: key string"):
        embeddings.read(path)
    embeddings.write(path, rows(1), ITC, unit(1))
    pq.write_table(pq.read_table(path).replace_schema_metadata({"capfilt.vectors": '{"kind": "itc"}'}), path)
    with pytest.raises(DataError, match="holds other columns"):
        embeddings.read(path)


def test_a_vector_wider_than_any_model_makes_is_refused_unread(tmp_path: Path) -> None:
    """A null takes the memory of a whole vector, and none in the file."""
    nulls = pa.nulls(10, pa.list_(pa.float16(), parquet.MAX_WIDTH + 1))
    pq.write_table(pa.table({"vector": nulls}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has a column that no table here has: 'vector'"):
        parquet.read(tmp_path / "a.parquet")


def test_a_shard_that_could_not_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_VALUES", 15)
    with pytest.raises(DataError, match="make smaller shards"):
        embeddings.write(tmp_path / "a.parquet", rows(2), ITC, unit(2))
    assert not (tmp_path / "a.parquet").exists()
