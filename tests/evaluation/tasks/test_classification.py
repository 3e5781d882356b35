"""Zero-shot classification beside transformers, and over shards whose classes have faults."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from row_shards import picture, write_shard

from capfilt.data.tasks import ClassList
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.errors import DataError
from capfilt.evaluation.tasks import classification
from capfilt.evaluation.tasks.config import ClassificationEvalConfig
from capfilt.inference.filters.dual_encoder import DualEncoderFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import architecture_of, build
from capfilt.models.checkpoints import store
from capfilt.pipelines import export

CPU = torch.device("cpu")
CLASSES = ("red circle", "blue square", "green cross")
TEMPLATES = ("a photo of a {}.", "two {}", "{}")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP whose random weights are wide enough that its answers differ."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    torch.manual_seed(0)
    model = build(architecture_of("clip/tiny")).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    store.save(model, folder)
    tokenizer_of("world", model.config.tokenizer_kind).save(folder)
    return folder


@pytest.fixture(scope="module")
def local(clip: Path) -> LocalModel:
    return LocalModel.load(clip, CPU)


def measure(local: LocalModel, *urls: str, **settings: Any) -> dict[str, Any]:
    config = ClassificationEvalConfig(**{"classes": CLASSES, "templates": TEMPLATES, "batch_size": 2, **settings})
    return dict(classification.measure(local, urls, config.with_data(urls), CPU).figures)


def test_it_is_what_transformers_makes_of_the_same_model(clip: Path, local: LocalModel, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    export.run(str(clip), "hf", tmp_path / "hf")
    theirs = CLIPModel.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    images = CLIPImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = images([Image.open(io.BytesIO(picture(n))) for n in range(4)], return_tensors="pt")["pixel_values"]
    prompts = tokenizer([TEMPLATES[0].replace("{}", name) for name in CLASSES], padding=True, return_tensors="pt")
    filter_ = DualEncoderFilter(local, 77)
    with torch.inference_mode():
        wanted = theirs(**prompts, pixel_values=pixels).logits_per_image.softmax(dim=1)
        image = filter_.image_features(filter_.model.encode_image(pixels))
        vectors = classification.class_vectors(filter_, ClassList(CLASSES, TEMPLATES[:1]))
        logits = torch.from_numpy(filter_.similarities(image, vectors)) * filter_.model.logit_scale.exp()  # type: ignore[operator]
    assert np.ptp(wanted.numpy(), axis=1).min() > 1e-3
    torch.testing.assert_close(logits.softmax(dim=1), wanted, atol=1e-5, rtol=0)


def test_a_class_is_the_mean_of_unit_vectors_of_its_prompts(local: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    filter_ = DualEncoderFilter(local, 77)
    one_by_one = [[filter_.text_features([t.replace("{}", name)])[0] for t in TEMPLATES] for name in CLASSES]
    mean = np.array(one_by_one).mean(axis=1)
    wanted = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.linalg.norm(mean, axis=1).max() < 0.999, "the prompts of a class differ, or this test shows nothing"
    np.testing.assert_allclose(classification.class_vectors(filter_, ClassList(CLASSES, TEMPLATES)), wanted, atol=1e-5)
    monkeypatch.setattr(classification, "MAX_TEXTS", 4)  # one class at a time
    np.testing.assert_allclose(classification.class_vectors(filter_, ClassList(CLASSES, TEMPLATES)), wanted, atol=1e-5)


def test_every_picture_is_scored_or_left_out_with_a_reason(local: LocalModel, tmp_path: Path) -> None:
    right = write_shard(
        tmp_path / "00000.tar",
        {"json": {"class": "red circle"}},
        {"cls": b"1"},
        {"json": {"class": "Red Circle"}},
        {"cls": b"3"},
        {"json": {"class": "green cross"}, "png": b"no picture"},
        {"json": {"class": "green cross"}},
        {"json": {}},
    )
    measured = measure(local, right)
    figures = measured["classification"]
    assert (figures["examples"], figures["classes"], figures["templates"]) == (3, 3, 3)
    assert [figures["guessing"], figures["majority"]] == pytest.approx([100 / 3, 100 / 3])
    assert "top5" not in figures
    assert measured["rows"] == 7
    assert measured["left_out"] == {
        "class ... is none of the ... classes": 1,
        "cls is ...": 1,
        "picture: not an image": 1,
        "no class": 1,
    }
    with pytest.raises(DataError, match=r"nothing can be evaluated on .*: none of 1 rows .* mostly: no class"):
        measure(local, write_shard(tmp_path / "00001.tar", {"json": {"captions": []}}))


def test_classes_come_from_beside_the_shards_unless_given(local: LocalModel, tmp_path: Path) -> None:
    url = write_shard(tmp_path / "00000.tar", {"json": {"class": "cat"}}, {"json": {"class": "dog"}})
    with pytest.raises(DataError, match=r"there is no classes.txt or classnames.txt"):
        measure(local, url, classes=())
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "templates.txt").write_text("a {}\n")
    config = ClassificationEvalConfig().with_data([url])
    assert (config.classes, config.templates) == (("cat", "dog"), ("a {}",))
    assert ClassificationEvalConfig(templates=TEMPLATES).with_data([url]).templates == TEMPLATES
    (tmp_path / "other").mkdir()
    (tmp_path / "other/classes.txt").write_text("dog\ncat\n")
    with pytest.raises(DataError, match="2 different lists of classes"):
        ClassificationEvalConfig().with_data([url, str(tmp_path / "other/00000.tar")])
    assert measure(local, url, classes=("dog", "cat"))["classification"]["examples"] == 2
