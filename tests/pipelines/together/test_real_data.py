"""The recipes for real data, shrunk: pictures of any size and everyday English, to the end of a round."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capfilt.data import shards
from capfilt.data.sample import Sample

WHO = ("a man", "two children", "an old woman", "the dog", "a group of people")
WHAT = ("rides a bicycle", "waits for the bus", "stands in the rain", "holds a red umbrella")
WHERE = ("in front of a shop", "on the beach", "next to a train", "in a crowded street")
CAPTIONS = [f"{who} {what} {where}" for who in WHO for what in WHAT for where in WHERE]


def photograph(rng: np.random.Generator) -> bytes:
    """A JPEG that is no square and not of one colour."""
    width, height = (int(side) for side in rng.integers(40, 90, 2))
    data = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of web pairs and of pictures with two human captions, and a vocabulary in BERT's form."""
    home, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    for split, count in (("web", 16), ("human", 12), ("val", 6), ("test", 6)):
        (home / split).mkdir()
        samples = []
        for n in range(count):
            texts = [CAPTIONS[i] for i in rng.integers(0, len(CAPTIONS), 2)]
            captions = [{"text": text, "source": "human"} for text in texts]
            meta: dict[str, Any] = {} if split == "web" else {"captions": captions}
            samples.append(Sample(f"{n:09d}", photograph(rng), "jpg", texts[0], meta))
        shards.write(home / split / "00000.tar", samples)
    words = sorted({word for caption in CAPTIONS for word in f"{caption} picture of".split()})
    (home / "vocab.txt").write_text(
        "".join(f"{word}\n" for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words))
    )
    return home


SIZES = ("pretrain.image_size=32", "captioner.image_size=48", "filter.image_size=48")
SMALL = {
    "blip": (*SIZES, "model=blip/tiny", "filter.recompute=2", "cluster={}"),
    "blip-cpu": (
        "model.vision.depth=1",
        "model.text.depth=1",
        "cluster.train.workers=1",
        "cluster.finetune.workers=1",
        *SIZES,
    ),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.slow
def test_a_round_by_the_recipe(name: str, data: Path, tmp_path: Path, capfilt: Any) -> None:
    entries = len((data / "vocab.txt").read_text().split()) + 2
    sets = [
        *(f"data.{split}={data / split}" for split in ("web", "human", "val", "test")),
        *SMALL[name],
        f"tokenizer={data / 'vocab.txt'}",
        f"model.text.vocab_size={entries}",
        "initial={}",
        *(
            f"{role}.{key}"
            for role in ("pretrain", "captioner", "filter")
            for key in ("steps=2", "loader.batch_size=4")
        ),
        "pretrain.objectives.queue=8",
        "filter.objectives.queue=8",
        "select={threshold: keep-rate, keep_rate: 0.5}",
        "evaluate.rerank=3",
    ]
    words = [word for each in sets for word in ("--set", each)]
    assert capfilt("show", f"bootstrap/{name}", *words).err == ""
    done = capfilt("bootstrap", name, *words, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"]
    assert result[1]["samples_in"] == 16 == sum(result[1]["samples"].values())
    assert sum(result[1]["kept"].values()) == 16, "half of the web and the synthetic texts"
    assert all(entry["retrieval"] and entry["captioning"] for entry in result)
