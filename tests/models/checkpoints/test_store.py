from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ModelError
from capfilt.models import Blip
from capfilt.models.checkpoints import files, store

MakeBlip = Callable[..., Blip]
Hub = tuple[Path, list[str]]
IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 21, 3, 0]])
MASK = (IDS != 0).long()


def answers(model: Blip, image_size: int = 16) -> dict[str, torch.Tensor]:
    """Whatever the model can say about two pictures and two texts."""
    pixels = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = model.encode_image(pixels)
        said = {"tokens": tokens}
        if "decode" in model.capabilities:
            said["logits"] = model.decode(IDS, MASK, model.image_context(tokens, "decoder"))
        if "fuse" in model.capabilities:
            said["match"] = model.match(model.fuse(IDS, MASK, model.image_context(tokens, "encoder")))
            said["image"] = model.project_image(tokens)
            said["text"] = model.project_text(model.encode_text(IDS, MASK))
    return said


def assert_same(one: Blip, other: Blip) -> None:
    mine, others = answers(one), answers(other)
    assert mine.keys() == others.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], others[name], rtol=0, atol=0)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder."""
    tensors = safetensors.torch.load_file(folder / files.SAFE)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / files.SAFE, metadata={"format": "pt"})


class TestOurFolder:
    @pytest.mark.parametrize("share", ["all", "all_but_cross_attention", "all_but_self_attention", "none"])
    def test_gives_the_same_model_back(self, small_blip: MakeBlip, share: str, tmp_path: Path) -> None:
        model = small_blip(share=share, tie_lm_head=share != "none")
        store.save(model, tmp_path)
        again = store.load(tmp_path)
        assert again.config == model.config == store.architecture(tmp_path)
        assert_same(model, again.eval())
        assert {p.dtype for p in again.parameters()} == {torch.float32}

    @pytest.mark.parametrize("role", ["decoder", "encoder"])
    def test_gives_one_role_of_both(self, small_blip: MakeBlip, role: str, tmp_path: Path) -> None:
        model = small_blip()
        store.save(model, tmp_path)
        part = store.load(tmp_path, roles=(role,)).eval()
        assert part.config.text.roles == (role,)
        whole = answers(model)
        said = answers(part)
        assert len(said) == {"decoder": 2, "encoder": 4}[role]
        for name in said:
            torch.testing.assert_close(said[name], whole[name], rtol=0, atol=0)

    def test_gives_another_picture_size(self, small_blip: MakeBlip, tmp_path: Path) -> None:
        model = small_blip()
        store.save(model, tmp_path)
        larger = store.load(tmp_path, image_size=32)
        assert larger.config.vision.image_size == 32
        assert larger.vision.positions.shape[1] == 17
        torch.testing.assert_close(larger.vision.positions[:, 0], model.vision.positions[:, 0])

    def test_loads_without_drawing(self, small_blip: MakeBlip, tmp_path: Path) -> None:
        store.save(small_blip(), tmp_path)
        before = torch.get_rng_state()
        store.load(tmp_path)
        assert torch.equal(torch.get_rng_state(), before)

    def test_fingerprint_follows_the_weights(self, small_blip: MakeBlip, tmp_path: Path) -> None:
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            store.save(small_blip(seed), tmp_path / name)
        a, b, c = (store.fingerprint(tmp_path / name) for name in "abc")
        assert a == b != c
        assert a.startswith("blip-")


class TestRefusals:
    """Nothing is repaired: what does not fit is named."""

    @pytest.fixture
    def folder(self, small_blip: MakeBlip, tmp_path: Path) -> Path:
        store.save(small_blip(), tmp_path)
        return tmp_path

    def test_a_missing_tensor(self, folder: Path) -> None:
        edit(folder, lambda tensors: tensors.pop("vision.norm.bias"))
        with pytest.raises(ModelError, match=r"1 missing: vision\.norm\.bias"):
            store.load(folder)

    @pytest.mark.parametrize("changes", [{}, {"roles": ("decoder",)}])
    def test_an_unexpected_tensor(self, folder: Path, changes: dict[str, object]) -> None:
        edit(folder, lambda tensors: tensors.update({"vision.norm.extra": torch.zeros(1)}))
        with pytest.raises(ModelError, match=r"1 unexpected: vision\.norm\.extra"):
            store.load(folder, **changes)

    def test_a_tensor_of_another_shape(self, folder: Path) -> None:
        edit(folder, lambda tensors: tensors.update({"vision.norm.bias": torch.zeros(7)}))
        with pytest.raises(ModelError, match=r"1 of another shape: vision\.norm\.bias \[7\] for \[24\]"):
            store.load(folder)

    def test_many_names_are_cut(self, folder: Path) -> None:
        edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "blocks.0" in name])
        with pytest.raises(ModelError, match=r"12 missing: .*, \.\.\.$"):
            store.load(folder)

    def test_a_role_that_was_not_saved(self, small_blip: MakeBlip, tmp_path: Path) -> None:
        store.save(small_blip(roles=("decoder",)), tmp_path)
        with pytest.raises(ModelError, match=r"missing: image_projection\.bias"):
            store.load(tmp_path, roles=("encoder", "decoder"))

    def test_a_torn_file(self, folder: Path) -> None:
        whole = (folder / files.SAFE).read_bytes()
        (folder / files.SAFE).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file"):
            store.load(folder)

    def test_no_weights(self, folder: Path) -> None:
        (folder / files.SAFE).unlink()
        with pytest.raises(ModelError, match="no weights at"):
            store.load(folder)
        with pytest.raises(ModelError, match="no weights at"):
            store.fingerprint(folder)


class TestFind:
    def test_a_folder_and_the_home_of_a_training(self, small_blip: MakeBlip, tmp_path: Path) -> None:
        store.save(small_blip(), tmp_path / "run" / "checkpoint")
        assert store.find(str(tmp_path / "run")) == tmp_path / "run" / "checkpoint"
        assert store.find(str(tmp_path / "run" / "checkpoint")) == tmp_path / "run" / "checkpoint"

    def test_a_folder_of_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"is no model; what can be read: a folder with architecture\.yaml"):
            store.find(str(tmp_path))
        (tmp_path / "model.txt").touch()
        with pytest.raises(ModelError, match="is no model"):
            store.find(str(tmp_path / "model.txt"))

    def test_no_folder_and_no_name_of_the_hub(self) -> None:
        with pytest.raises(ModelError, match="no such file or folder, and names on the Hugging Face hub look like"):
            store.find("no/such/folder")

    def test_a_name_of_the_hub(self, small_blip: MakeBlip, hub: Hub) -> None:
        root, asked = hub
        model, tokenizer = small_blip(roles=("decoder",)), Tokenizer.load("world")
        folder = root / "Salesforce" / "blip-image-captioning-tiny"
        tokenizer.save(folder)
        store.save_hf(model, folder, {"pad": tokenizer.pad, "sep": tokenizer.sep})
        (folder / files.BIN).write_bytes(b"large, and not needed beside safetensors")
        (folder / "tf_model.h5").write_bytes(b"large")
        found = store.find("Salesforce/blip-image-captioning-tiny")
        assert sorted(file.name for file in found.iterdir()) == ["config.json", files.SAFE, "vocab.txt"]
        assert_same(model, store.load(found).eval())
        assert Tokenizer.load(found).vocab == tokenizer.vocab
        assert not any(path.endswith(("h5", "bin")) for path in asked)
        asked.clear()
        assert store.find("Salesforce/blip-image-captioning-tiny") == found
        assert not any("resolve" in path for path in asked), "what lies in the cache is not fetched again"

    def test_a_name_of_the_hub_with_the_pickle_alone(self, small_blip: MakeBlip, hub: Hub) -> None:
        folder = hub[0] / "old" / "captioner"
        model = small_blip(roles=("decoder",))
        store.save_hf(model, folder, {"pad": 0, "sep": 3})
        torch.save(safetensors.torch.load_file(folder / files.SAFE), folder / files.BIN)
        (folder / files.SAFE).unlink()
        assert_same(model, store.load(store.find("old/captioner")).eval())

    def test_a_name_that_the_hub_does_not_have(self, hub: Hub) -> None:
        with pytest.raises(ModelError, match=r"runs/demmo: no such file or folder here, and the Hugging Face hub"):
            store.find("runs/demmo")
        assert any("runs/demmo" in path for path in hub[1])

    def test_without_a_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port that drops everything
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(ModelError, match=r"did not give it either .*Without a network: fetch its config\.json"):
            store.find("Salesforce/blip-itm-base-coco")
