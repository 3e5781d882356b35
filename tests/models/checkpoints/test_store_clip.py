"""CLIP's checkpoints of other code: open_clip's folders, OpenAI's archives and state dicts, in and out again."""

from __future__ import annotations

import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from capfilt.data.images.preprocess import CLIP_PREPROCESS, Preprocess
from capfilt.errors import ModelError, RecipeError
from capfilt.models.checkpoints import files, store, torchscript
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.models.clip.checkpoint import give
from capfilt.models.clip.model import Clip
from capfilt.models.registry import build
from capfilt.stages import train

MakeClip = Callable[..., Clip]


@pytest.fixture(scope="module")
def wide(small_clip: MakeClip) -> Clip:
    """A CLIP whose heads are 64 wide, as those of every file that does not say it."""
    config = small_clip().config
    torch.manual_seed(0)
    towers = {name: getattr(config, name).model_copy(update={"width": 128}) for name in ("vision", "text")}
    made = build(config.model_copy(update=towers))
    assert isinstance(made, Clip)
    return made.eval()


def same(one: Any, two: Any) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- open_clip's folders ----


@pytest.fixture
def folder(wide: Clip, tmp_path: Path) -> Path:
    """A folder as open_clip pushes it to the hub."""
    home = tmp_path / "open_clip"
    home.mkdir()
    store.save_open_clip(wide, home, CLIP_PREPROCESS.to_open_clip(16))
    return home


def described(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / files.OPEN_CLIP).read_text())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree["model_cfg"] = {**tree["model_cfg"]}
        if name:
            tree["model_cfg"][section] = {**tree["model_cfg"][section], name: value}
        else:
            tree["model_cfg"][section] = value
    (folder / files.OPEN_CLIP).write_text(json.dumps(tree))


class TestOpenClip:
    def test_it_is_read_as_it_was_written(self, folder: Path, wide: Clip) -> None:
        assert store.layout(folder) == "open_clip"
        assert same(store.load(folder), wide)
        assert store.architecture(folder) == wide.config
        pickled = folder / files.OPEN_CLIP_BIN
        torch.save(files.tensors(folder / files.OPEN_CLIP_SAFE), pickled)
        (folder / files.OPEN_CLIP_SAFE).unlink()
        assert same(store.load(store.find(str(folder))), wide)

    def test_a_public_description_is_understood(self, folder: Path) -> None:
        public = {
            "embed_dim": 512,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
        }
        (folder / files.OPEN_CLIP).write_text(json.dumps({"model_cfg": public}))
        from capfilt import presets
        from capfilt.models import read_architecture

        assert store.architecture(folder) == read_architecture(presets.find("models", "clip/vit-b-32-quickgelu"))
        described(folder, quick_gelu=False)
        assert store.architecture(folder) == read_architecture(presets.find("models", "clip/vit-b-32"))

    def test_a_prefix_chooses_open_clip_s_files(self, folder: Path, wide: Clip, small_clip: MakeClip) -> None:
        other = small_clip(seed=5)
        store.save_hf(other, folder, {"pad": 0, "sep": 803})
        assert store.layout(folder) == "hf"
        assert same(store.load(store.find(str(folder))), other)
        chosen = store.find(f"local-dir:{folder}")
        assert chosen.name == files.OPEN_CLIP_SAFE
        assert same(store.load(chosen), wide)
        assert store.fingerprint(chosen) != store.fingerprint(folder)
        with pytest.raises(ModelError, match=r"is no folder of open_clip: it needs open_clip_config\.json and"):
            store.find(f"local-dir:{folder.parent}")

    def test_the_hub_gives_it(self, hub: tuple[Path, list[str]], folder: Path, wide: Clip) -> None:
        root, asked = hub
        (root / "owner").mkdir()
        folder.rename(root / "owner/name")
        for name in ("hf-hub:owner/name", "owner/name"):
            assert same(store.load(store.find(name)), wide)
        assert any(path.endswith(files.OPEN_CLIP_SAFE) for path in asked)

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"vision_cfg__timm_model_name": "vit_x"}, "timm_model_name"),
            ({"text_cfg__hf_model_name": "roberta"}, "hf_model_name"),
            ({"text_cfg__no_causal_mask": True}, "no_causal_mask"),
            ({"multimodal_cfg": {"width": 3}}, "multimodal_cfg"),
            ({"custom_text": True}, "custom_text"),
            ({"vision_cfg__layers": [3, 4, 6, 3]}, "plain ViT"),
            ({"vision_cfg__width": "wide"}, "describes no possible model"),
            ({"vision_cfg__width": 256}, "of another shape"),
            ({"vision_cfg__layers": 3}, "missing: visual.transformer.resblocks.2"),
            ({"text_cfg__layers": 1}, "unexpected: transformer.resblocks.1"),
            ({"vision_cfg": None}, "describes no possible model"),
        ],
        ids=str,
    )
    def test_what_is_another_model_is_one_line(self, change: Any, why: str, folder: Path) -> None:
        described(folder, **change)
        with pytest.raises(ModelError, match=why) as refused:
            store.load(folder)
        assert "\n" not in str(refused.value)

    def test_pictures_are_prepared_as_it_says(self, folder: Path) -> None:
        assert Preprocess.read(folder, 16) == CLIP_PREPROCESS
        assert Preprocess.read(folder / files.OPEN_CLIP_SAFE, 16) == CLIP_PREPROCESS
        tree = json.loads((folder / files.OPEN_CLIP).read_text())
        tree["preprocess_cfg"] = {
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "resize_mode": "squash",
            "interpolation": "bilinear",
        }
        (folder / files.OPEN_CLIP).write_text(json.dumps(tree))
        read = Preprocess.read(folder, 16)
        assert (read.shape, read.resample, read.mean) == ("squash", "bilinear", (0.5, 0.5, 0.5))
        assert Preprocess.model_validate(read.model_dump()).to_open_clip(16)["resize_mode"] == "squash"
        tree["preprocess_cfg"]["resize_mode"] = "longest"
        (folder / files.OPEN_CLIP).write_text(json.dumps(tree))
        with pytest.raises(ModelError, match="resize_mode longest"):
            Preprocess.read(folder, 16)


