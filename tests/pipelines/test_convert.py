"""convert: published data sets to shards; every row ends as kept or failed, and the counts add up."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

import capfilt
from capfilt.data import shards
from capfilt.data.regions import regions_of
from capfilt.data.sample import Sample
from capfilt.data.tasks import dialog_of, hypotheses_of, questions_of, right_picture, statements_of
from capfilt.errors import CapfiltError, DataError, ListError, RecipeError, RunError, ShortfallError, UsageError

NAMES = ("train2014/COCO_train2014_000000000009.jpg", "val2014/COCO_val2014_000000000025.jpg", "7.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of 40 x 30, a broken one, and one of a format that shards lack."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (number, 0, 0)).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / NAMES[0]).read_bytes()[:200])
    Image.new("RGB", (4, 3)).save(folder / "1.gif")
    return folder


def write(folder: Path, **files: Any) -> list[Path]:
    """Files by name: a list of dicts under a name that ends in `l` as JSON lines, all else as JSON."""
    paths = []
    for name, tree in files.items():
        path = folder / f"{name.rstrip('_')}.json"
        path.write_text("\n".join(map(json.dumps, tree)) if name.endswith("_") else json.dumps(tree))
        paths.append(path)
    return paths


def convert(task: str, files: Iterable[Path], images: Path, out: Path, **more: Any) -> Any:
    done = capfilt.convert(task, list(files), images=images, out=out, address="local", **more)
    tables = [pq.read_table(path) for path in sorted(out.glob("0*.parquet"))]
    statuses = Counter(status for table in tables for status in table["status"].to_pylist())
    assert done.samples.num_in == done.samples.kept + done.samples.failed
    assert sum(kind["in"] for kind in done.by_kind.values()) == statuses.total()
    assert all(kind["in"] == kind["kept"] + kind["failed"] for kind in done.by_kind.values())
    assert sum(kind["kept"] for kind in done.by_kind.values()) == statuses["kept"]
    return done


def question(id_: Any, image: Any = 9, text: Any = "What is it?") -> dict[str, Any]:
    return {"question_id": id_, "image_id": image, "question": text}


def answers(id_: Any, *given: str) -> dict[str, Any]:
    told = [{"answer": answer, "answer_id": n, "answer_confidence": "yes"} for n, answer in enumerate(given, 1)]
    return {"question_id": id_, "image_id": 9, "answers": told, "answer_type": "other", "question_type": "what is"}


QUESTIONS = {"info": {"year": 2015}, "data_subtype": "val2014",
             "questions": [question(1), question(2, 25), question(3), question(1), question(4, 9, "?"), question(5, 77),
                           question(6), 3, question(None)]}  # fmt: skip
ANNOTATIONS = {
    "annotations": [answers(1, "a dog"), answers(2, *["yes"] * 10), answers(5, "six"), answers(6), answers(99, "a cat")]
}


def test_vqa(images: Path, tmp_path: Path) -> None:
    files = write(tmp_path, annotations=ANNOTATIONS, questions=QUESTIONS)
    done = convert("vqa", files, images, tmp_path / "out", shard_size=2)
    first, second = done.rows()
    assert [first.meta["image"], second.meta["image"]] == list(NAMES[:2])
    assert first.image == (images / NAMES[0]).read_bytes()
    assert [one.id for one in questions_of(first.meta)] == [1]
    assert questions_of(second.meta)[0].answers == ("yes",) * 10
    assert questions_of(second.meta)[0].question_type == "what is"
    assert done.by_kind["questions"]["why"] == {
        "no label has its id": 2,  # 3 and 4
        "its id comes twice": 1,
        "no picture has its number": 1,
        "the question has no answers": 1,
        "it names no picture": 1,
        "its id is no whole number or text": 1,
        "no row has the id that its label names": 1,
    }
    assert done.samples == capfilt.Counts(5, 2, 0, 3)
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {"00000.tar": 2}
    assert capfilt.verify(tmp_path / "out").ok
    explained = list(capfilt.explain(tmp_path / "out", first.key).rows())
    assert {row["reason"] for row in explained if row["status"] == "failed"} > {"its id comes twice"}
    with pytest.raises(RunError, match="is a run of convert, which has no page"):
        capfilt.report(tmp_path / "out")


def test_a_test_split_has_no_answers(images: Path, tmp_path: Path) -> None:
    files = write(tmp_path, questions={"questions": [question(1), question(4, 9, "?"), question("2", "7.png")]})
    done = convert("vqa", files, images, tmp_path / "out")
    assert [questions_of(one.meta)[0].answers for one in done.rows()] == [(), ()]
    assert done.by_kind["questions"]["why"] == {"question is ...; it is a text with something to read": 1}


def statement(name: Any, label: Any = "True") -> dict[str, Any]:
    return {"identifier": name, "sentence": "Both are red.", "label": label, "left_url": "http://x.invalid"}


def test_nlvr2(images: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("dev-1-0-img0", "dev-1-0-img1", "dev-1-1-img0", "dev-1-1-img1", "dev-2-0-img0", "dev-3-0-img0"):
        (pictures / f"{name}.png").write_bytes((images / NAMES[2]).read_bytes())
    (pictures / "dev-2-0-img1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    names = ("dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-2-0-0", "dev-3-0-0", "dev-4", "dev-1-1-1")
    rows = [statement(name, "True" if name != "dev-1-1-1" else "true") for name in names]
    done = convert("nlvr2", write(tmp_path, dev_=rows), pictures, tmp_path / "out")
    first, second = shards.read(str(tmp_path / "out/00000.tar"), extras=True)
    assert isinstance(first, Sample)
    assert isinstance(second, Sample)
    assert right_picture(first.extras) == (pictures / "dev-1-0-img1.png").read_bytes()
    assert [(one.id, one.label, one.group) for one in statements_of(first.meta)] == [
        ("dev-1-0-0", True, "dev-1-0"),
        ("dev-1-0-1", True, "dev-1-1"),
    ]
    assert done.by_kind["statements"]["why"] == {
        "right picture, broken image": 1,
        "no picture has its name": 1,
        "identifier is not SPLIT-SET-PAIR-SENTENCE": 1,
        "label is ...; it is true or false": 1,
    }


def test_entailment(images: Path, tmp_path: Path) -> None:
    def hypothesis(id_: str, label: str, number: Any = "7") -> dict[str, Any]:
        return {"pairID": id_, "Flickr30K_ID": number, "gold_label": label, "sentence1": "A.", "sentence2": "A dog."}

    (images / "7.jpg").write_bytes((images / NAMES[1]).read_bytes())
    labels = ("neutral", "contradiction", "-", "Neutral", "Widerspruch")
    rows = [hypothesis(f"7.jpg#{n}", label) for n, label in enumerate(labels)]
    done = convert(
        "entailment", write(tmp_path, dev_=[*rows, hypothesis("x", "neutral", None)]), images, tmp_path / "o"
    )
    (only,) = done.rows()
    assert [one.label for one in hypotheses_of(only.meta)] == ["neutral", "contradiction"]
    assert done.by_kind["hypotheses"]["failed"] == 4
    assert done.samples.failed == 1


REFS = [
    {"ref_id": 0, "ann_id": 5, "image_id": 9, "split": "val", "file_name": "COCO_train2014_000000000009_5.jpg",
     "sentences": [{"sent_id": 1, "sent": "the dog", "raw": "The dog"}, {"sent_id": 2, "sent": "left", "raw": "Left"}]},
    {"ref_id": 1, "ann_id": 6, "image_id": 9, "split": "val", "sentences": [{"sent_id": 3, "sent": "empty"}]},
    {"ref_id": 2, "ann_id": 8, "image_id": 9, "split": "val", "sentences": [{"sent_id": 4, "sent": "gone"}]},
    {"ref_id": 3, "ann_id": 5, "image_id": 9, "split": "testA", "sentences": [{"sent_id": 5, "sent": "other"}]},
    {"ref_id": 4, "ann_id": 9, "image_id": 25, "split": "val", "sentences": [{"sent_id": 6, "sent": "outside"}]},
]  # fmt: skip
INSTANCES = {"images": [{"id": 9}], "annotations": [
    {"id": 5, "bbox": [10.5, 2, 29.75, 28.5]}, {"id": 6, "bbox": [1, 1, 0, 4]}, {"id": 7, "bbox": [0, 0, 1, 1]},
    {"id": 9, "bbox": [10, 2, 35, 3]}]}  # fmt: skip


def test_grounding_from_refer(images: Path, tmp_path: Path) -> None:
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(REFS, 2))
    files = [*write(tmp_path, instances=INSTANCES), tmp_path / "refs(unc).p"]
    done = convert("grounding", files, images, tmp_path / "out", split="val")
    (only,) = done.rows()
    # The box reaches a quarter of a pixel, and half of one, out of the picture.
    assert [(one[:4], one.text, one.id) for one in regions_of(only.meta, 40, 30)] == [
        ((10.5, 2, 29.5, 28), "the dog", 1),
        ((10.5, 2, 29.5, 28), "left", 2),
    ]
    assert done.by_kind["regions"]["why"] == {
        "box is empty; its width and height are above 0": 1,
        "there is no box for it": 1,
        "box lies outside the picture": 1,
    }
    assert done.record["other_splits"] == {"testA": 1}
    for split, said in (((), "it has several splits"), (("tests",), "no row is of split tests")):
        with pytest.raises(UsageError, match=rf"{said}; choose with --split.* There are: testA \(1\), val \(4\)"):
            convert("grounding", files, images, tmp_path / f"out-{len(split)}", split=split)


def test_grounding_from_the_json_of_xvlm(images: Path, tmp_path: Path) -> None:
    (tmp_path / "refs.p").write_bytes(pickle.dumps(REFS))
    listed = [{"image": NAMES[0], "text": "the dog", "ref_id": 0}, {"image": NAMES[0], "text": "left", "ref_id": 0},
              {"image": NAMES[1], "text": "a cat", "ref_id": 77, "bbox": [0, 0, 4, 4]},
              {"image": NAMES[1], "text": "no box", "ref_id": 78}]  # fmt: skip
    files = [*write(tmp_path, instances=INSTANCES, train=listed), tmp_path / "refs.p"]
    done = convert("grounding", files, images, tmp_path / "out")
    read = [regions_of(one.meta, 40, 30) for one in done.rows()]
    assert [[one.id for one in regions] for regions in read] == [["0#0", "0#1"], ["77#0"]]
    assert done.by_kind["regions"]["why"] == {"there is no box for it": 1}
    with pytest.raises(UsageError, match="is of one split already"):
        convert("grounding", files, images, tmp_path / "other", split="val")


def visdial(*dialogs: Any) -> dict[str, Any]:
    texts = {"questions": ["is it red", "how many"], "answers": ["yes", "no", "two"]}
    return {"version": "1.0", "split": "val", "data": {"dialogs": dialogs, **texts}}


def dialog(image: Any = 25, **more: Any) -> dict[str, Any]:
    rounds = [{"question": 0, "answer": 1, "answer_options": [0, 1, 2], "gt_index": 1},
              {"question": 1, "answer": 2, "answer_options": [2, 0], "gt_index": 0, **more}]  # fmt: skip
    return {"image_id": image, "caption": "a bus", "dialog": rounds}


def test_dialog(images: Path, tmp_path: Path) -> None:
    values: list[tuple[Any, int, list[float]]] = [
        (25, 2, [0.5, 0]), (9, 1, [1]), (9, 2, [2, 0]), (25, 9, []), (25, 2, [1, 1]), ("25", 1, []),
    ]  # fmt: skip
    dense = [{"image_id": image, "round_id": number, "gt_relevance": given} for image, number, given in values]
    dense[1]["relevance"] = dense[1].pop("gt_relevance")
    dialogs = [dialog(), dialog(9), dialog(9), dialog(7, question=5), dialog(8, gt_index=4), {}]
    files = write(tmp_path, dense=dense, val=visdial(*dialogs))
    done = convert("dialog", files, images, tmp_path / "out")
    read = {one.id: one for sample in done.rows() if (one := dialog_of(sample.meta))}
    assert list(read) == [9, 25]
    assert read[25].rounds[1].options == ("two", "yes")
    assert read[25].rounds[1].relevance == (0.5, 0.0)
    assert read[9].rounds[0].answer == "no"
    assert all(one.relevance is None for one in read[9].rounds)
    assert done.by_kind["relevance"] == {"in": 6, "kept": 1, "failed": 5, "why": done.by_kind["relevance"]["why"]}
    assert done.by_kind["dialog"] == {"in": 6, "kept": 2, "failed": 4, "why": done.by_kind["dialog"]["why"]}
    assert "it has another length than the options" in done.by_kind["relevance"]["why"]
    assert "a number of the question leads to no text" in done.by_kind["dialog"]["why"]


def test_captions_by_split(images: Path, tmp_path: Path) -> None:
    def picture(split: str, name: str, *texts: str) -> dict[str, Any]:
        folder, _, file = name.rpartition("/")
        sentences = [{"raw": text, "sentid": hash((name, text)) % 10**6, "tokens": []} for text in texts]
        return {"filepath": folder, "filename": file, "split": split, "sentences": sentences}

    images_of = [
        picture("train", NAMES[0], "a dog", "..."), picture("restval", NAMES[1], "a cat", "a cat"),
        picture("test", NAMES[2], "an owl"), picture("train", "1.gif", "a fox"), picture("train", "8.jpg"),
    ]  # fmt: skip
    images_of[1]["sentences"][1]["sentid"] = -1
    files = write(tmp_path, dataset_coco={"images": images_of, "dataset": "coco"})
    done = convert("retrieval", files, images, tmp_path / "out", split=["train", "restval"])
    assert [(one.text, [caption["text"] for caption in one.captions]) for one in done.rows()] == [
        ("a dog", ["a dog"]),
        ("a cat", ["a cat", "a cat"]),
    ]
    assert done.record["other_splits"] == {"test": 1}
    assert done.by_kind["captions"]["failed"] == 3


def test_it_is_resumed_and_repeated(images: Path, tmp_path: Path) -> None:
    files = write(tmp_path, questions={"questions": [question(n, image) for n, image in enumerate((9, 25, 31), 1)]})
    mine = tmp_path / "images"
    mine.mkdir()
    for name in NAMES[:2]:
        (mine / name.rpartition("/")[2]).write_bytes((images / name).read_bytes())
    out = tmp_path / "out"
    first = convert("vqa", files, mine, out, shard_size=1)
    before = {path.name: path.read_bytes() for path in out.glob("0*")}
    (out / "ledger/convert/00001.json").unlink()
    assert convert("vqa", files, mine, out, shard_size=1).record == first.record
    assert {path.name: path.read_bytes() for path in out.glob("0*")} == before
    (mine / "COCO_val2014_000000000031.jpg").write_bytes((images / NAMES[0]).read_bytes())
    assert convert("vqa", files, mine, out, shard_size=1).samples.kept == 2
    assert convert("vqa", files, mine, out, shard_size=1, retry="failed").samples.kept == 3
    after = {path.name: path.read_bytes() for path in out.glob("0*")}
    assert {name: after[name] for name in before if name[:5] != "00002"} == {
        name: data for name, data in before.items() if name[:5] != "00002"
    }
    with pytest.raises(CapfiltError, match="was planned otherwise: shard_size"):
        convert("vqa", files, mine, out, shard_size=2)


def test_what_cannot_be_converted_is_said(images: Path, tmp_path: Path) -> None:
    (questions,) = write(tmp_path, questions={"questions": [question(1, 404)]})
    (lines,) = write(tmp_path, lines_=[statement("dev-1-0-0")])
    (karpathy,) = write(tmp_path, karpathy={"images": []})
    (tmp_path / "empty").mkdir()
    cases: list[tuple[str, list[Path], dict[str, Any], type[CapfiltError], str]] = [
        ("vqa", [tmp_path / "none.json"], {}, ListError, "there is no file"),
        ("vqa", [questions], {"images": tmp_path / "none"}, ListError, "there is no folder .*check --images"),
        ("vqa", [questions], {"images": tmp_path / "empty"}, ListError, "holds no pictures"),
        ("vqa", [questions], {"split": "val"}, UsageError, "each file of vqa is of one split"),
        ("vqa", [lines], {}, DataError, "is no file of VQAv2"),
        ("dialog", [questions], {}, DataError, "is no file of VisDial"),
        ("grounding", [questions], {}, DataError, "there are no phrases"),
        ("captioning", [karpathy], {"split": "val"}, DataError, "there is no row of captioning"),
        ("caption", [questions], {}, RecipeError, "'task' is 'caption'.*Did you mean 'captioning'"),
        ("vqa", [questions], {"retry": "all"}, UsageError, "only failed samples can be retried"),
        ("vqa", [questions], {}, ShortfallError, "0 of 1 samples succeeded; 1 failed by: no picture has its number"),
    ]
    for task, files, more, error, said in cases:
        with pytest.raises(error, match=said):
            convert(task, files, more.pop("images", images), tmp_path / "out", **more)


def test_the_command_line_does_the_same(images: Path, tmp_path: Path, capfilt: Any) -> None:
    (path,) = write(tmp_path, questions={"questions": [question(1), question(2, 25)]})
    options = ("--images", images, "--out", tmp_path / "out", "--address", "local", "--json")
    done = json.loads(capfilt("convert", "vqa", path, *options).out)
    assert done == convert("vqa", [path], images, tmp_path / "out").record
    again = capfilt("convert", "vqa", path, *options[:-1])
    assert f"capfilt finetune vqa-tiny --out {tmp_path}/out-tiny --set data={tmp_path}/out" in again.out
    assert capfilt("status", tmp_path / "out").code == 0
