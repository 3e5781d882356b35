"""`capfilt decontaminate`: held-out pictures and texts in a pool, and what the self-test says of those that hide."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

import capfilt as api
from capfilt.data import duplicates, embeddings, shards
from capfilt.data.images.copies import COPIES
from capfilt.data.sample import Sample
from capfilt.errors import DataError, ShortfallError
from capfilt.models.checkpoints import store

DESCRIBED = "picture number {} of the set"


def blobs(seed: int, size: int = 64) -> Image.Image:
    """A picture of soft blobs, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sample(seed: int, image: bytes | None = None, text: str | None = None) -> Sample:
    return Sample(
        f"k{seed:04d}", image or encoded(blobs(seed)), "png", DESCRIBED.format(seed) if text is None else text
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A held-out set of 12 pictures, and a pool of 2 shards with 30 in which four samples are contaminated."""
    home = tmp_path_factory.mktemp("decontaminate")
    held_out = [sample(seed, text="A dog" if seed == 5 else None) for seed in range(12)]
    pool = [sample(seed) for seed in range(100, 130)]
    pool[1] = sample(101, encoded(blobs(1), "JPEG", quality=60))
    pool[2] = sample(102, encoded(ImageOps.mirror(blobs(2))))
    pool[3] = sample(103, encoded(blobs(3)))
    pool[20] = sample(120, text="PICTURE, number 4... of the set")
    pool[21] = sample(121, text="a dog!")
    for name, those in (("held-out", held_out), ("pool", pool)):
        (home / name).mkdir()
        for number, start in enumerate(range(0, len(those), 15)):
            shards.write(home / name / f"{number:05d}.tar", those[start : start + 15])
    api.embed(home / "pool", out=home / "e")
    return home


@pytest.fixture(scope="module")
def found(home: Path) -> api.DecontaminateResult:
    return api.decontaminate(home / "e", against=f"test={home / 'held-out'}", out=home / "found")


def table(out: Path) -> list[tuple[Any, ...]]:
    names = ("key", "kind", "held_out_key", "copy", "distance")
    return [tuple(row[name] for name in names) for row in pq.read_table(out / "contaminated.parquet").to_pylist()]


def test_copies_mirror_images_equal_bytes_and_equal_texts_are_found(found: api.DecontaminateResult, home: Path) -> None:
    assert [row[:4] for row in table(home / "found")] == [
        ("k0101", "phash", "k0001", ""),
        ("k0102", "phash", "k0002", "mirror image"),
        ("k0103", "sha256", "k0003", ""),
        ("k0103", "phash", "k0003", ""),
        ("k0120", "text", "k0004", ""),
    ]
    first = next(iter(found.rows()))
    uid = hashlib.sha256(encoded(blobs(1))).hexdigest()[:32]
    assert (first["set"], first["shard"], first["reason"]) == ("test", "00000", f"held-out image {uid}")
    assert found.verdict == "contaminated"
    assert found.samples == {"in": 30, "kept": 26, "dropped": 4, "failed": 0}
    assert found.record["short_texts"] == 1, "a dog: equal, and too short to mean anything"
    assert found.sets == {
        "test": {"pictures": 12, "texts": 12, "in_pool": 4, "samples": {"phash": 3, "sha256": 1, "text": 1}}
    }
    test = found.self_test["phash"]
    assert (test["pictures"], list(test["recall"]), test["confused"]) == (12, list(COPIES), 0.0)
    assert all(test["recall"][copy] == 1 for copy in COPIES if copy != "crop 10 %")


def test_what_became_of_one_sample_is_explained(found: api.DecontaminateResult, home: Path, capfilt: Any) -> None:
    shown = capfilt("explain", home / "found", "k0102").out
    assert f"reason: {next(row['reason'] for row in found.rows() if row['key'] == 'k0102')}" in shown
    assert "copy: mirror image" in shown


def test_a_command_that_was_killed_goes_on_to_the_same_bytes(
    found: api.DecontaminateResult, home: Path, tmp_path: Path, capfilt: Any
) -> None:
    """As after a kill -9: some completions are missing, and what they were of is half there."""
    again = tmp_path / "again"
    shutil.copytree(home / "found", again)
    shutil.copytree(home / "found/ledger", tmp_path / "ledger")
    for name in ("held-out/00000", "decontaminate/00001", "decontaminate-exact/00000", "contaminated/pool"):
        (again / f"ledger/{name}.json").unlink()
    (again / "contaminated/00001.parquet").write_bytes(b"half of")
    words = ("decontaminate", home / "e", "--against", f"test={home / 'held-out'}", "--out", again)
    assert capfilt(*words).code == 0
    for path in sorted(home.glob("found/**/*.parquet")):
        assert (again / path.relative_to(home / "found")).read_bytes() == path.read_bytes(), path
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*") if path.is_file()}
    assert capfilt(*words).code == 0
    assert [p for p, t in before.items() if p.stat().st_mtime_ns != t and "lock" not in str(p)] == [], "all was done"


def test_fail_is_an_exit_code_and_a_clean_pool_is_called_so_after_the_test(
    home: Path, tmp_path: Path, capfilt: Any
) -> None:
    words = ("decontaminate", home / "e", "--fail", "--by", "sha256,phash:6")
    done = capfilt(*words, "--against", home / "held-out", "--out", tmp_path / "bad", "--json")
    assert done.code == 1
    assert "error: contaminated: 3 of 30 samples (sha256,phash:6); held-out pictures: 3 of held-out" in done.err
    assert json.loads(done.out)["samples"]["dropped"] == 3
    (tmp_path / "others").mkdir()
    for seed in range(200, 212):
        blobs(seed).save(tmp_path / f"others/{seed}.png")
    done = capfilt(*words, "--against", tmp_path / "others", "--out", tmp_path / "good")
    assert done.code == 0
    said = done.err.splitlines()
    test, verdict = (next(n for n, line in enumerate(said) if line.startswith(t)) for t in ("self-test", "clean by"))
    assert test < verdict
    assert "of copies of 12 held-out pictures it finds jpeg 95 100.0%" in said[test]
    assert "clean by sha256,phash:6: none of 30 samples" in said[verdict]


@pytest.mark.parametrize(
    ("broken", "verdict", "says"),
    [
        (lambda image: 7, "contaminated", "it takes 100% of the held-out pictures for another held-out picture"),
        (
            lambda image: int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big"),
            "unknown",
            "it finds too few plain copies (jpeg 95 0%, jpeg 75 0%, half size 0%; 90% are asked for)",
        ),
    ],
)
def test_a_descriptor_that_sees_nothing_proves_nothing(
    broken: Any, verdict: str, says: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is the same for all pictures, and one that is another for each copy."""
    for seed in range(300, 312):
        (tmp_path / "others").mkdir(exist_ok=True)
        blobs(seed).save(tmp_path / f"others/{seed}.png")
    monkeypatch.setattr(embeddings, "perceptual_hash", broken)
    api.embed(home / "pool", out=tmp_path / "e")
    with pytest.raises(ShortfallError) as caught:
        api.decontaminate(tmp_path / "e", against=tmp_path / "others", by="phash:6", out=tmp_path / "c", fail=True)
    assert caught.value.result is not None
    assert says in caught.value.result["problems"]["phash"]
    assert caught.value.result["verdict"] == verdict
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--by", "phash:60"), "at most 12 may differ"),
        (("--by", "looks"), "'looks' is not known"),
        (("--by", "text:none"), "write text, or text:WORDS"),
        (("--by", "copy:0.6"), "has no vectors; embed the pool with such a --model"),
        (("--against", "HOME/held-out"), "another held-out set is called held-out too"),
        (("--against", "HOME/nothing"), "no shard found"),
        (("--against", "twice=HOME/held-out"), "is given twice"),
        (("--against", "broken=HOME/broken"), "none of its pictures can be read"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    words: tuple[str, ...], says: str, home: Path, tmp_path: Path, capfilt: Any
) -> None:
    (home / "broken").mkdir(exist_ok=True)
    (home / "broken/a.jpg").write_bytes(b"no picture")
    given = [word.replace("HOME", str(home)) for word in words]
    done = capfilt("decontaminate", home / "e", "--against", home / "held-out", "--out", tmp_path / "c", *given)
    assert done.code in (1, 2)
    (line,) = (line for line in done.err.splitlines() if line.startswith("error"))
    assert says in line


def test_a_selection_without_what_was_found_says_why(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    """Two of 60 web pictures are held out; a plain picture has the beginning of its sha256 as uid."""
    web = finished_run / "data/web"
    first = [one for one in shards.read(str(web / "00001.tar")) if isinstance(one, Sample)][:2]
    (tmp_path / "held").mkdir()
    for one in first:
        (tmp_path / f"held/{one.key}.{one.extension}").write_bytes(one.image)
    assert capfilt("embed", web, "--out", tmp_path / "e").code == 0
    words = ("decontaminate", tmp_path / "e", "--by", "sha256", "--against", tmp_path / "held")
    assert capfilt(*words, "--out", tmp_path / "c").code == 0
    words = ("select", web, "--annotations", finished_run / "round-1", "--threshold", "none", "--top-k", "9")
    done = capfilt(*words, "--without", tmp_path / "c", "--out", tmp_path / "s", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["samples"] == {"in": 60, "kept": 58, "dropped": 2, "failed": 0}
    assert answer["texts"]["dropped"] == {"web: held-out image": 2, "synthetic: held-out image": 2}
    gone = [row for row in pq.read_table(tmp_path / "s/dataset/00001.parquet").to_pylist() if row["why"]]
    assert {(row["uid"], row["why"]) for row in gone} == {
        (one.uid, f"held-out image {one.sha256[:32]}") for one in first
    }
    shutil.rmtree(tmp_path / "c/ledger/decontaminate")
    refused = capfilt(*words, "--without", tmp_path / "c", "--out", tmp_path / "other")
    assert "says nothing of the shard 00000: other shards were compared with held-out ones" in refused.err


def test_a_shard_that_not_every_comparison_has_seen_is_not_clean(
    found: api.DecontaminateResult, home: Path, tmp_path: Path
) -> None:
    """As after a kill between the two, in a folder with the table of an earlier run."""
    shutil.copytree(home / "found", tmp_path / "c")
    duplicates.check_shards(tmp_path / "c", ["00000", "00001"])
    (tmp_path / "c/ledger/decontaminate-exact/00001.json").unlink()
    with pytest.raises(DataError, match="is not finished: decontaminate-exact has not seen the shard 00001"):
        duplicates.check_shards(tmp_path / "c", ["00000", "00001"])


def test_a_held_out_text_beside_a_broken_picture_is_counted_once(home: Path, tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    told = [sample(200), sample(201, b"broken", DESCRIBED.format(4)), sample(202, b"broken")]
    shards.write(tmp_path / "pool/00000.tar", told)
    api.embed(tmp_path / "pool", out=tmp_path / "e")
    result = api.decontaminate(tmp_path / "e", against=home / "held-out", out=tmp_path / "c", self_test=5)
    assert result.samples == {"in": 3, "kept": 1, "dropped": 1, "failed": 1}


@pytest.mark.slow
def test_two_workers_on_ray_write_the_same_bytes(
    found: api.DecontaminateResult, home: Path, tmp_path: Path, capfilt: Any
) -> None:
    words = ("decontaminate", home / "e", "--against", f"test={home / 'held-out'}", "--out", tmp_path / "out")
    done = capfilt(*words, "--workers", 2, address="start")
    assert done.code == 0, done.err
    for path in sorted(home.glob("found/**/*.parquet")):
        assert (tmp_path / "out" / path.relative_to(home / "found")).read_bytes() == path.read_bytes(), path


def test_vectors_are_made_by_the_model_that_embedded_the_pool(
    home: Path, tmp_path: Path, capfilt: Any, small_clip: Any
) -> None:
    for seed in (0, 1):
        store.save(small_clip(seed=seed), tmp_path / f"clip{seed}")
    assert capfilt("embed", home / "pool", "--model", tmp_path / "clip0", "--out", tmp_path / "e").code == 0
    words = ["decontaminate", tmp_path / "e", "--against", home / "held-out", "--by", "clip:0.99999"]
    assert "--model is needed" in capfilt(*words, "--out", tmp_path / "c").err
    refused = capfilt(*words, "--model", tmp_path / "clip1", "--out", tmp_path / "c")
    assert "give the model that embedded it" in refused.err
    assert "embed the pool with such a --model" in capfilt(*words[:-1], "copy:0.6", "--out", tmp_path / "c").err
    done = capfilt(*words, "--model", tmp_path / "clip0", "--out", tmp_path / "c")
    assert done.code == 0, done.err
    assert "a recall of 0.02 for CLIP's vectors" in done.err
    near = {row[0] for row in table(tmp_path / "c") if row[1] == "clip" and row[4] < 1e-3}
    assert {"k0102", "k0103"} <= near, "the mirror image, and equal bytes"
