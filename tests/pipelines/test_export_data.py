"""Every format of `export DATA`, opened by the tool that it is for."""

from __future__ import annotations

import gc
import io
import json
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from tars import tar_of

import capfilt
from capfilt.data import shards
from capfilt.data.exports import listed, tables
from capfilt.errors import FolderError, RunError, ShortfallError
from capfilt.runs.ledger import Ledger
from capfilt.stages.export import pieces

HOSTILE = (
    *("a\ttab, \"quotes\" and 'more'", "two\nlines\r\nand a third", "=HYPERLINK(\"x\")", "NA", "null", "nul\0byte"),
    *("lone \ud800 surrogate", "an <image> of a </s> token", "café 犬 🐕", "2020", "-1", "../../etc/passwd"),
)  # fmt: skip
"""Texts that some format's reader would take for something else."""


def jpeg(number: int, width: int = 48, height: int = 32) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


def members(key: str, image: bytes, *captions: dict[str, Any], **meta: Any) -> list[tuple[str, bytes]]:
    described = json.dumps({"captions": captions, **meta}).encode()  # spells surrogates as escapes
    return [(f"{key}.jpg", image), (f"{key}.json", described)]


MEASURED = {"clip_similarity_vitb32": 0.3, "num_tokens_bert": 7, "watermark_score": 0.1, "num_faces": True}
"""As the json of a sample of COYO has it; a count of faces that is none."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of the same keys: hostile texts; several texts with scores; what cannot be used as it is."""
    folder = tmp_path_factory.mktemp("pool")
    plain = [member for number, text in enumerate(HOSTILE)
             for member in members(f"{number:04d}", jpeg(number), {"text": text, "source": "web"})]  # fmt: skip
    scored = [
        {"text": "web text", "source": "web", "itm": 0.9, "itc": 0.2},
        {"text": "worse", "source": "synthetic", "itm": 0.6, "itc": 0.25, "round": 2},
        {"text": "better", "source": "synthetic", "itm": 0.7, "itc": 0.5, "round": 2},
    ]
    several = members("0000", jpeg(100), *scored, url="https://x.invalid/a.jpg", original_width=640,
                      original_height=480, **MEASURED)  # fmt: skip
    several += members("0001", jpeg(101), {"text": "only", "source": "synthetic", "itm": "high", "itc": None}, url=7)
    odd = [("0000.jpg", b"not a picture"), ("0000.txt", b"its text")]
    odd += [("0001.jpg", jpeg(102)), ("0001.txt", b"...")]  # nothing to read
    odd += [("0002.txt", b"no picture")]
    odd += members("0003", jpeg(103), {"text": "one", "source": "human"}, uid="AB" * 16)
    odd += members("0004", jpeg(104), {"text": "two", "source": "human"}, uid="ab" * 16)
    for number, files in enumerate((plain, several, odd)):
        (folder / f"{number:05d}.tar").write_bytes(tar_of(*files))
    return folder


def export(pool: Path, out: Path, form: str, **options: Any) -> capfilt.DataExportResult:
    return capfilt.export_data(pool, out=out, form=form, address="local", **options)


ALL = capfilt.Counts(19, 18, 0, 1)
WITH_TEXT = capfilt.Counts(19, 17, 1, 1)


def samples_of(where: Path) -> list[capfilt.Sample]:
    return [one for url in shards.expand(str(where)) for one in shards.read(url) if isinstance(one, capfilt.Sample)]


def written(text: str) -> str:
    return text.replace("\ud800", "\ufffd")


