"""What is fetched of a hub: its client answered from a folder."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch

from capfilt.errors import ModelError
from capfilt.models.checkpoints import files

BESIDE = {"config.json", "tokenizer_config.json", "vocab.json", "merges.txt"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository; what is fetched of it lies beside it in `cache`."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"
    repository.mkdir()
    cache.mkdir()
    for name in [*BESIDE, "README.md", "flax_model.msgpack"]:
        (repository / name).write_text("{}")

    def fetch(name: str, allow_patterns: list[str], revision: str | None) -> str:
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


def test_an_invalid_name_is_refused_before_it_is_resolved() -> None:
    with pytest.raises(ModelError, match="names on the Hugging Face hub look like OWNER/NAME"):
        files.download("nowhere")


class TestInParts:
    """Several files and an index of them, safetensors or pickles."""

    TENSORS: ClassVar = {"a": torch.ones(2), "b": torch.zeros(3), "c": torch.full((1,), 7.0)}

    @pytest.fixture(params=["safetensors", "bin"])
    def index(self, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
        kind = request.param
        stem = "model" if kind == "safetensors" else "pytorch_model"
        where = {name: f"{stem}-0000{1 + (name == 'c')}-of-00002.{kind}" for name in self.TENSORS}
        for file in set(where.values()):
            self.write(tmp_path / file, {name: t for name, t in self.TENSORS.items() if where[name] == file})
        index = tmp_path / (files.INDEX if kind == "safetensors" else files.BIN_INDEX)
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return index

    @staticmethod
    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if path.suffix == ".bin":
            torch.save(tensors, path)
        else:
            safetensors.torch.save_file(tensors, path)

    def refused(self, index: Path, why: str) -> None:
        with pytest.raises(ModelError, match=why) as told:
            files.tensors(index)
        assert "\n" not in str(told.value)

    def changed(self, index: Path, tensor: str, file: str) -> None:
        tree = json.loads(index.read_text())
        tree["weight_map"][tensor] = file
        index.write_text(json.dumps(tree))

    def test_are_read_as_one(self, index: Path) -> None:
        assert files.weights_file(index.parent) == index
        assert len(files.parts(index)) == 2
        found = files.tensors(index)
        assert found.keys() == self.TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in self.TENSORS.items())
        assert files.tensors(index, lambda name: name == "c").keys() == {"c"}

    @pytest.mark.parametrize(
        "name",
        ["../x.bin", "/etc/x.bin", "a/../x.safetensors", "a/x.bin", "..", "", "x.py", "x.bin\n", ".x.bin", "x\0.bin"],
    )
    def test_only_files_beside_the_index_are_meant(self, index: Path, name: str) -> None:
        self.changed(index, "a", name)
        self.refused(index, "allowed are files beside it that end with")

    def test_a_kind_is_not_mixed_in(self, index: Path) -> None:
        other = "x.bin" if index.name == files.INDEX else "x.safetensors"
        self.write(index.parent / other, {"a": torch.ones(2)})
        self.changed(index, "a", other)
        self.refused(index, "allowed are files beside it that end with")

    def test_a_file_that_is_not_there(self, index: Path) -> None:
        gone = files.parts(index)[1]
        gone.unlink()
        self.refused(index, f"names {gone.name}, which is not beside it")

    def test_a_tensor_that_is_not_where_it_should_be(self, index: Path) -> None:
        self.changed(index, "c", files.parts(index)[0].name)
        self.refused(index, "lacks c")

    def test_a_tensor_in_two_files(self, index: Path) -> None:
        second = files.parts(index)[1]
        self.write(second, {"c": torch.ones(1), "a": torch.ones(2)})
        self.refused(index, "a is in .* and in another of its files")

    @pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 100_000])
    def test_an_index_that_is_none(self, index: Path, text: str) -> None:
        index.write_text(text)
        self.refused(index, "is no index of weights")


class Runs:
    """A pickle of it runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def test_a_part_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"a": Runs()}, tmp_path / "x.bin")
    (tmp_path / files.BIN_INDEX).write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
    with pytest.raises(ModelError, match="other pickles are not opened, they can run code"):
        files.tensors(tmp_path / files.BIN_INDEX)
