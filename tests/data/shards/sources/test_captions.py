"""A JSON of captions and a folder of pictures: COCO's, Karpathy's, and the lists that BLIP trains on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capfilt.data import shards
from capfilt.data.sample import FailedSample, Sample
from capfilt.data.shards.sources import captions
from capfilt.errors import DataError, ListError, NoShardError, RunError
from capfilt.stages.inputs import check_reachable

GONE = "no picture has its number"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], str]:
    """Writes a JSON beside a folder of four pictures; gives its path."""
    for number in range(4):
        path = tmp_path / f"coco/val2014/COCO_val2014_{number:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"\xff\xd8 {number}".encode("latin-1"))

    def write(value: Any) -> str:
        (tmp_path / "captions.json").write_text(json.dumps(value))
        return str(tmp_path / "captions.json")

    return write


def read(spec: str) -> dict[str, Any]:
    items = [item for url in shards.expand(spec) for item in shards.read(url)]
    return {
        item.key.rpartition("_")[2]: [tuple(caption.values()) for caption in item.captions]
        if isinstance(item, Sample)
        else item.reason
        for item in items
    }


def name(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


def test_coco_s_captions_are_human_ones_of_its_pictures(write: Callable[[Any], str]) -> None:
    images = [{"id": number, "file_name": name(number)} for number in (2, 0, 9)]
    said = [(0, "zero"), (2, "two"), (0, "null"), (7, "of none"), (2, 5)]
    notes = [{"image_id": id_, "id": at, "caption": text} for at, (id_, text) in enumerate(said)]
    path = write({"info": {"year": 2014}, "annotations": notes, "images": images, "licenses": ["x"]})
    found = read(path)
    assert found["000000000000"] == [("zero", "human"), ("null", "human")]
    assert found["000000000002"] == [("two", "human")]
    assert sorted(reason for reason in found.values() if isinstance(reason, str)) == [
        "no picture has its name", "the file names no picture for it",
    ]  # fmt: skip
    (url,) = shards.expand(path)
    assert shards.name(url) == "captions-000000"
    before = shards.stat(url), shards.read_input(url)
    assert before[1].bytes == before[0]["size"]
    write({"images": images, "annotations": [*notes[1:], {"image_id": 0, "caption": "ZERO"}]})
    assert shards.stat(url)["version"] != before[0]["version"]
    assert shards.read_input(url).sha256 != before[1].sha256


def test_karpathy_s_splits_are_chosen(write: Callable[[Any], str], tmp_path: Path) -> None:
    images = [
        {
            "filepath": "val2014", "filename": name(number), "split": split,
            "sentences": [{"raw": f"one {number}"}, {"raw": f"two {number}"}, "no sentence"],
        }
        for number, split in enumerate(("train", "restval", "test", "train"))
    ]  # fmt: skip
    path = write({"dataset": "coco", "images": images})
    with pytest.raises(NoShardError, match=r"several splits: restval \(1\), test \(1\), train \(2\). Choose, as in"):
        shards.expand(path)
    assert read(f"{path}#split=train,restval&images={tmp_path / 'coco'}") == {
        f"{number:012d}": [(f"one {number}", "human"), (f"two {number}", "human")] for number in (0, 1, 3)
    }
    with pytest.raises(NoShardError, match=r"holds no captions"):
        shards.expand(f"{path}#split=val")


def test_a_list_as_blip_trains_on_has_web_texts_unless_it_is_said(write: Callable[[Any], str]) -> None:
    entries = [{"image": name(1), "caption": "one"}, {"image": f"val2014/{name(2)}", "caption": ["two", "deux"]}]
    path = write([*entries, {"image": name(1), "caption": "uno"}, 5, {"image": "../../etc/passwd.jpg", "caption": "x"}])
    assert read(path) == {
        "000000000001": [("one", "web"), ("uno", "web")],
        "000000000002": [("two", "web"), ("deux", "web")],
        "captions-2": "the file names no picture for it",
        "../../etc/passwd.jpg": "no picture has its name",
    }
    assert read(f"{path}#source=human")["000000000001"] == [("one", "human"), ("uno", "human")]
    with pytest.raises(NoShardError, match=r"texts come from web, synthetic, human"):
        shards.expand(f"{path}#source=humans")


def test_what_is_no_such_file_is_one_line(
    write: Callable[[Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoShardError, match=r"holds no captions: COCO's have images and annotations"):
        shards.expand(write({"00000.tar": 5}))
    path = write([{"image": name(0), "caption": "x"}])
    with pytest.raises(ListError, match=r"holds no pictures"):
        shards.expand(f"{path}#images={tmp_path / 'none'}")
    Path(path).write_text('[{"image": ')
    with pytest.raises(DataError, match=r"is no JSON"):
        shards.expand(path)
    monkeypatch.setattr(captions, "MAX_TEXTS", 2)
    with pytest.raises(NoShardError, match=r"a file with more than 2 texts; split it"):
        shards.expand(write([{"image": name(0), "caption": ["x"] * 3}]))


def test_a_plan_of_others_leads_to_no_other_store_by_its_pictures(tmp_path: Path) -> None:
    for spec in ("/data/a.json#images=s3://theirs/x&captions=0-9", "/data/a.json#images=s3://theirs/x"):
        with pytest.raises(RunError, match=r"names s3://theirs/x, which is elsewhere"):
            check_reachable(tmp_path, [spec], fetch=False)
    check_reachable(tmp_path, ["/data/a.json#images=/x&captions=0-9"], fetch=False)


def test_failed_keys_can_be_written(write: Callable[[Any], str]) -> None:
    path = write([{"image": "\ud800" * 2000 + ".jpg", "caption": "x"}, {"image": name(0), "caption": "\ud800"}])
    items = [item for url in shards.expand(path) for item in shards.read(url)]
    assert all(isinstance(item, FailedSample) and item.key.encode() for item in items)
    assert [len(item.key) for item in items] == [1024, 38]
