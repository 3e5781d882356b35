"""Checkpoints of others: what transformers' folders and BLIP's .pth files may hold. (Same answers: test_parity.py.)"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from capfilt import config as configs
from capfilt import presets
from capfilt.errors import ModelError
from capfilt.models import Blip, BlipConfig, blank
from capfilt.models.blip import checkpoint, transformers_config
from capfilt.models.checkpoints import files, store, transformers_folder

MakeBlip = Callable[..., Blip]
IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 21, 3, 0]])
MASK = (IDS != 0).long()
SPECIAL = {"pad": 0, "sep": 3}
OUTPUT = "text_decoder.cls.predictions.decoder"
WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"
SHARES = ["all", "all_but_cross_attention", "all_but_self_attention", "none"]

# The names in a .pth of BLIP's pretraining, one layer deep, as its code writes them.
VISION = """cls_token pos_embed patch_embed.proj.* blocks.0.norm1.* blocks.0.attn.qkv.* blocks.0.attn.proj.*
    blocks.0.norm2.* blocks.0.mlp.fc1.* blocks.0.mlp.fc2.* norm.*"""
BERT = """embeddings.word_embeddings.weight embeddings.position_embeddings.weight embeddings.LayerNorm.*
    encoder.layer.0.attention.self.query.* encoder.layer.0.attention.self.key.* encoder.layer.0.attention.self.value.*
    encoder.layer.0.attention.output.dense.* encoder.layer.0.attention.output.LayerNorm.*
    encoder.layer.0.crossattention.self.query.* encoder.layer.0.crossattention.self.key.*
    encoder.layer.0.crossattention.self.value.* encoder.layer.0.crossattention.output.dense.*
    encoder.layer.0.crossattention.output.LayerNorm.* encoder.layer.0.intermediate.dense.*
    encoder.layer.0.output.dense.* encoder.layer.0.output.LayerNorm.*"""
HEAD = "bias transform.dense.* transform.LayerNorm.* decoder.*"
PRETRAINED = {
    "visual_encoder.": VISION,
    "text_encoder.": BERT,
    "text_decoder.bert.": BERT,
    "text_decoder.cls.predictions.": HEAD,
    "": "vision_proj.* text_proj.* itm_head.* temp",
}
TRAINING_ONLY = """image_queue text_queue queue_ptr visual_encoder_m.cls_token visual_encoder_m.norm.weight
    text_encoder_m.embeddings.word_embeddings.weight vision_proj_m.weight text_proj_m.bias
    text_encoder.embeddings.position_ids text_decoder.bert.embeddings.position_ids"""


def spelled(table: dict[str, str]) -> set[str]:
    return {
        prefix + name.replace("*", ending)
        for prefix, names in table.items()
        for name in names.split()
        for ending in (("weight", "bias") if "*" in name else ("",))
    }


def said(model: Blip) -> list[Tensor]:
    """Whatever the model can say about two pictures and two texts."""
    size = model.config.vision.image_size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        tokens = model.encode_image(pixels)
        found = [tokens]
        if "decode" in model.capabilities:
            found.append(model.decode(IDS, MASK, model.image_context(tokens, "decoder")))
        if "fuse" in model.capabilities:
            found.append(model.match(model.fuse(IDS, MASK, model.image_context(tokens, "encoder"))))
            found += [model.project_image(tokens), model.project_text(model.encode_text(IDS, MASK))]
        if "answer" in model.capabilities:
            question = model.fuse(IDS, MASK, model.image_context(tokens, "encoder"))
            found += [question, model.decode(IDS, MASK, model.image_context(question, "decoder"))]
    return found


def assert_same(one: Blip, other: Blip) -> None:
    torch.testing.assert_close(said(one), said(other), rtol=0, atol=0)


def answering(small_blip: MakeBlip, **text: Any) -> Blip:
    """A model that answers questions, which must be of one width."""
    plain = small_blip(width=24, **text).config
    torch.manual_seed(0)
    return Blip(plain.model_copy(update={"answers": True}))


class TestTransformersFolder:
    @pytest.fixture
    def captioner(self, small_blip: MakeBlip, tmp_path: Path) -> Path:
        store.save_hf(small_blip(roles=("decoder",), tie_lm_head=False), tmp_path, SPECIAL)
        return tmp_path

    @staticmethod
    def edit(folder: Path, change: Callable[[dict[str, Tensor]], object], **config: object) -> Path:
        tensors = safetensors.torch.load_file(folder / files.SAFE)
        change(tensors)
        safetensors.torch.save_file(tensors, folder / files.SAFE)
        described = json.loads((folder / transformers_folder.CONFIG).read_text())
        for key, value in config.items():
            section, _, name = key.rpartition("__")
            (described[section] if section else described)[name] = value
        (folder / transformers_folder.CONFIG).write_text(json.dumps(described))
        return folder

    @pytest.mark.parametrize("role", ["decoder", "encoder"])
    @pytest.mark.parametrize("tie", [True, False])
    def test_goes_out_and_comes_back(self, small_blip: MakeBlip, role: str, tie: bool, tmp_path: Path) -> None:
        model = small_blip(roles=(role,), tie_lm_head=tie)
        if role == "encoder":
            model.temperature.data.fill_(0.0123)
        store.save_hf(model, tmp_path, SPECIAL)
        again = store.load(tmp_path)
        assert_same(model, again)
        if role == "encoder":
            torch.testing.assert_close(again.temperature, model.temperature)
        assert again.config.vision == model.config.vision.model_copy(update={"init_std": 0.02})
        assert store.fingerprint(tmp_path).startswith("blip-")

    @pytest.mark.parametrize("share", SHARES)
    def test_a_model_that_answers(self, small_blip: MakeBlip, share: str, tmp_path: Path) -> None:
        model = answering(small_blip, share=share)
        store.save_hf(model, tmp_path, SPECIAL)
        again = store.load(tmp_path)
        assert again.capabilities == {"encode_image", "answer"}
        assert again.config.text.share == "none"
        assert_same(model, again)

    def test_no_class_for_both_roles(self, small_blip: MakeBlip, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="transformers has no class for a model of both roles"):
            store.save_hf(small_blip(), tmp_path, SPECIAL)
        assert not any(tmp_path.iterdir())

    def test_of_two_biases_the_one_that_is_added(self, captioner: Path) -> None:
        """transformers adds decoder.bias; its other bias is dead unless the two are tied."""
        self.edit(captioner, lambda t: t.update({f"{OUTPUT}.bias": torch.ones_like(t[f"{OUTPUT}.bias"])}))
        assert store.load(captioner).state_dict()["text.head.bias"].eq(1).all()
        self.edit(captioner, lambda t: t.pop(f"{OUTPUT}.bias"))
        assert store.load(captioner).state_dict()["text.head.bias"].eq(0).all()

    def test_the_tensors_say_what_is_tied(self, captioner: Path) -> None:
        assert not store.architecture(captioner).text.tie_lm_head
        # Tied by the config and not by the values: transformers does not tie them either.
        self.edit(captioner, lambda t: None, tie_word_embeddings=True, text_config__tie_word_embeddings=True)
        assert not store.architecture(captioner).text.tie_lm_head
        untied = store.load(captioner)
        self.edit(captioner, lambda t: t.update({f"{OUTPUT}.weight": t[WORDS].clone()}))
        assert store.architecture(captioner).text.tie_lm_head
        assert said(store.load(captioner))[1].sub(said(untied)[1]).abs().max() > 0.01
        self.edit(captioner, lambda t: t.pop(f"{OUTPUT}.weight"))
        assert store.load(captioner).config.text.tie_lm_head
        self.edit(captioner, lambda t: None, tie_word_embeddings=False, text_config__tie_word_embeddings=False)
        with pytest.raises(ModelError, match=rf"1 missing: {OUTPUT}\.weight"):
            store.load(captioner)

    def test_defaults_are_those_of_transformers(self, captioner: Path) -> None:
        described = json.loads((captioner / transformers_folder.CONFIG).read_text())
        for section in ("vision_config", "text_config"):
            described[section] = {"bos_token_id": 30522}
        config = transformers_config.architecture(described, True, captioner)
        assert (config.text.heads, config.text.dropout, config.text.layer_norm_eps) == (8, 0.0, 1e-12)
        assert (config.vision.layer_norm_eps, config.vision.image_size) == (1e-5, 384)
        assert math.isclose(config.temperature, 0.07, rel_tol=1e-6)
        del described["logit_scale_init_value"]
        assert math.isclose(
            transformers_config.architecture(described, True, captioner).temperature, 0.07, rel_tol=1e-4
        )

    def test_itm_token_is_that_of_training(self, small_blip: MakeBlip, tmp_path: Path) -> None:
        store.save_hf(small_blip(roles=("encoder",)), tmp_path, SPECIAL)
        self.edit(tmp_path, lambda t: None, itm_token="cls")
        assert store.architecture(tmp_path).itm_token == "cls"
        described = json.loads((tmp_path / transformers_folder.CONFIG).read_text())
        del described["itm_token"]
        (tmp_path / transformers_folder.CONFIG).write_text(json.dumps(described))
        assert store.load(tmp_path).config.itm_token == "enc"
        assert store.load(tmp_path, itm_token="cls").config.itm_token == "cls"

    @pytest.mark.parametrize(
        ("config", "told"),
        [
            ({"architectures": ["BertModel"]}, "describes the class BertModel; .* can be read: BlipForCond"),
            ({"architectures": None}, "describes the class none"),
            ({"text_config__hidden_act": "relu"}, r"text_config\.hidden_act is relu; BLIP has gelu"),
            ({"text_config__bos_token_id": 5}, "bos_token_id is 5; .* must be the last two of the 197"),
            ({"vision_config__image_size": [16, 24]}, r"image_size is \[16, 24\]; .* must be square"),
            ({"text_config__num_attention_heads": 5}, "text width 16 is not a multiple of heads 5"),
            ({"vision_config__num_hidden_layers": "two"}, "describes no possible model: depth: Input should be"),
            ({"text_config__num_hidden_layers": 3}, r"26 missing: .*encoder\.layer\.2"),
            ({"text_config__num_hidden_layers": 1}, r"26 unexpected: .*encoder\.layer\.1"),
        ],
    )
    def test_a_config_that_does_not_fit(self, captioner: Path, config: dict[str, object], told: str) -> None:
        self.edit(captioner, lambda t: None, **config)
        with pytest.raises(ModelError, match=told):
            store.load(captioner)

    def test_a_broken_config(self, captioner: Path) -> None:
        (captioner / transformers_folder.CONFIG).write_text("{")
        with pytest.raises(ModelError, match=r"config\.json cannot be read"):
            store.architecture(captioner)

    def test_no_weights(self, captioner: Path) -> None:
        (captioner / files.SAFE).unlink()
        with pytest.raises(ModelError, match=r"it needs model\.safetensors or pytorch_model\.bin"):
            store.load(captioner)


class TestPth:
    """BLIP's own files, whose heads are 64 wide."""

    @pytest.fixture
    def make(self, small_blip: MakeBlip) -> MakeBlip:
        def made(**text: Any) -> Blip:
            config = small_blip(**{"width": 128, "hidden": 48, "depth": 1, "layer_norm_eps": 1e-12, **text}).config
            vision = config.vision.model_copy(update={"width": 192, "heads": 3, "depth": 2})
            torch.manual_seed(3)
            return Blip(config.model_copy(update={"vision": vision}))

        return made

    @staticmethod
    def bare(model: Blip, folder: Path) -> Path:
        """As the authors published it: the file alone."""
        store.save_pth(model, folder / "model.pth")
        (folder / "model.yaml").unlink()
        return folder / "model.pth"

    @staticmethod
    def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
        saved = torch.load(path, weights_only=True)
        change(saved["model"])
        torch.save(saved, path)
        return path

    @pytest.mark.parametrize("tie", [True, False])
    @pytest.mark.parametrize("share", SHARES)
    def test_pretrained(self, make: MakeBlip, share: str, tie: bool, tmp_path: Path) -> None:
        model = make(share=share, tie_lm_head=tie)
        path = self.bare(model, tmp_path)
        again = store.load(path)
        assert (again.config.text.share, again.config.text.tie_lm_head) == (share, tie)
        assert again.config.text.roles == ("encoder", "decoder")
        assert again.config.text.dropout == 0.1
        assert_same(model, again)
        assert store.fingerprint(path).startswith("blip-")

    @pytest.mark.parametrize("role", ["decoder", "encoder"])
    def test_fine_tuned(self, make: MakeBlip, role: str, tmp_path: Path) -> None:
        model = make(roles=(role,))
        again = store.load(self.bare(model, tmp_path))
        assert again.config.text.roles == (role,)
        assert_same(model, again)

    @pytest.mark.parametrize("role", ["decoder", "encoder"])
    def test_one_role_of_a_pretrained_one(self, make: MakeBlip, role: str, tmp_path: Path) -> None:
        store.save(make(), tmp_path)
        own = store.load(tmp_path, roles=(role,))
        assert_same(own, store.load(self.bare(make(), tmp_path), roles=(role,)))

    def test_one_that_answers(self, make: MakeBlip, tmp_path: Path) -> None:
        config = make(share="none", width=192, heads=3).config
        model = Blip(config.model_copy(update={"answers": True}))
        again = store.load(self.bare(model, tmp_path))
        assert again.capabilities == {"encode_image", "answer"}
        assert_same(model, again)

    def test_has_the_names_of_blip(self, make: MakeBlip, tmp_path: Path) -> None:
        path = self.bare(make(), tmp_path)
        saved = torch.load(path, weights_only=True)["model"]
        names = {name for name in saved if ".blocks.1." not in name}
        assert names == spelled(PRETRAINED)
        tied, words = saved[f"{OUTPUT}.weight"], saved[WORDS]
        assert tied.data_ptr() == words.data_ptr(), "a tied tensor is stored once"
        one, other = (saved[f"{stack}.encoder.layer.0.intermediate.dense.weight"] for stack in
                      ("text_encoder", "text_decoder.bert"))  # fmt: skip
        assert one.data_ptr() == other.data_ptr()

    def test_what_only_training_needs_is_left_behind(self, make: MakeBlip, tmp_path: Path) -> None:
        model = make()
        path = self.bare(model, tmp_path)
        self.edit(path, lambda t: t.update(dict.fromkeys(TRAINING_ONLY.split(), torch.zeros(2))))
        assert_same(model, store.load(path))
        left = store.left_behind(path)
        assert list(left.values()) == [5, 3, 2]
        assert [why.split()[1] for why in left] == ["momentum", "queues", "constant,"]

    def test_keys_that_do_not_fit_are_named_as_in_the_file(self, make: MakeBlip, tmp_path: Path) -> None:
        path = self.bare(make(), tmp_path)
        self.edit(path, lambda t: t.update({"cls_head.0.weight": t.pop("visual_encoder.norm.weight")}))
        with pytest.raises(ModelError, match=r"1 missing: visual_encoder\.norm\.weight; 1 unexpected: cls_head\.0\.w"):
            store.load(path)

    def test_a_stack_that_lacks_a_tensor(self, make: MakeBlip, tmp_path: Path) -> None:
        path = self.bare(make(), tmp_path)
        lost = "text_encoder.encoder.layer.0.output.dense.bias"
        self.edit(path, lambda t: t.pop(lost))
        with pytest.raises(ModelError, match=rf"1 missing: {lost}"):
            store.load(path)

    def test_heads_of_another_width_need_the_yaml_beside(self, small_blip: MakeBlip, tmp_path: Path) -> None:
        model = small_blip()
        store.save_pth(model, tmp_path / "model.pth")
        assert store.load(tmp_path / "model.pth").config == model.config
        assert_same(model, store.load(tmp_path / "model.pth"))
        (tmp_path / "model.yaml").unlink()
        with pytest.raises(
            ModelError, match=r"its vision is 24 wide, not a multiple of 64, .* a YAML of the same name"
        ):
            store.load(tmp_path / "model.pth")

    def test_shared_in_the_yaml_and_not_in_the_file(self, small_blip: MakeBlip, tmp_path: Path) -> None:
        path = tmp_path / "model.pth"
        store.save_pth(small_blip(), path)
        self.edit(path, lambda t: t.update({"text_encoder.embeddings.LayerNorm.bias": torch.ones(16)}))
        with pytest.raises(ModelError, match=r"1 of two values: text\.embeddings\.shared\.norm\.bias"):
            store.load(path)

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            ({"model": {"visual_encoder.pos_embed": torch.zeros(1, 5, 64)}}, "is no checkpoint of BLIP: it lacks"),
            ({"model": [1, 2]}, "holds no table of tensors"),
            ([torch.zeros(1)], "holds no table of tensors"),
            ({"model": {"a": 1}}, "holds no table of tensors"),
        ],
    )
    def test_other_files(self, content: object, told: str, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ModelError, match=told):
            store.load(tmp_path / "a.pth")

    def test_a_file_that_lacks_what_the_architecture_is_read_from(self, make: MakeBlip, tmp_path: Path) -> None:
        path = self.bare(make(), tmp_path)
        self.edit(path, lambda t: t.pop("visual_encoder.blocks.0.mlp.fc1.weight"))
        with pytest.raises(ModelError, match=r"visual_encoder\.blocks\.0\.mlp\.fc1\.weight is missing"):
            store.load(path)

    def test_files_of_the_time_before_zip(self, make: MakeBlip, tmp_path: Path) -> None:
        model = make()
        path = self.bare(model, tmp_path)
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
        assert_same(model, store.load(path))

    def test_a_pickle_that_would_run_code_is_not_opened(self, tmp_path: Path) -> None:
        ran = tmp_path / "ran"

        class Trap:
            def __reduce__(self) -> tuple[object, ...]:
                return Path.touch, (ran,)

        torch.save({"model": Trap()}, tmp_path / "a.pth")
        with pytest.raises(ModelError, match=r"as tensors alone \(it holds \S+\); .* they can run code") as refused:
            store.load(tmp_path / "a.pth")
        assert not ran.exists()
        assert "weights_only" not in str(refused.value), "torch advises to switch that off"

    @pytest.mark.parametrize(
        "data", [b"<html>404</html>", b"hello world", b"\x80\x02e.", b"(dp0\n.", b"\x80\x02N.", b""]
    )
    def test_bytes_that_are_no_checkpoint_are_one_line(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "b.pth").write_bytes(data)
        with pytest.raises(ModelError, match=r"cannot be read as tensors alone|holds no table of tensors"):
            store.load(tmp_path / "b.pth")


class TestKeyMaps:
    """The published sizes, on the meta device: every tensor of ours has its name in every layout, and no other."""

    @staticmethod
    def of(name: str, roles: tuple[str, ...], **changes: object) -> BlipConfig:
        config = configs.read(presets.find("models", name), BlipConfig)
        text = config.text.model_copy(update={"roles": roles, **changes})
        return config.model_copy(update={"text": text})

    @pytest.mark.parametrize("name", ["blip/base", "blip/large", "blip/tiny"])
    @pytest.mark.parametrize("roles", [("decoder",), ("encoder",), ("encoder", "decoder")])
    def test_cover_the_presets(self, name: str, roles: tuple[str, ...]) -> None:
        config = self.of(name, roles)
        own = blank(config).state_dict().keys()
        assert checkpoint.names(config, "pth").keys() == own
        assert checkpoint.names(config, "hf").keys() == own - {"temperature"}

    def test_count_as_transformers_does(self) -> None:
        head = 2  # decoder.weight and decoder.bias, which are tied
        assert len(checkpoint.names(self.of("blip/base", ("decoder",)), "hf")) + head == 473
        assert len(checkpoint.names(self.of("blip/base", ("encoder",)), "hf")) == 472
