"""`capfilt dedup`, and what is done with its result: `select --without`, `annotate --without`."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from copied_pool import COPIES

import capfilt as api
from capfilt.data import duplicates, embeddings, shards
from capfilt.data.sample import Sample

Run = dict[str, bytes]


def dedup(capfilt: Any, pool: Path, out: Path, *words: object) -> dict[str, Any]:
    done = capfilt("dedup", pool / "e", "--out", out, *words, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def gone(out: Path) -> dict[str, tuple[str, str]]:
    """By key, the key of what stands for a picture, and the kind."""
    rows = [row for shard in COPIES for row in duplicates.read(out / f"duplicates/{shard}.parquet").to_pylist()]
    return {row["key"]: (row["representative_key"], row["kind"]) for row in rows}


def files(out: Path) -> Run:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.parquet"))}


def test_the_largest_stays_and_every_other_one_is_named_with_what_stands_for_it(
    copied_pool: Path, tmp_path: Path, capfilt: Any
) -> None:
    answer = dedup(capfilt, copied_pool, tmp_path / "d", "--keep", "largest")
    went = gone(tmp_path / "d")
    assert went.keys() == {"0-small", "0-same", "2-same", "2-small", "2-jpeg"} | ({"1"} if "1" in went else {"1-jpeg"})
    assert went["0-small"] == ("0", "phash")
    assert {went["2-small"][0], went["2-jpeg"][0]} <= {"2", "2-same"}, "exact copies share their uid"
    assert went["0-same"] == ("0", "sha256")
    assert went["2-same"] == ("2", "sha256")
    assert answer["pictures"] == 11
    assert answer["kept"] == 5
    assert answer["by"] == {"sha256": 2, "phash": 4}
    assert answer["groups"] == {"count": 3, "largest": 4, "sizes": {"2": 1, "3-4": 2}}
    ledger = json.loads((tmp_path / "d/ledger/dedup/b.json").read_text())
    dropped = len(went.keys() & set(COPIES["b"]))
    assert ledger["tally"]["samples"] == {"in": 5, "kept": 5 - dropped, "dropped": dropped, "failed": 0}


def test_who_stays_follows_the_rule_and_not_who_works(copied_pool: Path, tmp_path: Path, capfilt: Any) -> None:
    dedup(capfilt, copied_pool, tmp_path / "first", "--keep", "first")
    assert gone(tmp_path / "first").keys() == {"0-small", "0-same", "1-jpeg", "2-same", "2-small", "2-jpeg"}
    dedup(capfilt, copied_pool, tmp_path / "again", "--keep", "first")
    assert files(tmp_path / "again") == files(tmp_path / "first")
    before = (tmp_path / "first/ledger/dedup/a.json").stat().st_mtime_ns
    assert dedup(capfilt, copied_pool, tmp_path / "first", "--keep", "first")["kept"] == 5
    assert (tmp_path / "first/ledger/dedup/a.json").stat().st_mtime_ns == before, "what is done stays done"
    dedup(capfilt, copied_pool, tmp_path / "shard", "--scope", "shard", "--keep", "first")
    assert gone(tmp_path / "shard") == {"0-small": ("0", "phash"), "2-small": ("2-same", "phash"),
                                        "2-jpeg": ("2-same", "phash")}  # fmt: skip


def annotations_with(scores: dict[str, float], out: Path, pool: Path) -> None:
    """A run that gave each key a score."""
    from capfilt.data import annotations
    from capfilt.data.annotations import Annotation

    for shard in COPIES:
        rows = [
            Annotation(
                row["key"], row["uid"], row["sha256"], "web", 0, "a", scores.get(row["key"], 0.1), None, "", "f", 0, 0
            )
            for row in embeddings.read(pool / f"e/embeddings/{shard}.parquet").to_pylist()
        ]
        annotations.write(out / f"annotations/{shard}.parquet", rows)


def test_the_best_is_that_of_the_highest_score(copied_pool: Path, tmp_path: Path, capfilt: Any) -> None:
    annotations_with({"0-small": 0.9, "2-jpeg": 0.8, "1-jpeg": 0.7}, tmp_path / "a", copied_pool)
    dedup(capfilt, copied_pool, tmp_path / "d", "--scores", tmp_path / "a")
    went = gone(tmp_path / "d")
    assert went.keys() == {"0", "0-same", "1", "2", "2-same", "2-small"}
    assert went["0"] == ("0-small", "phash")
    (tmp_path / "a/annotations/b.parquet").unlink()
    done = capfilt("dedup", copied_pool / "e", "--out", tmp_path / "d2", "--scores", tmp_path / "a")
    assert done.code == 1
    assert f"--scores {tmp_path / 'a'} has no annotations of the shard b; give a run" in done.line


def test_a_result_of_little_use_is_said(copied_pool: Path, tmp_path: Path, capfilt: Any) -> None:
    done = capfilt("dedup", copied_pool / "e", "--by", "sha256", "--scope", "shard", "--out", tmp_path / "d")
    assert done.code == 0
    assert "sha256: no two of 11 pictures are that near; all are kept" in done.err


def test_what_is_no_pool_is_one_line(copied_pool: Path, tmp_path: Path, capfilt: Any) -> None:
    shutil.copytree(copied_pool / "e", tmp_path / "half")
    (tmp_path / "half/embeddings/b.parquet").unlink()
    for words, code, message in (
        (
            (copied_pool / "shards", "--out", tmp_path / "d"),
            2,
            "holds no embeddings/: give the --out of `capfilt embed`",
        ),
        ((tmp_path / "half", "--out", tmp_path / "d"), 1, "is not finished: 1 of 2 shards have no embeddings, first b"),
        ((copied_pool / "e", "--by", "vector:0.9", "--out", tmp_path / "v"), 1, "embed with --model"),
        ((copied_pool / "e", "--by", "phash:99", "--out", tmp_path / "p"), 2, "at most 12 may differ"),
    ):
        done = capfilt("dedup", *words)
        assert (done.code, message in done.line) == (code, True), done.err


@pytest.fixture(scope="module")
def merged(copied_pool: Path, tmp_path_factory: pytest.TempPathFactory, capfilt: Any) -> Path:
    out = tmp_path_factory.mktemp("merged") / "d"
    assert dedup(capfilt, copied_pool, out, "--keep", "first", "--merge-texts")["merged_texts"] == 6
    return out


def models(finished_run: Path) -> tuple[str, ...]:
    return ("--captioner", str(finished_run / "round-1/captioner"), "--filter", str(finished_run / "round-1/filter"))


def test_copies_are_not_annotated_and_what_stands_for_them_has_their_texts(
    copied_pool: Path, merged: Path, finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    words = (copied_pool / "shards", *models(finished_run), "--out", tmp_path / "a", "--without", merged, "--json")
    done = capfilt("annotate", *words)
    assert done.code == 0, done.err
    assert json.loads(done.out)["samples"] == {"in": 11, "kept": 5, "dropped": 6, "failed": 0}
    rows = [row for shard in COPIES for row in pq.read_table(tmp_path / f"a/annotations/{shard}.parquet").to_pylist()]
    texts = {key: {row["text"] for row in rows if row["key"] == key and row["source"] == "web"} for key in "0124"}
    assert texts["0"] == {"picture 0", "picture 0-small", "picture 0-same"}
    assert texts["2"] == {"picture 2", "picture 2-small", "picture 2-jpeg"}, "the text of an exact copy is its own"
    assert texts["4"] == {"picture 4"}
    assert all(row["itm"] is not None for row in rows if row["key"] in "01234"), "scored like any other"
    copies = [row for row in rows if len(row["key"]) > 1]
    assert Counter(row["source"] for row in copies) == {"web": 6}, "nobody wrote about a copy"
    assert {row["reason"] for row in copies} == {f"duplicate of {row['uid']}" for row in rows if row["key"] in "012"}
    done = capfilt("select", copied_pool / "shards", "--annotations", tmp_path / "a", "--out", tmp_path / "s",
                   "--threshold", "none", "--json")  # fmt: skip
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["samples"] == {"in": 11, "kept": 5, "dropped": 6, "failed": 0}
    assert answer["texts"]["dropped"]["web: duplicate"] == 6
    kept = {one.key: one for one in shards.read(str(tmp_path / "s/dataset/a.tar")) if isinstance(one, Sample)}
    assert kept.keys() == set("01234")
    scored = capfilt("annotate", copied_pool / "shards", "--add-score", "side", "--out", tmp_path / "a", "--json")
    assert json.loads(scored.out)["scores"]["side"] == {"texts": len(rows) - 6, "without": 6}, "copies are in no pool"
    assert {one["text"] for one in kept["0"].captions if one["source"] == "web"} == texts["0"]


def test_select_leaves_the_copies_of_a_pool_out_that_was_annotated_whole(
    copied_pool: Path, merged: Path, tmp_path: Path, capfilt: Any
) -> None:
    annotations_with({}, tmp_path / "a", copied_pool)
    words = ("select", copied_pool / "shards", "--annotations", tmp_path / "a", "--threshold", "0.05")
    assert capfilt(*words, "--out", tmp_path / "s", "--without", merged).code == 0
    rows = api.read_annotations(tmp_path / "s").verdicts()
    whys = {row.annotation.key: row.why for row in rows if row.verdict == "dropped"}
    uids = {row["key"]: row["uid"] for row in embeddings.read(copied_pool / "e/embeddings/a.parquet").to_pylist()}
    assert whys == {
        key: f"duplicate of {uids[key[0]]}" for key in ("0-small", "0-same", "1-jpeg", "2-same", "2-small", "2-jpeg")
    }
    assert capfilt(*words, "--out", tmp_path / "s").code == 1, "the same folder is not for another selection"
    shutil.copytree(merged, tmp_path / "other")
    (tmp_path / "other/duplicates/b.parquet").unlink()
    done = capfilt(*words, "--out", tmp_path / "s2", "--without", tmp_path / "other")
    assert done.code == 1
    assert "says nothing of the shard b: the duplicates were found in other shards" in done.line
    done = capfilt(*words, "--out", tmp_path / "s3", "--without", tmp_path / "a")
    assert done.code == 2
    assert "holds no duplicates/; give the --out of `capfilt dedup`" in done.line


def test_a_share_is_one_of_the_texts_that_are_not_left_out(
    copied_pool: Path, merged: Path, tmp_path: Path, capfilt: Any
) -> None:
    copies = ("0-small", "0-same", "1-jpeg", "2-same", "2-small", "2-jpeg")
    annotations_with({**dict.fromkeys(copies, 0.9), "0": 0.2, "1": 0.3}, tmp_path / "a", copied_pool)
    words = ("select", copied_pool / "shards", "--annotations", tmp_path / "a", "--keep-rate", "0.4", "--json")
    done = capfilt(*words, "--out", tmp_path / "s", "--without", merged)
    texts = json.loads(done.out)["texts"]
    assert (texts["in"], texts["kept"]) == ({"web": 11}, {"web": 2})


def test_vectors_that_are_kept_are_those_that_embed_makes(
    copied_pool: Path, finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    tar = copied_pool / "shards/a.tar"
    annotate = ("annotate", tar, *models(finished_run))
    for out, words in (("plain", ()), ("kept", ("--keep-vectors",))):
        done = capfilt(*annotate, "--out", tmp_path / out, *words)
        assert done.code == 0, done.err
    for path in ("annotations/a.parquet", "plan.json"):
        assert (tmp_path / "kept" / path).read_bytes() == (tmp_path / "plain" / path).read_bytes()
    prints = [json.loads((tmp_path / out / "ledger/annotate/a.json").read_text()) for out in ("plain", "kept")]
    assert prints[0]["fingerprint"] == prints[1]["fingerprint"]
    model = finished_run / "round-1/filter"
    assert capfilt("embed", tar, "--model", model, "--out", tmp_path / "e").code == 0
    kept, made = ((tmp_path / out / "embeddings/a.parquet").read_bytes() for out in ("kept", "e"))
    assert kept == made
    answer = dedup(capfilt, tmp_path, tmp_path / "d", "--by", "vector:0.95")
    assert "0-small" in gone_of(tmp_path / "d") or answer["dropped"], "vectors find copies"
    done = capfilt(*annotate, "--out", tmp_path / "plain", "--keep-vectors")
    assert done.code == 1
    assert "1 shards were annotated without --keep-vectors, first a" in done.line


def gone_of(out: Path) -> set[str]:
    return {row["key"] for row in duplicates.read(out / "duplicates/a.parquet").to_pylist()}


def test_the_functions_do_what_the_verbs_do(copied_pool: Path, tmp_path: Path) -> None:
    embedded = api.embed(copied_pool / "shards", out=tmp_path / "e", address="local")
    assert embedded.samples.kept == 11
    found = api.dedup(embedded, out=tmp_path / "d", keep="first", address="local")
    assert (found.num_in, found.kept, found.dropped) == (11, 5, 6)
    assert Counter(row["kind"] for row in found.rows()) == found.by
