"""What is fetched of a hub: its client answered from a folder."""

from __future__ import annotations

import fnmatch
import shutil
from pathlib import Path

import pytest

from capfilt.errors import ModelError
from capfilt.models import files

BESIDE = {"config.json", "tokenizer_config.json", "vocab.json", "merges.txt"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository; what is fetched of it lies beside it in `cache`."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    repository.mkdir()
    cache.mkdir()
    for name in [*BESIDE, "README.md", "flax_model.msgpack"]:
        (repository / name).write_text("{}")

    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert name == "somebody/something"
        for path in repository.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return repository


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin"], {"model.safetensors"}),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model-00001-of-00002.bin"],
            {"model.safetensors.index.json", "model-00001-of-00002.safetensors"},
        ),
        (["pytorch_model.bin"], {"pytorch_model.bin"}),
        (
            ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
            {"pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"},
        ),
    ],
)
def test_of_weights_one_form_and_of_a_tokenizer_everything(hub: Path, there: list[str], taken: set[str]) -> None:
    for name in there:
        (hub / name).write_text("{}")
    found = files.download("somebody/something")
    assert {path.name for path in found.iterdir()} == BESIDE | taken


def test_what_describes_a_model_comes_without_its_weights(hub: Path) -> None:
    (hub / "model.safetensors").write_text("")
    assert {path.name for path in files.download("somebody/something", weights=False).iterdir()} == BESIDE


def test_a_name_that_is_none_is_refused_before_it_is_asked_for() -> None:
    with pytest.raises(ModelError, match="names on the Hugging Face hub look like OWNER/NAME"):
        files.download("nowhere")
