"""Figures, answers, vectors and heatmaps of a GPU beside those of a CPU, in fp32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from row_shards import write_shard

from capfilt.data import shards
from capfilt.data.text.language_tokenizer import tokenizer_of
from capfilt.evaluation.config import EvaluateConfig
from capfilt.evaluation.evaluate import examine
from capfilt.evaluation.tasks import TASKS
from capfilt.inference.batches import Images
from capfilt.inference.device import Compute, autocast
from capfilt.inference.embedder import ModelEmbedder
from capfilt.inference.heatmap import heatmaps
from capfilt.inference.local_model import LocalModel
from capfilt.models import architecture_of, build, preprocess_of
from capfilt.models.checkpoints import store
from capfilt.models.heads.config import ClassifierConfig

ENTAILMENT = ("entailment", "neutral", "contradiction")


def classifier(base: str, *labels: str, images: int = 1) -> ClassifierConfig:
    return ClassifierConfig.model_validate({"base": base, "labels": labels, "images": images})


CASES: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "classification": ("clip/tiny", "classification", "classes", {"classes": ("ring", "circle"), "templates": ("{}",)}),
    "grounding by boxes": ("xvlm/tiny", "grounding", "regions", {}),
    "grounding by heat": ("albef/tiny", "grounding", "regions", {}),
    "dialog by match": ("albef/tiny", "dialog", "dialogs", {}),
    "dialog by likelihood": ("blip/tiny", "dialog", "dialogs", {"by": "likelihood"}),
    "vqa, a list": ("answers", "vqa", "rows", {}),
    "vqa, written": ("answers", "vqa", "rows", {"write": True}),
    "vqa, classes": (classifier("vlmo/tiny", "red", "a ring", "two"), "vqa", "rows", {}),
    "nlvr2": (classifier("blip/tiny", "false", "true", images=2), "nlvr2", "rows", {}),
    "entailment": (classifier("vilt/tiny", *ENTAILMENT), "entailment", "rows", {}),
}


def local(architecture: Any) -> LocalModel:
    """A model of random weights, wide enough that its answers differ."""
    torch.manual_seed(1)
    if architecture == "answers":
        architecture = architecture_of("blip/tiny-answers").with_answers(("red", "a ring", "gray", "two"))  # type: ignore[attr-defined]
    elif isinstance(architecture, str):
        architecture = architecture_of(architecture)
    model = build(architecture).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    return LocalModel(model, tokenizer_of("world", architecture.tokenizer_kind), preprocess_of(architecture))


@pytest.fixture(scope="module")
def data(
    small_world: Path, task_shards: Path, dialog_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[str]]:
    """The shards of each kind, one of each."""
    folder = tmp_path_factory.mktemp("shards")
    regions = [{"id": 0, "text": "a red circle", "box": [1, 2, 30, 20]}, {"id": 1, "text": "blue", "box": [5, 6, 9, 9]}]
    return {
        "world": [str(small_world / "human" / "00000.tar")],
        "rows": shards.expand(str(task_shards))[:1],
        "dialogs": shards.expand(str(dialog_shards))[:1],
        "regions": [
            write_shard(folder / "regions.tar", {"json": {"regions": regions}}, {"json": {"regions": regions}})
        ],
        "classes": [write_shard(folder / "classes.tar", {"cls": b"0"}, {"cls": b"1"})],
    }


@pytest.mark.parametrize("name", CASES)
def test_figures_are_those_of_a_cpu(name: str, data: dict[str, list[str]], cuda: torch.device) -> None:
    architecture, task, rows, settings = CASES[name]
    config = TASKS[task](task=task, batch_size=4, **settings)
    model = local(architecture)
    wanted = config.measure(model, data[rows], torch.device("cpu")).figures
    model.model.to(cuda)
    assert flat(config.measure(model, data[rows], cuda).figures) == pytest.approx(flat(wanted), abs=1e-4)
    with autocast(cuda, torch.bfloat16):
        found = flat(config.measure(model, data[rows], cuda).figures)
    assert found.keys() == flat(wanted).keys(), "in bf16 all is measured too"


def test_retrieval_and_captions_are_those_of_a_cpu(data: dict[str, list[str]], cuda: torch.device) -> None:
    model, config = local("blip/tiny"), EvaluateConfig(rerank=4, batch_size=4)
    wanted = examine(model, data["world"], config, torch.device("cpu"))
    model.model.to(cuda)
    assert flat(examine(model, data["world"], config, cuda)) == pytest.approx(flat(wanted), abs=1e-4)


def flat(figures: Any, name: str = "") -> dict[str, Any]:
    """Figures in sections, by the names of both."""
    if not isinstance(figures, dict):
        return {name: figures}
    return {key: value for part, inner in figures.items() for key, value in flat(inner, f"{name}.{part}").items()}


def test_vectors_and_heatmaps_are_those_of_a_cpu(cuda: torch.device, tmp_path: Path) -> None:
    model = local("albef/tiny")
    store.save(model.model, tmp_path)
    size = model.image_format.size
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))

    def vectors(compute: Compute) -> np.ndarray:
        embedder = ModelEmbedder(tmp_path, compute)
        return embedder.vectors(Images({embedder.image_format: pixels.to(compute.open())}))

    on_cpu, on_gpu = (vectors(Compute(device=device, precision="fp32")) for device in ("cpu", "cuda"))
    np.testing.assert_allclose(on_gpu, on_cpu, atol=1e-5)
    texts = ["a red circle", "two blue squares on a gray background"]
    wanted = heatmaps(model, pixels[:1], texts)
    assert wanted.max() == 1, "there is a map to be compared"
    moved = copy.deepcopy(model)
    moved.model.to(cuda)
    np.testing.assert_allclose(heatmaps(moved, pixels[:1].to(cuda), texts), wanted, atol=1e-3)
