from __future__ import annotations

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.data import annotations, scores
from capfilt.data.annotations import Annotation
from capfilt.errors import DataError
from capfilt.storage.atomic import sha256_file

ROWS = [Annotation("k", "u", "s", "web", number, f"text {number}", 0.5, -0.25, "", "blip:f", 7, 1) for number in (0, 1)]


@pytest.fixture
def run(tmp_path):
    """A run folder with one shard of annotations, and two scores of it."""
    path = tmp_path / "annotations" / "00000.parquet"
    path.parent.mkdir()
    annotations.write(path, ROWS)
    for name, values in (("sieve", [0.25, None]), ("side", [96.0, 96.0])):
        scores.write(scores.path_of(tmp_path, name, "00000"), name, values, sha256_file(path))
    return tmp_path


def table(run):
    return annotations.read(run / "annotations" / "00000.parquet")


def test_a_row_has_the_scores_that_were_joined_and_no_others(run):
    assert scores.names(run) == ["side", "sieve"]
    joined = scores.join(table(run), run, "00000", ["itm", "sieve"])
    assert joined.column_names == [*annotations.SCHEMA.names, "sieve"]
    first, second = annotations.rows(joined)
    assert (first.scores, second.scores) == ({"sieve": 0.25}, {"sieve": None})
    assert [first.score(name) for name in ("itm", "itc", "sieve", "side")] == [0.5, -0.25, 0.25, None]
    assert list(annotations.rows(table(run))) == ROWS, "without the tables a row is as it was"


def test_annotations_that_were_written_anew_have_no_scores_yet(run):
    annotations.write(run / "annotations" / "00000.parquet", ROWS[:1])
    with pytest.raises(DataError, match=r"other annotations than there are now: add sieve again \(--add-score\)"):
        scores.join(table(run), run, "00000", ["sieve"])


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"sieve": pa.array([2.0, None], pa.float32())}, r"holds sieve 2\.0"),
        ({"sieve": pa.array([math.nan, None], pa.float32())}, "holds sieve nan"),
        ({"sieve": pa.array([0.5], pa.float32())}, "has 1 rows, the annotations 2"),
        ({"sieve": pa.array(["0.5", "x"])}, "holds no sieve, but: sieve"),
        ({"itm": pa.array([0.5, 0.5], pa.float32())}, "holds no sieve, but: itm"),
    ],
)
def test_a_table_of_somebody_else_is_refused(run, columns, error):
    path = scores.path_of(run, "sieve", "00000")
    metadata = pq.read_schema(path).metadata
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match=error):
        scores.join(table(run), run, "00000", ["sieve"])


def test_a_score_that_was_not_added_is_named(run):
    with pytest.raises(DataError, match=r"00000 has no clip-b32 in .*: add it with `capfilt annotate --add-score`"):
        scores.join(table(run), run, "00000", ["clip-b32"])


def test_ranges():
    assert scores.range_of("clip-vit-b-32") == scores.range_of("itc") == (-1, 1)
    assert scores.range_of("side") is None
    assert scores.is_score("clip-x")
    assert not any(map(scores.is_score, ("clip-", "clip-X", "why", "prompt")))
