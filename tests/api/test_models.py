"""Loaded models: what they write and score is what `annotate` does, whatever an image is given as."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import capfilt
from capfilt.data import shards

DECODE = {"decode.max_length": 12, "decode.min_length": 3}


@pytest.fixture(scope="module")
def captioner(finished_run: Path) -> Any:
    return capfilt.load_model(finished_run / "round-1/captioner")


@pytest.fixture(scope="module")
def scorer(finished_run: Path) -> Any:
    return capfilt.load_model(finished_run / "round-1/filter", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def images(finished_run: Path) -> list[bytes]:
    return [sample.image for sample in capfilt.read_shards(finished_run / "data/web")][:9]


@pytest.fixture(scope="module")
def annotated(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The rows of `annotate`, by the sha256 of the image."""
    roles = {"captioner": finished_run / "round-1/captioner", "filter": finished_run / "round-1/filter"}
    out = tmp_path_factory.mktemp("annotated") / "run"
    # Without a json a sample's uid is of its bytes, as that of bytes that are given to a model.
    plain = [
        capfilt.Sample(s.key, s.image, s.extension, s.text) for s in capfilt.read_shards(finished_run / "data/web")
    ][:9]
    shards.write(out.parent / "plain/00000.tar", plain)
    rows_by_image: dict[str, list[Any]] = {}
    done = capfilt.annotate(out.parent / "plain", **roles, out=out, captions=2, settings=DECODE, seed=5)
    for row in done.rows():
        rows_by_image.setdefault(row.sha256, []).append(row)
    return rows_by_image


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_texts_are_those_of_annotate(captioner: Any, images: list[bytes], annotated: dict[str, Any]) -> None:
    wanted = [[r.text for r in annotated[sha256(image)] if r.source == "synthetic"] for image in images]
    assert captioner.caption_many(images, 2, seed=5, settings=DECODE) == wanted
    assert captioner.caption(images, seed=5, settings=DECODE) == [texts[0] for texts in wanted]


