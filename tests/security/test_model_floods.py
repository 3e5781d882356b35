"""Descriptions of models that would cost the machine: refused in one line, before anything of them is built."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.errors import CapfiltError, ModelError, RecipeError
from capfilt.models import Blip, BlipConfig, build, read_architecture
from capfilt.models.blip2.config import LanguageConfig
from capfilt.models.checkpoints import files, store, transformers_folder
from capfilt.models.layers.config import VisionConfig
from capfilt.models.layers.limits import MAX_WEIGHTS

MakeBlip = Callable[..., Blip]
HUGE = [10**9, 10**12, 10**300, -1, 0]
SECONDS, MEGABYTES = 10, 500
"""A second of work and little memory, and room for what is imported on the way."""


@pytest.fixture(autouse=True)
def cheap() -> Iterator[None]:
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begun < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


def one_line(answer: pytest.ExceptionInfo[CapfiltError]) -> None:
    assert "\n" not in str(answer.value)
    assert len(str(answer.value)) < 1000


@pytest.mark.parametrize("number", HUGE, ids=str)
@pytest.mark.parametrize(
    "key",
    ["vision.depth", "vision.width", "vision.image_size", "vision.patch_size", "vision.heads", "vision.hidden",
     "text.depth", "text.width", "text.vocab_size", "text.max_positions", "text.heads", "text.hidden", "projection"],
)  # fmt: skip
def test_a_yaml(key: str, number: int, tmp_path: Path) -> None:
    sizes = {"width": 16, "depth": 1, "heads": 2, "hidden": 16}
    tree: dict[str, Any] = {
        "vision": {**sizes, "image_size": 16, "patch_size": 8},
        "text": {**sizes, "vocab_size": 30, "max_positions": 16},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    assert read_architecture(tmp_path / "a.yaml").vision.depth == 1
    section, _, name = key.rpartition(".")
    (tree[section] if section else tree)[name] = number
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(RecipeError, match=name) as answer:
        read_architecture(tmp_path / "a.yaml")
    one_line(answer)


def test_a_picture_of_too_many_patches() -> None:
    with pytest.raises(ValueError, match="would be 16777217 tokens in patches of 1"):
        VisionConfig(width=16, depth=1, heads=2, hidden=16, image_size=4096, patch_size=1)


def test_a_model_of_more_weights_than_this_machine_has_memory_for() -> None:
    sizes = {"width": 2**16, "heads": 2, "hidden": 2**18}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    with pytest.raises(ValueError, match="vision would have"):
        BlipConfig.model_validate({"vision": {**vision, "depth": 256}, "text": {**sizes, "depth": 1, "vocab_size": 30}})
    config = BlipConfig.model_validate(
        {"vision": {**vision, "depth": 1}, "text": {**sizes, "depth": 1, "vocab_size": 30}}
    )
    assert config.vision.weights < MAX_WEIGHTS
    with pytest.raises(ModelError, match=r"this machine has .* GB of memory; take a smaller one") as answer:
        build(config)
    one_line(answer)


@pytest.fixture
def folder(small_blip: MakeBlip, tmp_path: Path) -> Path:
    store.save_hf(small_blip(roles=("decoder",)), tmp_path, {"pad": 0, "sep": 3})
    return tmp_path


def edited(folder: Path, section: str, **keys: Any) -> Path:
    tree = json.loads((folder / transformers_folder.CONFIG).read_text())
    (tree[section] if section else tree).update(keys)
    (folder / transformers_folder.CONFIG).write_text(json.dumps(tree))
    return folder


SECTIONS = ("vision_config", "text_config")
SAYS = [
    *(("vision_config", key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "image_size")),
    *(("vision_config", key) for key in ("num_attention_heads", "patch_size", "layer_norm_eps")),
    *(("text_config", key) for key in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")),
    *(("", key) for key in ("image_text_hidden_size", "architectures", *SECTIONS)),
]
NO_NUMBERS = ["x", [1], None, 1e400, float("nan")]


@pytest.mark.parametrize(
    ("section", "key", "number"),
    # A section that is null is one of defaults.
    [(*said, n) for said in SAYS for n in (*HUGE, *NO_NUMBERS) if n is not None or said[1] not in SECTIONS],
)
def test_a_config_json(folder: Path, section: str, key: str, number: object) -> None:
    edited(folder, section, **{key: number})
    with pytest.raises(ModelError) as answer:
        store.load(folder)
    one_line(answer)


@pytest.mark.parametrize(("key", "number"), [("logit_scale_init_value", -1e5), ("logit_scale_init_value", "x")])
def test_a_temperature_that_is_none(folder: Path, key: str, number: object) -> None:
    with pytest.raises(ModelError, match="describes no possible model") as answer:
        store.load(edited(folder, "", **{key: number}))
    one_line(answer)


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("text_config", {"vocab_size": 2**22, "bos_token_id": 2**22 - 2}),
        ("text_config", {"max_position_embeddings": 2**20}),
        ("text_config", {"intermediate_size": 2**18}),
        ("vision_config", {"intermediate_size": 2**18}),
        ("vision_config", {"image_size": 4096, "patch_size": 16}),
        ("vision_config", {"num_hidden_layers": 256}),
    ],
    ids=str,
)
def test_a_model_larger_than_its_file(folder: Path, section: str, keys: dict[str, int]) -> None:
    with pytest.raises(ModelError, match=r"missing|of another shape") as answer:
        store.load(edited(folder, section, **keys))
    one_line(answer)


@pytest.mark.parametrize("key", ["vision.depth", "text.depth", "text.vocab_size", "text.hidden", "vision.hidden"])
def test_a_folder_of_ours_larger_than_its_file(small_blip: MakeBlip, key: str, tmp_path: Path) -> None:
    store.save(small_blip(), tmp_path)
    tree = yaml.safe_load((tmp_path / store.ARCHITECTURE).read_text())
    section, _, name = key.partition(".")
    tree[section][name] = 256 if name == "depth" else 200_000
    (tmp_path / store.ARCHITECTURE).write_text(yaml.safe_dump(tree))
    with pytest.raises(ModelError, match=r"layers, and .* tensors|of another shape"):
        store.load(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a": ' + "9" * 6000 + "}", "[]", "7", '{"architectures": {}}', "\xff"]
)
def test_a_config_json_that_is_none(folder: Path, text: str) -> None:
    (folder / transformers_folder.CONFIG).write_text(text, encoding="latin-1")
    with pytest.raises(ModelError) as answer:
        store.load(folder)
    one_line(answer)


def test_an_endless_config_json(folder: Path) -> None:
    (folder / transformers_folder.CONFIG).unlink()
    (folder / transformers_folder.CONFIG).symlink_to("/dev/zero")
    with pytest.raises(ModelError):
        store.load(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": 8, "num_hidden_layers": 10**9},
        {"hidden_size": 10**12},
        {"hidden_size": 8, "vocab_size": 10**300},
        {"d_model": 8, "num_layers": 10**9},
        {"d_model": 8, "num_decoder_layers": 10**9},
    ],
    ids=str,
)
def test_a_language_model(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"allowed are .* at most|too large"):
        LanguageConfig(kind="t5" if "d_model" in settings else "opt", settings=settings)


def test_a_pth_of_impossible_shapes(tmp_path: Path) -> None:
    torch.save({"visual_encoder.pos_embed": torch.zeros(3)}, tmp_path / "model.pth")
    with pytest.raises(ModelError):
        store.load(tmp_path / "model.pth")


def test_the_command_says_it_in_a_line_and_ends_with_2() -> None:
    done = CliRunner().invoke(app, ["show", "blip/tiny", "--set", "vision.depth=1000000000"])
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert "vision.depth" in done.output


def test_ordinary_models_are_read(folder: Path) -> None:
    assert store.load(folder).config.vision.depth == 2
    assert safetensors.torch.load_file(folder / files.SAFE)