def test_webdataset(pool: Path, tmp_path: Path) -> None:
    done = export(pool, tmp_path / "o", "webdataset")
    assert done.samples == ALL
    sizes = json.loads((tmp_path / "o/sizes.json").read_text())
    assert sizes == {"00000.tar": len(HOSTILE), "00001.tar": 2, "00002.tar": 4}
    tars = [str(tmp_path / "o" / name) for name in sizes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing the tars to the garbage collector
        read = list(webdataset.WebDataset(tars, shardshuffle=False))
        first, _ = list(webdataset.WebDataset(tars[1:2], shardshuffle=False).decode("pil"))
        gc.collect()
    assert Counter(Path(one["__url__"]).name for one in read) == sizes
    assert first["jpg"].size == (48, 32)
    assert [caption["text"] for caption in first["json"]["captions"]] == ["web text", "worse", "better"]
    assert first["json"]["url"] == "https://x.invalid/a.jpg"


def test_webdataset_of_other_sizes(pool: Path, tmp_path: Path) -> None:
    """Files of 4 at most of 18 samples of three shards, whose keys are the same; joined on uid nothing is lost."""
    done = export(pool, tmp_path / "o", "webdataset", samples_per_shard=4)
    sizes = json.loads((tmp_path / "o/sizes.json").read_text())
    assert sizes == {"00000.tar": 4, "00001.tar": 4, "00002.tar": 4, "00003.tar": 3, "00004.tar": 3}
    assert done.samples == ALL
    before, after = samples_of(pool), samples_of(tmp_path / "o")
    assert [one.uid for one in after] == [one.uid for one in before]
    assert [one.image for one in after] == [one.image for one in before]
    assert [one.meta["original_key"] for one in after] == [one.key for one in before]
    assert after[4].key == "000010000"


def test_parts_are_full_and_files_have_no_gaps() -> None:
    counts = {f"{number}.tar": 360 for number in range(11)}
    made = pieces(list(counts), counts, 1000)
    assert [(one.first, one.files, len(one.urls), one.per_file) for one in made] == [
        *((0, 2, 5, 900), (2, 2, 5, 900)),
        (4, 1, 1, 360),
    ]
    assert [(one.first, one.files) for one in pieces(["a"], {"a": 0}, 10)] == [(0, 1)]
    large = pieces(["a", "b"], {"a": 5000, "b": 4600}, 1000)
    assert [(one.first, one.files, one.per_file) for one in large] == [(0, 5, 1000), (5, 5, 920)]


def test_parquet(pool: Path, tmp_path: Path) -> None:
    assert export(pool, tmp_path / "o", "parquet").samples == ALL
    rows = pandas.concat(pandas.read_parquet(path) for path in sorted((tmp_path / "o").glob("*.parquet")))
    assert list(rows["text"][: len(HOSTILE)]) == [written(text) for text in HOSTILE]
    assert list(rows["image"][: len(HOSTILE)]) == [jpeg(number) for number in range(len(HOSTILE))]
    scored = rows.iloc[len(HOSTILE)]
    assert [(one["source"], one["itc"]) for one in scored["captions"]] == [
        *(("web", 0.2), ("synthetic", 0.25), ("synthetic", 0.5)),
    ]
    assert json.loads(scored["json"])["watermark_score"] == 0.1
    assert (scored["width"], scored["height"]) == (640, 480)
    odd = rows.iloc[-4:]
    assert list(odd["width"].isna()) == [True, False, False, False]  # of what is no picture
    assert list(odd["text"].isna()) == [False, True, False, False]


def test_hf_dataset(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "o"
    export(pool, folder, "hf-dataset", samples_per_shard=5)
    (folder / "parts.json").write_text('[{"not": "data"}]')
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 18
    assert isinstance(loaded.features["image"], datasets.Image)
    assert loaded["text"][: len(HOSTILE)] == [written(text) for text in HOSTILE]
    assert loaded[0]["image"].size == (48, 32)
    assert [one["source"] for one in loaded[len(HOSTILE)]["captions"]] == ["web", "synthetic", "synthetic"]
    encoded = loaded.cast_column("image", datasets.Image(decode=False))
    assert encoded[3]["image"]["bytes"] == jpeg(3)
    streamed = datasets.load_dataset(str(folder), split="train", streaming=True)
    assert next(iter(streamed))["text"] == HOSTILE[0]


COYO = (
    *("id", "url", "text", "width", "height", "image_phash", "text_length", "word_count", "num_tokens_bert"),
    *("num_tokens_gpt", "num_faces", "clip_similarity_vitb32", "clip_similarity_vitl14", "nsfw_score_opennsfw2"),
    *("nsfw_score_gantman", "watermark_score", "aesthetic_score_laion_v2"),
)


def test_coyo(pool: Path, tmp_path: Path) -> None:
    """A row for each text; a measure of the web text is not one of the synthetic texts, and a missing one is null."""
    assert export(pool, tmp_path / "o", "coyo").samples == WITH_TEXT
    paths = sorted((tmp_path / "o").glob("*.parquet"))
    assert tuple(pq.read_schema(paths[0]).names[: len(COYO)]) == COYO
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows) == len(HOSTILE) + 4 + 3
    first, second, _, only = pq.read_table(paths[1]).to_pylist()
    assert first["id"] == 1 << 33
    assert (first["url"], first["width"], first["height"]) == ("https://x.invalid/a.jpg", 640, 480)
    assert (first["text_length"], first["word_count"]) == (8, 2)
    assert (first["clip_similarity_vitb32"], second["clip_similarity_vitb32"]) == (0.3, None)
    assert (first["num_tokens_bert"], second["num_tokens_bert"]) == (7, None)
    assert (first["watermark_score"], second["watermark_score"]) == (0.1, 0.1)
    assert (first["num_faces"], first["clip_similarity_vitl14"]) == (None, None)
    assert first["image_phash"] == str(imagehash.phash(Image.open(io.BytesIO(jpeg(100)))))
    assert (only["url"], only["itm"], only["width"]) == (None, None, 48)
    broken = pq.read_table(paths[2]).to_pylist()[0]
    assert (broken["image_phash"], broken["width"]) == (None, None)


LAION = (
    *("URL", "TEXT", "top_caption", "all_captions", "all_similarities", "WIDTH", "HEIGHT", "similarity", "hash"),
    *("pwatermark", "punsafe"),
)


def test_laion_coco(pool: Path, tmp_path: Path) -> None:
    assert export(pool, tmp_path / "o", "laion-coco").samples == WITH_TEXT
    table = pq.read_table(tmp_path / "o/00001.parquet")
    assert tuple(table.column_names[: len(LAION)]) == LAION
    first, second = table.to_pylist()
    assert (first["TEXT"], first["similarity"], first["top_caption"]) == ("web text", 0.2, "better")
    assert dict(zip(first["all_captions"], first["all_similarities"], strict=True)) == {"worse": 0.25, "better": 0.5}
    assert (second["TEXT"], second["top_caption"], second["all_similarities"]) == (None, "only", [None])
    texts = pq.read_table(tmp_path / "o/00000.parquet")["TEXT"].to_pylist()
    assert texts == [written(text) for text in HOSTILE]


def test_blip_json(pool: Path, tmp_path: Path) -> None:
    """As BLIP's `pretrain_dataset` reads it: `Image.open(ann["image"])`, `ann["caption"]`."""
    done = export(pool, tmp_path / "o", "blip-json")
    assert done.samples == WITH_TEXT
    assert done.written == (tmp_path / "o/captions.json",)
    annotation = json.loads(done.written[0].read_bytes())
    assert [one["caption"] for one in annotation[: len(HOSTILE)]] == [written(text) for text in HOSTILE]
    assert len(annotation) == sum(done.texts.kept.values()) == len(HOSTILE) + 7
    assert Path(annotation[0]["image"]).read_bytes() == jpeg(0)
    same_uid = [one for one in annotation if "ab" * 16 in one["image"]]
    assert [Path(one["image"]).read_bytes() for one in same_uid] == [jpeg(103), jpeg(104)]
    assert all((tmp_path / "o/images") in Path(one["image"]).resolve().parents for one in annotation)
    moved = export(pool, tmp_path / "moved", "blip-json", image_root="/data/web").written[0]
    assert json.loads(moved.read_text())[0]["image"].startswith("/data/web/images/00000/")


def test_llava_json(pool: Path, tmp_path: Path) -> None:
    """As LLaVA's `LazySupervisedDataset` reads it; its tokenizer finds one picture in each conversation."""
    done = export(pool, tmp_path / "o", "llava-json")
    conversations = json.loads(done.written[0].read_bytes())
    assert len(conversations) == len(HOSTILE) + 7
    assert len({one["id"] for one in conversations}) == len(conversations)
    for one in conversations:
        assert (tmp_path / "o" / one["image"]).is_file()
        human, gpt = one["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        assert (human["value"] + gpt["value"]).count("<image>") == 1
        assert "</s>" not in gpt["value"]
    assert conversations[7]["conversations"][1]["value"] == "an < image> of a < /s> token"


class CsvDataset:
    """open_clip's of that name (open_clip_train/data.py, 3.3.0), without torchvision, of which there is no build for
    every build of torch."""

    def __init__(self, input_filename: Path, img_key: str = "filepath", caption_key: str = "title", sep: str = "\t"):
        df = pandas.read_csv(input_filename, sep=sep)
        self.images = df[img_key].tolist()
        self.captions = df[caption_key].tolist()

    def __getitem__(self, idx: int) -> tuple[tuple[int, int], str]:
        with Image.open(str(self.images[idx])) as image:
            return image.size, str(self.captions[idx])


def test_open_clip_csv(pool: Path, tmp_path: Path) -> None:
    """Every text as it was, but for a NUL, and for spaces around it, which open_clip's tokenizer strips."""
    data = CsvDataset(export(pool, tmp_path / "o", "open-clip-csv").written[0])
    read = [data[number] for number in range(len(HOSTILE))]
    assert [text.strip() for _, text in read] == [written(text).replace("\0", " ") for text in HOSTILE]
    assert not any(text.startswith(("=", "-", "+", "@")) for _, text in read)
    assert [size for size, _ in read] == [(48, 32)] * len(HOSTILE)
    assert len(data.captions) == len(HOSTILE) + 7


def test_what_pandas_takes_for_missing_is_known() -> None:
    assert pandas._libs.parsers.STR_NA_VALUES - {""} == listed.MISSING


def test_datacomp_npy(pool: Path, tmp_path: Path) -> None:
    """As DataComp's resharder.py does it: the type is checked, and a uid is searched for from both sides."""
    done = export(pool, tmp_path / "o", "datacomp-npy")
    subset = np.load(done.written[0], mmap_mode="r")
    u16 = np.dtype("u8,u8")
    assert subset.dtype == u16
    wanted = [
        one.uid for url in shards.expand(str(pool)) for one in shards.read(url) if isinstance(one, capfilt.Sample)
    ]
    for uid in wanted:
        key = np.array([divmod(int(uid, 16), 2**64)], u16)[0]
        assert np.searchsorted(subset, key, "right") - np.searchsorted(subset, key, "left") == 1
    assert len(subset) == len(set(wanted)) == len(wanted) - 1
    assert done.samples == ALL


def test_a_selection_leaves_with_the_counts_of_its_ledger(finished_run: Path, tmp_path: Path) -> None:
    """Of a round of a bootstrap, with few samples in a file: what was kept, its scores, nothing else."""
    home = finished_run / "round-1"
    total = Ledger(home, "select").total()
    done = export(home, tmp_path / "o", "parquet", samples_per_shard=7)
    assert done.samples.num_in == done.samples.kept == total.samples["kept"] > 0
    assert done.texts.kept == total.texts["kept"]
    rows = [row for path in sorted((tmp_path / "o").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    verdicts = [row for path in home.glob("dataset/*.parquet") for row in pq.read_table(path).to_pylist()]
    kept = {(row["uid"], row["text"], row["itm"]) for row in verdicts if row["verdict"] == "kept"}
    assert {(row["uid"], one["text"], np.float32(one["itm"])) for row in rows for one in row["captions"]} == kept
    subset = export(home, tmp_path / "npy", "datacomp-npy")
    assert len(np.load(subset.written[0])) == len({uid for uid, _, _ in kept})
    assert subset.samples == done.samples
    assert capfilt.verify(tmp_path / "o").ok


def test_annotations_leave_with_all_texts(finished_run: Path, tmp_path: Path) -> None:
    home = tmp_path / "run/round-1"
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("dataset"))
    done = export(home, tmp_path / "o", "laion-coco")
    total = Ledger(home, "annotate").total()
    assert (done.samples.num_in, done.texts.num_in) == (total.samples["in"], dict(total.texts["in"]))
    rows = [row for path in sorted((tmp_path / "o").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    scores = {
        (row["uid"], row["text"]): row["itc"]
        for path in home.glob("annotations/*.parquet")
        for row in pq.read_table(path).to_pylist()
        if row["source"] == "synthetic"
    }
    left = [
        (row["uid"], *pair) for row in rows for pair in zip(row["all_captions"], row["all_similarities"], strict=True)
    ]
    assert {(uid, text): np.float32(score) for uid, text, score in left} == {
        key: np.float32(score) for key, score in scores.items()
    }
    subset = export(home, tmp_path / "npy", "datacomp-npy")
    assert subset.samples == done.samples
    assert len(np.load(subset.written[0])) == len({row["uid"] for row in rows})


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of an export but its log and its pace: when it was written, and what it holds."""
    files = (
        path for path in folder.rglob("*") if path.is_file() and path.suffix in (".jpg", ".txt", ".parquet", ".tar")
    )
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_the_same_command_goes_on(pool: Path, tmp_path: Path) -> None:
    """A picture that is gone comes back, and nothing else is written; a changed shard is written anew."""
    shutil.copytree(pool, tmp_path / "pool")
    out = tmp_path / "o"
    first = export(tmp_path / "pool", out, "llava-json")
    before = snapshot(out)
    gone = sorted(out.glob("images/00001/*.jpg"))[0]
    gone.unlink()
    assert export(tmp_path / "pool", out, "llava-json").record == first.record
    after = snapshot(out)
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    assert {Path(name).stem if name.startswith("parts") else Path(name).parent.name
            for name in after if after[name] != before[name]} == {"00001"}  # fmt: skip
    changed = tmp_path / "pool/00000.tar"
    changed.write_bytes(tar_of(*members("0000", jpeg(0), {"text": "another", "source": "web"})))
    export(tmp_path / "pool", out, "llava-json")
    assert json.loads((out / "conversations.json").read_text())[0]["conversations"][1]["value"] == "another"
    with pytest.raises(RunError, match="was planned otherwise"):
        export(pool, out, "llava-json")


def test_a_store(pool: Path, finished_run: Path) -> None:
    from capfilt.storage.paths import storage_path

    out = storage_path("memory://exports/csv")
    done = capfilt.export_data(pool, out=out, form="open-clip-csv", address="local")
    read = pandas.read_csv(io.BytesIO((out / "captions.csv").read_bytes()), sep="\t")
    assert len(read) == sum(done.texts.kept.values())
    assert (out / read["filepath"][0]).read_bytes() == jpeg(0)
    npy = storage_path("memory://exports/npy")
    capfilt.export_data(finished_run / "round-1", out=npy, form="datacomp-npy", address="local")
    assert len(np.load(io.BytesIO((npy / "subset.npy").read_bytes())))
    out.remove_tree()
    npy.remove_tree()


def test_the_command(pool: Path, finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    done = capfilt("export", pool, "--as", "coyo", "--out", tmp_path / "o", "--json", address=None)
    assert done.code == 0, done.err
    assert json.loads(done.out)["samples"] == {"in": 19, "kept": 17, "dropped": 1, "failed": 1}
    model = finished_run / "round-1/pretrain/checkpoint"
    for words, said in (
        ((pool, "--as", "coyoo"), "Did you mean 'coyo'?"),
        ((pool, "--as", "hf"), "is no model; what can be read: "),
        ((finished_run / "round-1/dataset", "--as", "pth"), "data leave as webdataset, parquet, hf-dataset, coyo, "),
        ((model, "--as", "coyo"), "is no data: no shard found"),
        ((model, "--as", "hf", "--workers", 2), "--workers: of data only, and --as hf is not"),
        ((pool, "--as", "coyo", "--vision", "x.pth"), "--vision: of models only, and --as coyo is not"),
        (
            (pool, "--as", "coyo", "--samples-per-shard", 5),
            "--samples-per-shard is for webdataset, parquet",
        ),
        ((pool, "--as", "parquet", "--image-root", "x"), "--image-root is for blip-json, open-clip-csv"),
        ((finished_run, "--as", "coyo"), f"with data of each round: give {finished_run}/round-1."),
    ):
        done = capfilt("export", *words, "--out", tmp_path / "new", address=None)
        assert done.code == 2, (words, done.err)
        assert said in done.err
    assert not (tmp_path / "new").exists()


def test_what_is_not_as_its_ledger_says(finished_run: Path, tmp_path: Path) -> None:
    home = tmp_path / "run/round-1"
    shutil.copytree(finished_run, tmp_path / "run")
    tar = home / "dataset/00000.tar"
    shards.write(tar, samples_of(tar)[1:])
    with pytest.raises(RunError, match=r"samples came in, and \d+ are in the ledger of .*capfilt verify"):
        export(home, tmp_path / "o", "coyo")
    (home / "dataset/sizes.json").unlink()
    with pytest.raises(FolderError, match="has not ended: run its command again"):
        export(home, tmp_path / "p", "coyo")


def test_pictures_without_texts_are_no_pairs(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of(("a.jpg", jpeg(0)), ("a.txt", b"...")))
    with pytest.raises(ShortfallError, match="has a text, which blip-json is made of"):
        export(tmp_path / "0.tar", tmp_path / "o", "blip-json")
    assert export(tmp_path / "0.tar", tmp_path / "p", "hf-dataset").samples.kept == 1


def test_a_row_group_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS", 3)
    monkeypatch.setattr(tables, "BYTES", 10)
    rows = iter([{"image": b"x" * 4}] * 5 + [{"image": b"x" * 10}] + [{"image": {"bytes": b"x"}}])
    assert [len(group) for group in tables._groups(rows, 6)] == [3, 3]
    assert [len(group) for group in tables._groups(rows, 0)] == [1]
