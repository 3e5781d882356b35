"""BLIP-2's folders, ours and transformers', in and out; what its two stages begin with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from capfilt.errors import ModelError
from capfilt.models import Blip, Blip2
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.files import INDEX, SAFE
from capfilt.models.checkpoints.initial_weights import initialise

MakeBlip2 = Callable[..., Blip2]
STAGES = ["", "opt", "t5"]


def make_stage(small_blip2: MakeBlip2, language: str) -> Blip2:
    """A model that transformers has a class for."""
    return small_blip2(language) if language else small_blip2(roles=("encoder",))


def same(one: Blip2, other: Blip2) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_frozen_towers_of_the_hub_are_held_in_what_is_computed_in(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    model = small_blip2("opt")
    store.save_hf(model, tmp_path, {})
    quick = store.load(tmp_path, torch.bfloat16)
    assert isinstance(quick, Blip2)
    assert quick.config.frozen == "bf16"
    assert {p.dtype for p in quick.language.parameters()} == {torch.bfloat16}
    assert quick.text.query_tokens.dtype == torch.float32
    assert same(store.load(tmp_path, torch.float32), model)


@pytest.mark.parametrize("language", STAGES)
def test_both_layouts_bring_everything_back(small_blip2: MakeBlip2, tmp_path: Path, language: str) -> None:
    model = make_stage(small_blip2, language)
    store.save(model, tmp_path / "own")
    store.save_hf(model, tmp_path / "hf", {})
    assert same(store.load(tmp_path / "own"), model)
    assert store.load(tmp_path / "own").config == model.config
    again = store.load(tmp_path / "hf")
    assert same(again, model)
    assert again.capabilities == model.capabilities
    assert store.fingerprint(tmp_path / "own").startswith("blip2-")
    assert store.load(tmp_path / "own", image_size=32).vision.positions.shape[1] == 17


@pytest.mark.parametrize("layout", ["own", "hf"])
@pytest.mark.parametrize("language", STAGES)
def test_every_key_is_used_or_named(small_blip2: MakeBlip2, tmp_path: Path, language: str, layout: str) -> None:
    model = make_stage(small_blip2, language)
    store.save(model, tmp_path) if layout == "own" else store.save_hf(model, tmp_path, {})
    tensors = safetensors.torch.load_file(tmp_path / SAFE)
    for name in ("text.query_tokens", "query_tokens"):
        if name in tensors:
            gone = {k: v for k, v in tensors.items() if k != name} | {"stranger": torch.zeros(1)}
            safetensors.torch.save_file(gone, tmp_path / SAFE)
            with pytest.raises(ModelError, match=f"1 missing: {name}; 1 unexpected: stranger"):
                store.load(tmp_path)
            safetensors.torch.save_file({**tensors, name: tensors[name][:, :2].contiguous()}, tmp_path / SAFE)
            with pytest.raises(ModelError, match="1 of another shape"):
                store.load(tmp_path)


def test_halves_leave_the_other_behind(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    store.save(small_blip2(), tmp_path)
    judge, writer = (store.load(tmp_path, roles=(role,)) for role in ("encoder", "decoder"))
    assert judge.capabilities == {"encode_image", "encode_text", "fuse"}
    assert writer.capabilities == {"encode_image", "decode"}
    with pytest.raises(ModelError, match="no class for a Q-Former that writes"):
        store.save_hf(writer, tmp_path / "hf", {})
    store.save_pth(writer, tmp_path / "model.pth")
    assert same(store.load(tmp_path / "model.pth"), writer)


def test_a_large_model_lies_in_several_files(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    model = make_stage(small_blip2, "opt")
    store.save_hf(model, tmp_path, {})
    whole = store.fingerprint(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / SAFE)
    (tmp_path / SAFE).unlink()
    names = sorted(tensors)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        safetensors.torch.save_file({n: tensors[n] for n in names if where[n] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert same(store.load(tmp_path), model)
    assert re.fullmatch("blip2-[0-9a-f]{64}", store.fingerprint(tmp_path))
    assert store.fingerprint(tmp_path) != whole
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names model-00002-of-00002\.safetensors, which is not beside it"):
        store.load(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ModelError, match="is no index of weights"):
        store.load(tmp_path)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("vision_config", "hidden_act", "relu", "hidden_act is relu"),
        ("vision_config", "qkv_bias", False, "qkv_bias is false"),
        ("qformer_config", "use_qformer_text_input", True, "use_qformer_text_input is True"),
        ("qformer_config", "num_attention_heads", 5, "describes no possible model"),
        ("text_config", "model_type", "llama", "its language model is a llama; there are opt and t5"),
    ],
)
def test_what_transformers_can_and_we_cannot_is_said(
    small_blip2: MakeBlip2, tmp_path: Path, section: str, key: str, value: object, said: str
) -> None:
    store.save_hf(small_blip2("opt"), tmp_path, {})
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text())
    tree[section][key] = value
    path.write_text(json.dumps(tree))
    with pytest.raises(ModelError, match=said):
        store.load(tmp_path)


class TestBeginnings:
    def test_the_vision_tower_of_a_blip(
        self, small_blip2: MakeBlip2, small_blip: Callable[..., Blip], tmp_path: Path
    ) -> None:
        other = small_blip(seed=5)
        deeper = Blip(other.config.model_copy(update={"vision": other.config.vision.model_copy(update={"depth": 4})}))
        store.save(deeper, tmp_path)
        model = small_blip2()  # three blocks: the last of four is left behind, and the norm with it
        told = initialise(model, vision=str(tmp_path))
        assert told == {f"vision.{name}" for name in model.vision.state_dict()}
        for name, tensor in model.vision.state_dict().items():
            assert torch.equal(tensor, deeper.vision.state_dict()[name])

    def test_eva_has_two_biases_in_place_of_three(self, small_blip2: MakeBlip2, tmp_path: Path) -> None:
        model, width = small_blip2(), 24
        given: dict[str, torch.Tensor] = {
            "cls_token": torch.randn(1, 1, width),
            "pos_embed": torch.randn(1, 5, width),
            "patch_embed.proj.weight": torch.randn(width, 3, 8, 8),
            "patch_embed.proj.bias": torch.randn(width),
            "norm.weight": torch.randn(width),
            "fc_norm.bias": torch.randn(width),
            "head.weight": torch.randn(3, width),
        }
        for n in range(4):
            shapes = {
                "norm1.weight": (width,),
                "norm1.bias": (width,),
                "attn.q_bias": (width,),
                "attn.v_bias": (width,),
                "attn.qkv.weight": (3 * width, width),
                "attn.proj.weight": (width, width),
                "attn.proj.bias": (width,),
                "norm2.weight": (width,),
                "norm2.bias": (width,),
                "mlp.fc1.weight": (32, width),
                "mlp.fc1.bias": (32,),
                "mlp.fc2.weight": (width, 32),
                "mlp.fc2.bias": (width,),
            }
            given |= {f"blocks.{n}.{name}": torch.randn(*shape) for name, shape in shapes.items()}
        torch.save(given, tmp_path / "eva.pth")
        told = initialise(model, vision=str(tmp_path / "eva.pth"))
        assert told == {f"vision.{name}" for name in model.vision.state_dict()}
        bias = model.vision.blocks[2].attention.qkv.bias
        wanted = [given["blocks.2.attn.q_bias"], torch.zeros(width), given["blocks.2.attn.v_bias"]]
        assert torch.equal(bias, torch.cat(wanted))

    def test_bert_gives_its_feed_forward_twice(self, small_blip2: MakeBlip2, tmp_path: Path) -> None:
        from transformers import BertConfig, BertForPreTraining

        model = small_blip2()
        words = model.config.text.dec
        bert = BertForPreTraining(
            BertConfig(
                vocab_size=words,
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=70,
            )
        )
        bert.save_pretrained(tmp_path)
        before = model.text.words.weight[words:].clone()
        told = initialise(model, text=str(tmp_path))
        layer, given = model.text.layers[1], bert.bert.encoder.layer[1]
        for part in (layer.feed_forward, layer.query_feed_forward):
            assert torch.equal(part.block.up.weight, given.intermediate.dense.weight)
            assert torch.equal(part.norm.bias, given.output.LayerNorm.bias)
        assert torch.equal(layer.self_attention.block.key.weight, given.attention.self.key.weight)
        assert torch.equal(model.text.words.weight[:words], bert.bert.embeddings.word_embeddings.weight)
        assert torch.equal(model.text.words.weight[words:], before)
        assert torch.equal(model.text.norm.weight, bert.bert.embeddings.LayerNorm.weight)
        fresh = {
            name.split(".")[-4 if "cross" in name else 0]
            for name in model.state_dict().keys() - told
            if name.startswith("text.")
        }
        assert all(
            "cross_attention" in n or n == "text.query_tokens"
            for n in model.state_dict().keys() - told
            if n.startswith("text.")
        ), fresh
        stage2 = small_blip2("opt")
        assert not any("words" in name for name in initialise(stage2, text=str(tmp_path)))
        wrong = small_blip2(vocab_size=words + 9)
        with pytest.raises(ModelError, match=rf"the model {words + 8} beside \[DEC\]: set model.text.vocab_size="):
            initialise(wrong, text=str(tmp_path))

    def test_the_second_stage_grows_out_of_the_first(self, small_blip2: MakeBlip2, tmp_path: Path) -> None:
        first, other = small_blip2(seed=3), small_blip2("opt", seed=4)
        store.save(first, tmp_path / "first")
        other.language.model.save_pretrained(tmp_path / "opt")
        second = store.load_continued(tmp_path / "first", other.config)
        assert {p.is_meta for p in second.language.parameters()} == {True}, "nobody has said which"
        assert not any(p.is_meta for name, p in second.named_parameters() if not name.startswith("language."))
        initialise(second, language=str(tmp_path / "opt"))
        for name, tensor in second.state_dict().items():
            if name.startswith("language."):
                assert torch.equal(tensor, other.state_dict()[name]), name
            elif not name.startswith("language_projection"):
                assert torch.equal(tensor, first.state_dict()[name]), name
        store.save(second, tmp_path / "second")
        assert same(store.load_continued(tmp_path / "second", other.config), second)
        with pytest.raises(ModelError, match="has no language model: leave it out"):
            initialise(first, language=str(tmp_path / "opt"))
