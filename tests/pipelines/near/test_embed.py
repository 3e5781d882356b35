"""`capfilt embed`: hashes and vectors of pictures, by each sort of model."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tars import tar_of

from capfilt.data import embeddings, shards
from capfilt.data.embeddings import Vectors
from capfilt.data.images.decode import decode
from capfilt.data.images.perceptual_hash import perceptual_hash
from capfilt.data.images.preprocess import ImageFormat
from capfilt.data.sample import Sample
from capfilt.models.checkpoints import store
from capfilt.models.registry import architecture_of, build, preprocess_of


@pytest.fixture
def pictures(small_world: Path) -> Path:
    return sorted(small_world.rglob("*.tar"))[0]


def read(out: Path, name: str = "00000") -> Any:
    return embeddings.read(out / f"embeddings/{name}.parquet")


def test_hashes_alone_are_a_row_a_picture_in_the_order_of_the_shard(
    pictures: Path, tmp_path: Path, capfilt: Any
) -> None:
    broken = ("a.jpg", b"no picture"), ("a.txt", b"a dog")
    (tmp_path / "00000.tar").write_bytes(tar_of(*broken, has_end=False) + pictures.read_bytes())
    done = capfilt("embed", tmp_path / "00000.tar", "--out", tmp_path / "e", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["samples"] == {"in": 17, "kept": 16, "dropped": 0, "failed": 1}
    assert answer["failed"] == {"not an image": 1}
    samples = [one for one in shards.read(str(pictures)) if isinstance(one, Sample)]
    decoded = [decode(one.image) for one in samples]
    assert read(tmp_path / "e").to_pylist() == [
        {
            "key": one.key,
            "uid": one.uid,
            "sha256": one.sha256,
            "phash": perceptual_hash(picture),
            "width": picture.width,
            "height": picture.height,
        }
        for one, picture in zip(samples, decoded, strict=True)
    ]
    before = (tmp_path / "e/ledger/embed/00000.json").stat().st_mtime_ns
    assert capfilt("embed", tmp_path / "00000.tar", "--out", tmp_path / "e", "--set", "batch_size=3").code == 0
    assert (tmp_path / "e/ledger/embed/00000.json").stat().st_mtime_ns == before, "what is done stays done"


@pytest.mark.parametrize(("family", "kind"), [("blip", "itc"), ("clip", "clip"), ("blip2", "itc")])
def test_vectors_of_a_model_are_those_that_its_cosines_come_from(
    family: str, kind: str, pictures: Path, tmp_path: Path, capfilt: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"small_{family}")()
    store.save(model, tmp_path / "model")
    words = ("embed", pictures, "--model", tmp_path / "model", "--out", tmp_path / "e", "--set", "batch_size=5")
    done = capfilt(*words, "--json")
    assert done.code == 0, done.err
    assert embeddings.vectors_of(tmp_path / "e/embeddings/00000.parquet") == Vectors(
        kind, store.fingerprint(tmp_path / "model"), 8
    )
    form = ImageFormat(model.config.image_size, preprocess_of(model.config))
    pixels = [form.to_pixels(decode(one.image)) for one in shards.read(str(pictures)) if isinstance(one, Sample)]
    with torch.inference_mode():
        tokens = model.encode_image(form.preprocess.normalise(form.preprocess.stack(pixels)))
        wanted = model.project_image(tokens)
    if family == "blip2":  # one vector a query: the direction that they share
        wanted = wanted.mean(dim=1) / wanted.mean(dim=1).norm(dim=1, keepdim=True)
    assert np.abs(embeddings.matrix(read(tmp_path / "e")) - wanted.numpy()).max() < 1e-3


class Descriptor(torch.nn.Module):
    """As SSCD's: a picture's mean colours, by 4 x 4 fields, longer than 1."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.shape[-1] >= 8, "too small"
        return 7 * torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)


def scripted(module: torch.nn.Module, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the files that there are were made so
        torch.jit.script(module).save(str(path))


@pytest.fixture
def descriptor(tmp_path: Path) -> Path:
    scripted(Descriptor(), tmp_path / "toy.torchscript.pt")
    return tmp_path / "toy.torchscript.pt"


def test_a_torchscript_descriptor_reads_pictures_as_imagenet_models_do(
    descriptor: Path, pictures: Path, tmp_path: Path, capfilt: Any
) -> None:
    words = ("embed", pictures, "--model", f"copy={descriptor}", "--set", "size=32")
    assert capfilt(*words, "--out", tmp_path / "e").code == 0
    assert embeddings.vectors_of(tmp_path / "e/embeddings/00000.parquet").kind == "copy"
    first = next(iter(shards.read(str(pictures))))
    resized = decode(first.image).resize((32, 32), Image.Resampling.BILINEAR)
    normal = (np.asarray(resized, np.float32) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    fields = normal.reshape(4, 8, 4, 8, 3).mean(axis=(1, 3)).transpose(2, 0, 1).ravel()
    assert np.abs(embeddings.matrix(read(tmp_path / "e"))[0] - fields / np.linalg.norm(fields)).max() < 2e-3
    assert capfilt(*words, "--set", "size=64", "--out", tmp_path / "e").code == 1, "other vectors are another plan"


def test_what_cannot_embed_is_one_line(descriptor: Path, pictures: Path, tmp_path: Path, capfilt: Any) -> None:
    scripted(torch.nn.Identity(), tmp_path / "identity.pt")
    (tmp_path / "text.pt").write_text("no archive")
    for i, (model, message) in enumerate(
        {
            str(descriptor): f"if you trust whoever made it, say --model copy={descriptor}",
            f"copy={tmp_path}/none.pt": "there is no file",
            f"copy={tmp_path}/text.pt": "cannot be loaded as TorchScript",
            f"copy={tmp_path}/identity.pt": "a descriptor makes one vector each",
            f"copy={descriptor} --set size=4": "fails on pictures of 4 px; set size=PIXELS",
        }.items()
    ):
        done = capfilt("embed", pictures, "--model", *model.split(), "--out", tmp_path / f"e{i}")
        assert done.code in (1, 2), done.out
        assert message in done.line


def test_a_model_without_vectors_of_pictures_is_refused(pictures: Path, tmp_path: Path, capfilt: Any) -> None:
    store.save(build(architecture_of("vilt/tiny")), tmp_path / "vilt")
    done = capfilt("embed", pictures, "--model", tmp_path / "vilt", "--out", tmp_path / "e")
    assert done.code == 2
    assert "it cannot encode_text" in done.line


def test_pictures_of_one_shard_are_embedded_whatever_shards_lie_beside_it(tmp_path: Path, capfilt: Any) -> None:
    """An empty shard has a table without rows, of the same columns."""
    image = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(image, "PNG")
    (tmp_path / "a.tar").write_bytes(tar_of(("x.png", image.getvalue()), ("x.txt", b"red")))
    (tmp_path / "b.tar").write_bytes(tar_of())
    assert capfilt("embed", tmp_path / "a.tar", tmp_path / "b.tar", "--out", tmp_path / "e").code == 0
    assert [read(tmp_path / "e", name).num_rows for name in "ab"] == [1, 0]
    assert embeddings.check_same_model(embeddings.tables(tmp_path / "e").values()) is None
