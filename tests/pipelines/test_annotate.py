from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from capfilt.data import parquet, shards
from capfilt.data.images import decode as images
from capfilt.data.images.preprocess import ImageFormat, Preprocess
from capfilt.data.sample import Sample, is_text
from capfilt.inference.annotator import Annotator
from capfilt.inference.filters import local_filter
from capfilt.inference.local_model import LocalModel
from capfilt.models.checkpoints import store
from capfilt.models.layers.vit import VisionTransformer


def models(finished_run: Path) -> list[str]:
    return ["--captioner", str(finished_run / "round-1/captioner"), "--filter", str(finished_run / "round-1/filter")]


def tables(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / "annotations").glob("*.parquet")}


def test_ten_texts_an_image_for_people_with_two_checkpoints(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    tar, settings = finished_run / "data/web/00001.tar", ("--recipe", "blip2-ten", "--set", "decode.max_length=12")
    done = capfilt("annotate", tar, *models(finished_run), "--out", tmp_path / "a", *settings, "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["samples"] == {"in": 20, "kept": 20, "dropped": 0, "failed": 0}
    rows = pq.read_table(tmp_path / "a/annotations/00001.parquet").to_pylist()
    said = [row for row in rows if is_text(row["text"])]  # a model without training may write a full stop
    assert answer["texts"]["kept"] == Counter(row["source"] for row in said)
    assert len(said) > 210
    assert Counter((row["source"], row["candidate"]) for row in rows) == {
        ("web", 0): 20, **{("synthetic", i): 20 for i in range(10)},
    }  # fmt: skip
    assert len({row["text"] for row in rows if row["source"] == "synthetic"}) > 100, "every candidate draws anew"
    words = ("--recipe", "blip2-two", "--annotations", tmp_path / "a", "--out", tmp_path / "b", "--json")
    done = capfilt("select", tar, *words)
    assert done.code == 0, done.err
    assert sum(json.loads(done.out)["texts"]["kept"].values()) == 40, "of each image the two best"
    best: dict[str, list[float]] = {}
    for row in said:
        best.setdefault(row["key"], []).append(row["itc"])
    judged = pq.read_table(tmp_path / "b/dataset/00001.parquet").to_pylist()
    for key, scores in best.items():
        kept = [row["itc"] for row in judged if row["key"] == key and row["verdict"] == "kept"]
        assert max(kept) == max(scores)


def test_a_limit_holds_while_models_compute(finished_run: Path, tmp_path: Path, capfilt: Any, monkeypatch: Any) -> None:
    """Three batches of a shard that is read whole before the first of them."""
    batches, annotate = [], Annotator.annotate

    def slowly(*arguments: Any) -> Any:
        batches.append(1)
        time.sleep(0.6)
        return annotate(*arguments)

    monkeypatch.setattr(Annotator, "annotate", slowly)
    words = (*models(finished_run), "--out", tmp_path / "run", "--limit", "0.5", "--set", "batch_size=7")
    done = capfilt("annotate", finished_run / "data/web/00000.tar", *words)
    assert done.code == 1
    assert "took longer than 0.5 s; give it more time with --limit, or leave it out" in done.line
    assert len(batches) < 3
    assert not (tmp_path / "run/annotations/00000.parquet").exists()


def test_a_shard_of_more_texts_than_a_table_may_have_ends_at_that_text(
    finished_run: Path, tmp_path: Path, capfilt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "MAX_ROWS", 5)
    work = ("--out", tmp_path / "a", "--set", "batch_size=1", "--address", "local")
    done = capfilt("annotate", finished_run / "data/web/00000.tar", *models(finished_run), *work)
    assert done.code == 1
    assert "the shard 00000 has more than" in done.err
    assert "make smaller shards" in done.err
    assert not (tmp_path / "a/annotations").exists()


def test_the_seed_decides_the_texts_and_batches_do_not(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    """In fp32. Scores differ by the order of their sums: by 1.4e-7 at most with SSE, AVX2 and AVX-512."""

    def texts(name: str, *more: str) -> list[str]:
        done = capfilt(
            "annotate", finished_run / "data/web/00000.tar", *models(finished_run), "--out", tmp_path / name, *more
        )
        assert done.code == 0, done.err
        result: list[str] = pq.read_table(tmp_path / name / "annotations/00000.parquet").column("text").to_pylist()
        return result

    first = texts("one", "--seed", "5")
    assert texts("two", "--seed", "5", "--set", "batch_size=7") == first
    assert texts("three", "--seed", "6") != first
    one, two = (pq.read_table(tmp_path / name / "annotations/00000.parquet") for name in ("one", "two"))
    for score in ("itm", "itc"):
        np.testing.assert_allclose(one[score].to_numpy(), two[score].to_numpy(), atol=1e-6, rtol=0)


def test_a_run_goes_on_with_a_smaller_batch_in_the_format_that_it_began_with(
    finished_run: Path, tmp_path: Path, capfilt: Any, snapshot: Any
) -> None:
    """As after an out-of-memory: of two shards one is done, and stays so; in a fork, too."""
    words = ["annotate", f"{finished_run}/data/web/{{00000,00001}}.tar", *models(finished_run), "--seed", "5"]
    assert capfilt(*words, "--out", tmp_path / "a").code == 0
    plan = json.loads((tmp_path / "a/plan.json").read_bytes())
    assert plan["decided"] == {"annotate": {"device": "cpu", "precision": "fp32"}}
    assert not {"batch_size", "precision"} & plan["config"].keys()
    texts = pq.read_table(tmp_path / "a/annotations/00001.parquet").column("text")
    (tmp_path / "a/annotations/00001.parquet").unlink()
    before = snapshot(tmp_path / "a")
    smaller = ("--set", "batch_size=7", "--set", "precision=fp32")
    assert capfilt(*words, "--out", tmp_path / "a", *smaller).code == 0
    assert pq.read_table(tmp_path / "a/annotations/00001.parquet").column("text").equals(texts)
    after = snapshot(tmp_path / "a")
    assert {name for name in after if after[name] != before.get(name)} == {
        "annotations/00001.parquet", "ledger/annotate/00001.json", "recipe.yaml",
    }  # fmt: skip
    done = capfilt(*words, "--out", tmp_path / "a", "--fork", tmp_path / "b", "--set", "batch_size=5")
    assert (done.code, "2/2" in done.err, "resumed" in done.err) == (0, True, True), done.err
    refused = capfilt(*words, "--out", tmp_path / "a", "--set", "precision=bf16")
    assert refused.code == 1
    assert "annotate began in fp32 on cpu, and is now requested in bf16 on cpu" in refused.line


def test_a_touched_shard_is_compared_once_and_not_done_again(
    finished_run: Path, tmp_path: Path, capfilt: Any, snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A touch, or an upload of the same bytes; other bytes of the same size are another shard."""
    web = Path(shutil.copytree(finished_run / "data/web", tmp_path / "web"))
    (web / "00002.tar").unlink()
    compared: list[str] = []
    look = shards.read_input
    monkeypatch.setattr(shards, "read_input", lambda url: (compared.append(Path(url).name), look(url))[1])

    def runs() -> tuple[str, str]:
        one = capfilt("annotate", web, *models(finished_run), "--out", tmp_path / "a")
        two = capfilt("select", web, "--annotations", tmp_path / "a", "--out", tmp_path / "b", "--set", "threshold=0")
        assert (one.code, two.code) == (0, 0), one.err + two.err
        return one.err, two.err

    runs()
    before = snapshot(tmp_path)
    os.utime(web / "00000.tar", (1e9, 1e9))
    assert all("2/2" in said and "resumed" in said for said in runs())
    after = snapshot(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {
        "web/00000.tar", "a/ledger/annotate/00000.json", "b/ledger/select/00000.json",
    }  # fmt: skip
    runs()
    assert compared == ["00000.tar"] * 2, "once for each stage, and then known"
    data = (web / "00000.tar").read_bytes()
    rows = pq.read_table(tmp_path / "a/annotations/00000.parquet").to_pylist()
    text = next(row["text"].encode() for row in rows if row["source"] == "web")
    (web / "00000.tar").write_bytes(data.replace(text, text[::-1]))
    ends = [said.strip().splitlines()[-1] for said in runs()]  # what took seconds has said before what it found done
    assert all("2/2 shards" in end and "resumed" not in end for end in ends), ends
    assert {name for name, stat in snapshot(tmp_path / "a").items() if stat != after[f"a/{name}"]} == {
        "annotations/00000.parquet", "ledger/annotate/00000.json",
    }  # fmt: skip
    assert not list((tmp_path / "a").rglob("*.withdrawn"))


def test_captioner_and_filter_read_pictures_of_their_own_size_and_rule(
    finished_run: Path, tmp_path: Path, capfilt: Any
) -> None:
    """Each text is that of the captioner alone, each score that of one picture as the filter wants it."""
    tar, filter_ = finished_run / "data/web/00000.tar", tmp_path / "filter"
    preprocess = Preprocess(mean=(0.5, 0.5, 0.5), resample="bilinear", shape="shortest edge", resized=56)
    shutil.copytree(finished_run / "round-1/filter/checkpoint", filter_)
    store.save(store.load(filter_, image_size=48).eval(), filter_)
    preprocess.save(filter_, 48)
    both = ["--captioner", finished_run / "round-1/captioner", "--filter", filter_]
    for name, models_ in (("own", both), ("same", models(finished_run))):
        done = capfilt("annotate", tar, *models_, "--out", tmp_path / name, "--set", "precision=fp32")
        assert done.code == 0, done.err
    rows, others = (
        pq.read_table(tmp_path / name / "annotations/00000.parquet").to_pylist() for name in ("own", "same")
    )
    assert [row["text"] for row in rows] == [row["text"] for row in others]
    local = LocalModel.load(filter_, torch.device("cpu"))
    assert local.image_format == ImageFormat(48, preprocess)
    samples = {sample.key: sample for sample in shards.read(str(tar)) if isinstance(sample, Sample)}
    for row in rows[::9]:
        pixels = preprocess.to_pixels(images.decode(samples[row["key"]].image), 48)
        with torch.inference_mode():
            tokens = local.model.encode_image(preprocess.normalise(torch.from_numpy(pixels)[None]))
        scores = local_filter(local).score_tokens(tokens, [[row["text"]]])
        assert [[row["itm"]]] == [pytest.approx(of_image, abs=1e-5) for of_image in scores["itm"] or []]
        assert [[row["itc"]]] == [pytest.approx(of_image, abs=1e-5) for of_image in scores["itc"] or []]


def test_a_person_sees_what_became_of_the_texts(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    done = capfilt("annotate", finished_run / "data/web", *models(finished_run), "--out", tmp_path / "a")
    assert done.code == 0
    assert re.search(r"^annotate +3/3 shards", done.err, re.MULTILINE)
    figures, _, next_steps = done.out.partition("\n\n")
    assert "capfilt select" in next_steps
    answer = dict(line.split(maxsplit=1) for line in figures.splitlines())
    assert "images/s per worker; CPU-seconds" in answer.pop("usage.annotate")
    assert answer == {
        "annotations": str(tmp_path / "a/annotations"), "samples.in": "60", "samples.kept": "60",
        "samples.dropped": "0", "samples.failed": "0", "texts.in.web": "60", "texts.in.synthetic": "60",
        "texts.kept.web": "60", "texts.kept.synthetic": "60",
        "members.in": "180", "members.used": "180",
    }  # fmt: skip


def tar_of(path: Path, files: list[tuple[str, bytes]], cut: int = 0) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
        end = tar.offset
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue()[: end - cut] if cut else buffer.getvalue())
    return path


def huge_png(side: int) -> bytes:
    """The header of a PNG of side x side pixels, and nothing to decode."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IEND"


def odd_pictures(picture: Any) -> dict[str, bytes]:
    """Pictures that are no plain RGB, and can be read."""
    turned, frames = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(io.BytesIO(picture("PNG")))
    upright.save(turned, "JPEG", exif=exif)
    upright.save(frames, "WEBP", save_all=True, append_images=[upright.rotate(90)])
    cmyk, palette, deep = picture("JPEG", mode="CMYK"), picture("PNG", mode="P"), picture("PNG", mode="I;16")
    return {"cmyk": cmyk, "palette": palette, "deep": deep, "exif": turned.getvalue(), "animated": frames.getvalue()}


def test_every_kind_of_bad_input_is_a_row_and_the_rest_is_untouched(
    finished_run: Path, tmp_path: Path, capfilt: Any, picture: Any
) -> None:
    whole = picture("PNG")
    odd = odd_pictures(picture)
    broken = {
        "corrupt": (b"\x89PNG\r\n\x1a\n" + bytes(range(200)), "broken image"),
        "empty": (b"", "not an image"),
        "huge": (huge_png(20_000), "too many pixels (20000 x 20000, limit 64000000)"),
        "page": (b"<html>404</html>", "not an image"),
        "truncated": (whole[: len(whole) // 2], "truncated image"),
    }
    files = [(f"{key}.png", data) for key, data in odd.items()]
    files += [(f"{key}.png", data) for key, (data, _) in broken.items()]
    files += [("late.txt", b"the text comes first"), ("late.png", whole)]
    files += [("latin.png", whole), ("latin.txt", "caf\xe9".encode("latin-1"))]
    files += [("long.png", whole), ("long.txt", b"a red circle " * 50)]
    files += [("mute.png", whole)]
    files += [("twice.png", whole), ("twice.txt", b"one"), ("twice.png", whole), ("twice.txt", b"two")]
    files += [("x.png", whole), ("y.png", whole), ("x.txt", b"strayed")]
    files += [("z.png", whole * 40)]
    url = tar_of(tmp_path / "web/00000.tar", files, cut=9000)
    done = capfilt("annotate", url, *models(finished_run), "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    rows = pq.read_table(tmp_path / "a/annotations/00000.parquet").to_pylist()
    came = {(row["key"], row["text"]): (row["status"], row["reason"]) for row in rows if row["source"] == "web"}
    fine = {(key, ""): ("ok", "no text") for key in (*odd, "mute", "y")}
    fine |= {("late", "the text comes first"): ("ok", ""), ("twice", "one"): ("ok", "")}
    fine |= {("x", "strayed"): ("ok", "")}  # the text that lies apart from its picture
    fine |= {("long", "a red circle " * 50): ("ok", "scored by its beginning (35 tokens)")}
    failed = {(key, ""): ("failed", reason) for key, (_, reason) in broken.items()}
    failed |= {("latin", ""): ("failed", "text is not UTF-8"), ("twice", ""): ("failed", "duplicate key")}
    cut = came.pop(("z", ""))
    assert cut[0] == "failed"
    assert cut[1].startswith("shard cut at byte ")
    assert came == {**fine, **failed}
    answer = json.loads(done.out)
    assert answer["samples"] == {"in": 19, "kept": len(fine), "dropped": 0, "failed": len(failed) + 1}
    used = len(fine) + 4 + 5  # four have a text; the pictures that cannot be decoded are members that were read
    assert answer["members"] == {"in": len(files), "used": used, "of a sample that failed": len(files) - used}
    synthetic = {row["key"] for row in rows if row["source"] == "synthetic"}
    assert synthetic == {key for key, _ in fine}


def broken_inputs(folder: Path) -> None:
    """Shards of which nothing can be used."""
    (folder / "text.tar").write_text("this is no tar\n" * 100)
    (folder / "zeros.tar").write_bytes(bytes(10240))  # a tar that ends at once
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.jpg", "b.jpg", "c.png"):
            info = tarfile.TarInfo(name)
            info.size = 50
            tar.addfile(info, io.BytesIO(b"x" * 50))
    (folder / "pictures.tar").write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("name", "came", "said"),
    [
        ("text.tar", 1, "annotate: 0 of 1 samples succeeded; 1 failed by: "),
        ("zeros.tar", 0, "annotate: no sample came in. Give tars of images with their texts"),
        ("pictures.tar", 3, "annotate: 0 of 3 samples succeeded; 3 failed by: "),
    ],
)
def test_nothing_that_could_be_annotated_is_a_failure_and_a_result(
    finished_run: Path, tmp_path: Path, capfilt: Any, name: str, came: int, said: str
) -> None:
    broken_inputs(tmp_path)
    words = ("annotate", tmp_path / name, *models(finished_run), "--out", tmp_path / "run", "--json")
    for _ in range(2):  # what is committed says the same again
        done = capfilt(*words)
        assert done.code == 1
        assert done.line.startswith(f"error: {said}")
        answer = json.loads(done.out)
        assert answer["samples"] == {"in": came, "kept": 0, "dropped": 0, "failed": came}
    assert (tmp_path / "run/annotations" / f"{Path(name).stem}.parquet").is_file()
    done = capfilt("select", tmp_path / name, "--annotations", tmp_path / "run", "--out", tmp_path / "b", "--json")
    assert done.code == 1
    assert done.line.startswith(f"error: {said.replace('annotate', 'select')}")
    assert json.loads(done.out)["samples"]["in"] == came
    done = capfilt("evaluate", finished_run / "round-1/captioner", tmp_path / name)
    assert done.code == 1
    assert f"no pair that can be read ({came} unreadable" in done.line
    assert ("unreadable, mostly " in done.line) is bool(came)


@pytest.mark.parametrize(("least", "code"), [(0.86, 0), (0.88, 1)])
def test_a_share_may_be_asked_for(finished_run: Path, tmp_path: Path, capfilt: Any, least: float, code: int) -> None:
    """20 good samples and 3 bad ones: 86.96 %."""
    broken_inputs(tmp_path)
    shards_ = (finished_run / "data/web/00001.tar", tmp_path / "pictures.tar")
    words = (*shards_, "--json", "--min-success", least)
    done = capfilt("annotate", *words, *models(finished_run), "--out", tmp_path / "a")
    assert (done.code, json.loads(done.out)["samples"]["kept"]) == (code, 20)
    if code:
        assert "annotate: 20 of 23 samples succeeded, and --min-success asks for 88.00%; 3 failed by: " in done.line
    done = capfilt("select", *words, "--annotations", tmp_path / "a", "--out", tmp_path / "b", "--set", "threshold=0")
    assert (done.code, json.loads(done.out)["samples"]["kept"]) == (code, 20)


def test_several_workers_in_one_process_are_refused(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    tar = finished_run / "data/web/00001.tar"
    done = capfilt("annotate", tar, *models(finished_run), "--out", tmp_path / "a", "--workers", "2")
    assert done.code == 2
    assert done.line.startswith("error: --workers 2: --address local is this process alone;")


def test_out_of_memory_is_reported_and_changes_nothing(
    finished_run: Path, tmp_path: Path, capfilt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["annotate", finished_run / "data/web/00000.tar", *models(finished_run), "--seed", "5"]
    assert capfilt(*words, "--out", tmp_path / "a").code == 0
    look = VisionTransformer.forward

    def small(self: VisionTransformer, images: Any) -> Any:
        if len(images) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return look(self, images)

    monkeypatch.setattr(VisionTransformer, "forward", small)
    done = capfilt(*words, "--out", tmp_path / "b")
    assert done.code == 0, done.err
    assert re.search(r"20 images  \S+ images/s  5 at a time: no more fit into memory", done.err)
    one, other = (pq.read_table(tmp_path / name / "annotations/00000.parquet") for name in "ab")
    assert one.drop(["itm", "itc"]).equals(other.drop(["itm", "itc"]))
    for score in ("itm", "itc"):
        assert np.allclose(one[score].to_numpy(), other[score].to_numpy(), atol=1e-5)
    monkeypatch.setattr(VisionTransformer, "forward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    done = capfilt(*words, "--out", tmp_path / "c")
    assert done.code == 1
    assert "out of memory with one picture at a time (full)" in done.line


class TestRefusals:
    """Each is one line, before anything is loaded or written."""

    def test_a_filter_that_cannot_fuse(self, finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
        captioner = finished_run / "round-1/captioner/checkpoint"
        both = ["--captioner", captioner, "--filter", captioner]
        done = capfilt("annotate", finished_run / "data/web", *both, "--out", tmp_path / "a")
        assert done.code == 2
        assert done.err == (
            f"error: {captioner} cannot be the filter: it cannot encode_text."
            " A filter must be able to encode_image, encode_text.\n"
        )
        assert not (tmp_path / "a").exists()

    def test_a_captioner_that_cannot_write(self, finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
        judge = finished_run / "round-1/filter/checkpoint"
        done = capfilt(
            "annotate", finished_run / "data/web", "--captioner", judge, "--filter", judge, "--out", tmp_path
        )
        assert done.code == 2
        assert "cannot be the captioner: it cannot decode" in done.line

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            (["--filter", "/"], 2, "/ is no model"),
            (["--set", "captoins=3"], 2, "Did you mean 'captions'?"),
            (["--set", "decode.top_p=2"], 2, "'decode.top_p' is 2"),
            (["--captions", "5", "--set", "decode.method=beam"], 2, "captions 5 of 3 beams"),
        ],
    )
    def test_what_cannot_be_meant(
        self, finished_run: Path, tmp_path: Path, capfilt: Any, words: list[str], code: int, said: str
    ) -> None:
        done = capfilt("annotate", finished_run / "data/web", *models(finished_run), "--out", tmp_path / "a", *words)
        assert done.code == code
        assert said in done.line
        assert not (tmp_path / "a").exists()

    def test_a_shard_that_is_not_there(self, finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
        done = capfilt("annotate", tmp_path / "{0..3}.tar", *models(finished_run), "--out", tmp_path / "a")
        assert done.code == 2
        assert "no shard found" in done.line

    def test_an_out_that_holds_another_run(self, finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
        done = capfilt("annotate", finished_run / "data/web", *models(finished_run), "--out", finished_run)
        assert done.code == 2
        assert "is the run folder of a `capfilt bootstrap`, and this is `capfilt annotate`" in done.line
        (tmp_path / "thesis.tex").touch()
        done = capfilt("annotate", finished_run / "data/web", *models(finished_run), "--out", tmp_path)
        assert done.code == 2
        assert "'thesis.tex' but no plan.json" in done.line


def words_of_a_long_stage(finished_run: Path, out: Path) -> list[str]:
    """A second of work on three shards."""
    many = ["--set", "captions=16", "--set", "decode.max_length=40", "--set", "decode.min_length=39"]
    return ["annotate", str(finished_run / "data/web"), *models(finished_run), "--out", str(out), *many]


@pytest.fixture(scope="module")
def undisturbed(finished_run: Path, tmp_path_factory: pytest.TempPathFactory, capfilt: Any) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert capfilt(*words_of_a_long_stage(finished_run, out)).code == 0
    return tables(out)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stage_may_be_ended_at_any_instant_and_run_again(
    finished_run: Path,
    tmp_path: Path,
    capfilt: Any,
    snapshot: Any,
    undisturbed: Any,
    ignore_signals: Any,
    sent: signal.Signals,
) -> None:
    out = tmp_path / "run"
    words = [*words_of_a_long_stage(finished_run, out), "--address", "local"]
    process = subprocess.Popen(
        [sys.executable, "-m", "capfilt", *words], stderr=subprocess.PIPE, text=True, preexec_fn=ignore_signals
    )
    first = out / "ledger/annotate/00000.json"
    while not first.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(sent)
    _, said = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(sent, -sent)
    if sent != signal.SIGKILL:
        assert said.splitlines()[-1] == "interrupted: run the same command again to go on"
        assert "Traceback" not in said
    before = snapshot(out)
    assert "ledger/annotate/00002.json" not in before, "it was not in the middle"
    assert capfilt(*words_of_a_long_stage(finished_run, out)).code == 0
    after = snapshot(out)
    temporary = (".capfilt-part-", "lock-")
    assert all(after[name] == before[name] for name in before if not any(part in name for part in temporary))
    assert tables(out) == undisturbed


def test_a_file_that_cannot_be_written_costs_only_itself(
    finished_run: Path, tmp_path: Path, capfilt: Any, undisturbed: dict[str, bytes]
) -> None:
    """A limit on the size of files stands in for a full disk: the kernel refuses the write in the same place."""
    words = words_of_a_long_stage(finished_run, tmp_path / "run")
    words[1] = str(finished_run / "data/web/00001.tar")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        done = capfilt(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.code == 1
    assert done.line.startswith("error: annotate: OSError: [Errno 27] File too large")
    others = [line for line in done.err.splitlines() if not line.startswith("annotate ")]
    assert others == [done.line], "the error's line beside the stage's"
    assert tables(tmp_path / "run") == {}
    assert not list((tmp_path / "run").rglob(".capfilt-part-*"))
    assert capfilt(*words).code == 0
    assert tables(tmp_path / "run") == {"00001.parquet": undisturbed["00001.parquet"]}


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 120 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120m", "none", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_disk_that_runs_full_is_one_line_and_nothing_is_lost(
    small_disk: Path, finished_run: Path, capfilt: Any, undisturbed: dict[str, bytes]
) -> None:
    out, filler = small_disk / "run", small_disk / "filler"
    words = words_of_a_long_stage(finished_run, out)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 60_000_000)
    done = capfilt(*words)
    assert done.code == 1
    assert "MB are free" in done.line
    assert not out.exists()
    filler.unlink()
    # The disk passes the look at the start and is filled by somebody else then.
    process = subprocess.Popen(
        [sys.executable, "-m", "capfilt", *words, "--address", "local"], stderr=subprocess.PIPE, text=True
    )
    while not (out / "ledger/annotate/00000.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # on a busy machine it could end before the disk is full
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 20))
        except OSError:
            pass
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate()
    assert process.returncode == 1
    assert "No space left on device" in said.splitlines()[-1]
    assert "Traceback" not in said
    filler.unlink()
    assert capfilt(*words).code == 0
    assert tables(out) == undisturbed


def test_a_shard_that_is_given_twice_is_refused(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    spec = f"{finished_run / 'data/web'}::{finished_run / 'data/web/00001.tar'}"
    done = capfilt("annotate", spec, *models(finished_run), "--out", tmp_path / "a")
    assert done.code == 2
    assert "00001.tar is given twice" in done.line


def test_a_changed_shard_is_annotated_again(finished_run: Path, tmp_path: Path, capfilt: Any, snapshot: Any) -> None:
    web = Path(shutil.copytree(finished_run / "data/web", tmp_path / "web"))
    words = ["annotate", web, *models(finished_run), "--out", tmp_path / "a"]
    assert capfilt(*words).code == 0
    before = snapshot(tmp_path / "a")
    shards.write(web / "00001.tar", list(shards.read(str(finished_run / "data/web/00002.tar")))[:3])  # type: ignore[arg-type]
    assert capfilt(*words).code == 0
    after = snapshot(tmp_path / "a")
    assert {name for name in after if after[name] != before[name]} == {
        "annotations/00001.parquet", "ledger/annotate/00001.json",
    }  # fmt: skip
    assert pq.read_table(tmp_path / "a/annotations/00001.parquet").num_rows == 6