# ---- files by OpenAI's names ----


class Branch(nn.Module):
    """A module that holds others."""


class Quick(Branch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Exact(Branch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x)


def archive(model: Clip, path: Path, kind: type[Branch] = Quick) -> Path:
    """A TorchScript archive with the tensors of a model under OpenAI's names, in half precision as OpenAI's is."""
    root = kind()
    for name, tensor in give(model.state_dict(), model.config, "openai").items():
        *parents, last = name.split(".")
        place: nn.Module = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, Branch())
            place = getattr(place, parent)
        place.register_parameter(last, nn.Parameter(tensor.half()))
    root.register_buffer("input_resolution", torch.tensor(16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would have us use something else
        torch.jit.script(root).save(str(path))
    return path


@pytest.fixture(scope="module")
def made(wide: Clip, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive(wide, tmp_path_factory.mktemp("openai") / "ViT.pt")


class TestArchives:
    def test_all_is_read_and_nothing_is_run(self, made: Path, wide: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            wanted = torch.jit.load(str(made)).state_dict()
        monkeypatch.setattr(torch.jit, "load", None)
        monkeypatch.setattr(torch._C, "import_ir_module", None)
        read = torchscript.tensors(made)
        assert read.keys() == wanted.keys()
        assert all(torch.equal(read[name], wanted[name]) for name in wanted)
        model = store.load(store.find(str(made)))
        assert model.config == wide.config
        torch.testing.assert_close(dict(model.state_dict()), dict(wide.state_dict()), rtol=1e-3, atol=1e-3)
        assert store.left_behind(made) == {"sizes, which the tensors say too": 1}

    def test_its_code_says_the_activation(self, wide: Clip, tmp_path: Path) -> None:
        path = archive(wide, tmp_path / "laion.pt", Exact)
        assert store.architecture(path).activation == "gelu"
        path.with_suffix(".yaml").write_text("extends: clip/vit-b-32-quickgelu\n")
        with pytest.raises(ModelError, match="is of gelu, and the YAML beside it says quick_gelu"):
            store.load(path)

    @pytest.mark.parametrize(
        ("attack", "why"),
        [
            (b"cposix\nsystem\n(S'true'\ntR.", r"holds posix\.system"),
            (b"c__builtin__\neval\n(S'1'\ntR.", r"holds __builtin__\.eval"),
            (b"ctorch.hub\nload\n.", r"holds torch\.hub\.load"),
            (pickle.dumps([1, 2]), "damaged, or no checkpoint"),
            (b"\x80\x02r\xff\xff\xff\xffN.", "damaged, or no checkpoint"),
            (b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ\x00\x00\x00\x7ftQ.",
             "damaged, or no checkpoint"),
        ],
    )  # fmt: skip
    def test_hostile_archives_are_refused(self, attack: bytes, why: str, made: Path, tmp_path: Path) -> None:
        path = tmp_path / "evil.pt"
        with zipfile.ZipFile(made) as good, zipfile.ZipFile(path, "w") as evil:
            for name in good.namelist():
                evil.writestr(name, attack if name.endswith("/data.pkl") else good.read(name))
        with pytest.raises(ModelError, match=why) as refused:
            store.load(path)
        assert "\n" not in str(refused.value)

    def test_a_tensor_is_no_larger_than_what_holds_it(self) -> None:
        with pytest.raises(ValueError, match="in 4 numbers"):
            torchscript._tensor(torch.zeros(4), 0, (10**6, 10**6), (0, 0))
        with pytest.raises(RuntimeError):
            torchscript._tensor(torch.zeros(4), 3, (2,), (1,))


class TestStateDicts:
    def test_a_written_one_is_read_again(self, wide: Clip, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        store.save_pth(wide, tmp_path / "model.pth")
        with caplog.at_level(logging.WARNING):
            assert same(store.load(tmp_path / "model.pth"), wide)
        assert "does not say which activation it is of; taken for quick_gelu" in caplog.text
        plain = torch.load(tmp_path / "model.pth", weights_only=True)
        assert plain["visual.proj"].shape == (128, 8), "OpenAI's shapes, and no wrapper around"

    def test_open_clip_s_trainer_s_is_read(self, wide: Clip, tmp_path: Path) -> None:
        given = {f"module.{name}": t for name, t in give(wide.state_dict(), wide.config, "openai").items()}
        path = tmp_path / "epoch_3.pt"
        torch.save({"epoch": 3, "name": "mine", "state_dict": given, "optimizer": {"state": {}}}, path)
        with pytest.raises(ModelError, match=r"write epoch_3\.yaml beside it, with `extends: clip/vit-b-32-quickgelu`"):
            store.load(path)
        store.save_pth(wide, tmp_path / "other.pt")
        (tmp_path / "other.yaml").rename(tmp_path / "epoch_3.yaml")
        assert same(store.load(path), wide)

    def test_what_is_no_clip_of_ours_is_named(self, wide: Clip, tmp_path: Path) -> None:
        given = give(wide.state_dict(), wide.config, "openai")
        for name, change, why in (
            ("more.pt", {"visual.extra": torch.ones(1)}, "unexpected: visual.extra"),
            ("less.pt", {"ln_final.bias": None}, "missing: ln_final.bias"),
            ("odd.pt", {"visual.proj": torch.ones(128, 9)}, "of another shape: image_projection.weight"),
        ):
            store.save_pth(wide, tmp_path / name)
            torch.save({k: v for k, v in (given | change).items() if v is not None}, tmp_path / name)
            with pytest.raises(ModelError, match=why):
                store.load(tmp_path / name)
        torch.save({"a": torch.ones(1)}, tmp_path / "none.pt")
        with pytest.raises(ModelError, match=r"no checkpoint of CLIP: it lacks (\S+, ){2}\S+"):
            store.load(tmp_path / "none.pt")


# ---- activations of transformers' folders, and of what a training starts from ----


def test_transformers_folders_say_their_activation(small_clip: MakeClip, tmp_path: Path) -> None:
    store.save_hf(small_clip(activation="gelu"), tmp_path, {"pad": 0, "sep": 803})
    config = json.loads((tmp_path / "config.json").read_text())
    assert store.architecture(tmp_path).activation == "gelu"
    del config["vision_config"]["hidden_act"], config["text_config"]["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert store.architecture(tmp_path).activation == "quick_gelu", "transformers' default"
    config["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="hidden_act is gelu and quick_gelu"):
        store.architecture(tmp_path)


def test_a_missing_projection_of_transformers_is_named(small_clip: MakeClip, tmp_path: Path) -> None:
    store.save_hf(small_clip(), tmp_path, {"pad": 0, "sep": 803})
    tensors = safetensors.torch.load_file(tmp_path / files.SAFE)
    del tensors["text_model.encoder.layers.1.self_attn.v_proj.bias"]
    safetensors.torch.save_file(tensors, tmp_path / files.SAFE)
    with pytest.raises(ModelError, match=r"v_proj\.bias is missing beside"):
        store.load(tmp_path)


def test_a_training_does_not_start_from_the_other_activation(small_clip: MakeClip, tmp_path: Path) -> None:
    store.save(small_clip(activation="gelu"), tmp_path)
    wanted = small_clip().config
    with pytest.raises(RecipeError, match=r"vision\.activation gelu, and `model` quick_gelu"):
        train.check_start(tmp_path, wanted, InitialConfig())
    assert train.check_start(tmp_path, small_clip(activation="gelu").config, InitialConfig()) == tmp_path