def test_the_scores_are_those_of_annotate(scorer: Any, images: list[bytes], annotated: dict[str, Any]) -> None:
    rows = [annotated[sha256(image)] for image in images]
    every_score = scorer.score_many(images, [[row.text for row in each] for each in rows])
    for scores, each in zip(every_score, rows, strict=True):
        assert [(s.itm, s.itc) for s in scores] == [
            pytest.approx((row.itm, row.itc), abs=1e-5) if row.itm is not None else (None, None) for row in each
        ]
    single = scorer.score(images, [each[-1].text for each in rows])
    assert [s.itm for s in single] == pytest.approx([each[-1].itm for each in rows], abs=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_the_batch_does_not_matter(size: int, captioner: Any, images: list[bytes]) -> None:
    whole = captioner.caption(images, settings=DECODE)
    assert captioner.caption(images, settings={**DECODE, "batch_size": size}) == whole
    assert captioner.caption(images[3:5], settings=DECODE) == whole[3:5]


def test_seeds_and_methods(captioner: Any, images: list[bytes]) -> None:
    assert captioner.caption(images, seed=1, settings=DECODE) != captioner.caption(images, seed=2, settings=DECODE)
    greedy = {**DECODE, "decode.method": "greedy"}
    assert captioner.caption(images, seed=1, settings=greedy) == captioner.caption(images, seed=2, settings=greedy)


def test_beams_with_their_scores(captioner: Any, images: list[bytes]) -> None:
    beams = {**DECODE, "decode.beams": 4, "decode.prompt": "a picture of ", "decode.max_length": 16}
    scored = captioner.caption_scored(images, 3, settings=beams)
    plain = captioner.caption_many(images, 3, settings={**beams, "decode.method": "beam"})
    assert [[each.text for each in of_image] for of_image in scored] == plain
    for of_image in scored:
        scores = [each.score for each in of_image]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == 3
    original = captioner.caption_scored(images, settings={**beams, "decode.accounting": "original"})
    assert [of_image[0].score for of_image in original] != [of_image[0].score for of_image in scored]


def test_an_image_may_be_bytes_a_path_or_a_pil_image(captioner: Any, images: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(images[0])
    opened = Image.open(io.BytesIO(images[0]))
    greedy = {**DECODE, "decode.method": "greedy"}
    forms = [images[0], tmp_path / "a.png", str(tmp_path / "a.png"), opened, opened.convert("RGBA"), opened.copy()]
    assert len(set(captioner.caption(forms, settings=greedy))) == 1
    sampled = captioner.caption([opened, opened.copy(), images[0], tmp_path / "a.png"], settings=DECODE)
    assert sampled[0] == sampled[1]
    assert sampled[2] == sampled[3]


def test_a_pil_image_is_turned_upright_and_made_rgb(scorer: Any) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    upright = Image.fromarray(noise)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    turned = Image.open(io.BytesIO(file.getvalue()))
    one, other = scorer.score([upright, turned], ["a red circle"] * 2)
    assert one.itc == pytest.approx(other.itc, abs=1e-6)


def test_a_text_without_words_has_no_scores(scorer: Any, images: list[bytes]) -> None:
    assert scorer.score_many(images[:2], [["...", "a red circle"], []])[0][0] == capfilt.Scores(None, None)
    assert scorer.score_many(images[:2], [["..."], []])[1] == []
    assert scorer.score([], []) == []


def test_a_model_of_both_roles(finished_run: Path, images: list[bytes]) -> None:
    model = capfilt.load_model(finished_run / "round-1/pretrain", device="cpu")
    assert model.capabilities >= {"fuse", "decode"}
    assert (model.family, model.precision, str(model.device)) == ("blip", "fp32", "cpu")
    assert "blip from" in repr(model)
    (text,) = model.caption(images[:1], settings=DECODE)
    assert isinstance(model.score(images[:1], [text])[0], capfilt.Scores)


def test_a_blip2(small_blip2: Any, images: list[bytes], tmp_path: Path) -> None:
    from capfilt.data.text.tokenizer import Tokenizer
    from capfilt.models.checkpoints import store

    store.save(small_blip2(), tmp_path)
    Tokenizer.load("world").save(tmp_path)
    model = capfilt.load_model(tmp_path, device="cpu")
    assert len(model.caption(images[:2], settings=DECODE)) == 2
    assert all(-1 <= scores.itc <= 1 for scores in model.score(images[:2], ["a red circle", "blue"]))


class TestErrors:
    def test_a_model_that_cannot(self, captioner: Any, scorer: Any, images: list[bytes]) -> None:
        with pytest.raises(capfilt.RecipeError, match="cannot be the captioner: it cannot decode"):
            scorer.caption(images[:1])
        with pytest.raises(capfilt.RecipeError, match="cannot be the filter: it cannot encode_text"):
            captioner.score(images[:1], ["a"])

    def test_an_image_that_cannot_be_read(self, captioner: Any, images: list[bytes], tmp_path: Path) -> None:
        with pytest.raises(capfilt.ImageError, match="image 1: not an image"):
            captioner.caption([images[0], b"GIF of nothing"])
        with pytest.raises(capfilt.DataError, match=r"image 0 \(.*nowhere.png\) cannot be read"):
            captioner.caption([tmp_path / "nowhere.png"])

    def test_arguments_that_cannot_be_meant(self, captioner: Any, scorer: Any, images: list[bytes]) -> None:
        with pytest.raises(capfilt.UsageError, match="images is one image; give a list"):
            captioner.caption(images[0])
        with pytest.raises(capfilt.UsageError, match="2 images and 1 lists of texts"):
            scorer.score_many(images[:2], [["a"]])
        with pytest.raises(capfilt.UsageError, match="a list with one text for each image"):
            scorer.score(images[:1], "a")
        with pytest.raises(capfilt.UsageError, match="precision is chosen when the model is loaded"):
            captioner.caption(images[:1], settings={"precision": "bf16"})
        with pytest.raises(capfilt.RecipeError, match="captions 4 of 3 beams"):
            captioner.caption_many(images[:1], 4, settings={"decode.method": "beam"})
        with pytest.raises(capfilt.UsageError, match=r"decode\.method is greedy; scores are of beam search"):
            captioner.caption_scored(images[:1], settings={"decode.method": "greedy"})

    def test_a_device_that_is_not_there(self, finished_run: Path) -> None:
        with pytest.raises(capfilt.UsageError, match="device 'meta': allowed are cpu, cuda and cuda:N"):
            capfilt.load_model(finished_run / "round-1/filter", device="meta")

    def test_what_is_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(capfilt.ModelError, match="is no model"):
            capfilt.load_model(tmp_path)
