"""VLMo's `.pt` in and out, in its three envelopes, of all stages, and from one stage to the next."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from capfilt.errors import ModelError
from capfilt.models import architecture_of, build
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.initial_weights import initialise
from capfilt.models.vlmo.checkpoint import VlmoPt
from capfilt.models.vlmo.config import VlmoConfig
from capfilt.models.vlmo.model import Vlmo
from capfilt.training.config import OptimizerConfig
from capfilt.training.optimizer import make_optimizer

CONSTANTS = {"relative_position_index", "text_relative_position_index", "text_imag_relative_position_index"}


def small(**changes: object) -> Vlmo:
    """Two heads of 32, and a table for texts of 196, as a file's shapes are read."""
    torch.manual_seed(0)
    config = architecture_of("vlmo/tiny").changed(longest=196, depth=3, fused=1, **changes)
    model = Vlmo(VlmoConfig.model_validate(config.model_dump()))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def written(model: Vlmo) -> dict[str, Any]:
    return VlmoPt().write(model.config, model.state_dict())


SHAPES: dict[str, dict[str, object]] = {
    "pairs": {},
    "texts": {"max_positions": 196, "outputs": ("mlm",)},
    "retrieval": {"outputs": ("itc",)},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("envelope", ["state_dict", "module", "model", "flat"])
def test_a_file_is_read_in_every_envelope(envelope: str, changes: dict[str, object], tmp_path: Path) -> None:
    model = small(**changes)
    tensors = written(model)
    assert tensors.keys() >= CONSTANTS
    if envelope == "module":
        tree: dict[str, Any] = {"module": {f"module.{name}": t for name, t in tensors.items()}, "global_steps": 3}
    else:
        tree = tensors if envelope == "flat" else {envelope: tensors, "epoch": 1}
    path = tmp_path / "model.pt"
    torch.save(tree, path)
    again = store.load(path)
    assert isinstance(again, Vlmo)
    unsaid = {"drop_path", "init_std", "layer_scale"}  # what only begins or regularises a training
    read = again.config.vision.model_dump(exclude=unsaid)
    assert read == model.config.vision.model_dump(exclude=unsaid)
    assert again.config.outputs == model.config.outputs
    assert again.config.text.max_positions == model.config.text.max_positions
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_base_plus_is_known_by_its_width(tmp_path: Path) -> None:
    config = architecture_of("vlmo/base-plus").changed(depth=2, fused=1, hidden=32, vocab_size=30)
    torch.manual_seed(0)
    model = Vlmo(VlmoConfig.model_validate(config.model_dump()))
    store.save_pth(model, tmp_path / "plus.pt")
    assert not torch.load(tmp_path / "plus.pt", weights_only=True)["state_dict"].keys() & CONSTANTS
    (tmp_path / "plus.yaml").unlink()
    read = store.architecture(tmp_path / "plus.pt")
    assert isinstance(read, VlmoConfig)
    assert (read.vision.heads, read.vision.relative_positions, read.vision.layer_scale) == (16, False, None)
    assert read.image_size == 224


def test_there_and_back_with_a_yaml_beside(tmp_path: Path) -> None:
    model = build(architecture_of("vlmo/tiny"))
    store.save_pth(model, tmp_path / "model.pt")
    again = store.load(tmp_path / "model.pt")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert store.left_behind(tmp_path / "model.pt") == {
        "constants, the table's rows by pairs of tokens": 3,
        "a constant, 0, 1, 2, ...": 1,
    }


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors, path = written(small()), tmp_path / "model.pt"
    more = {**tensors, "vqa_classifier.0.weight": torch.zeros(1)}
    less = {name: t for name, t in tensors.items() if name != "transformer.blocks.1.mlp_text.fc2.bias"}
    for tree, why in (
        (more, r"1 unexpected: vqa_classifier\.0\.weight"),
        (less, r"1 missing: transformer\.blocks\.1\.mlp_text\.fc2\.bias"),
        ({"state_dict": tensors, "hyper_parameters": argparse.Namespace(a=1)}, "save its state_dict alone"),
    ):
        torch.save(tree, path)
        with pytest.raises(ModelError, match=why):
            store.load(path)


def test_texts_of_196_go_on_as_pairs_with_40(tmp_path: Path) -> None:
    texts = small(max_positions=196, outputs=("mlm",))
    torch.save({"state_dict": written(texts)}, tmp_path / "texts.pt")
    config = VlmoConfig.model_validate(
        architecture_of("vlmo/tiny")
        .changed(longest=196, depth=3, fused=2, max_positions=40, image_size=48)
        .model_dump()
    )
    model = store.load_continued(tmp_path / "texts.pt", config)
    assert isinstance(model, Vlmo)
    old, new = texts.state_dict(), model.state_dict()
    assert torch.equal(new["text.positions.weight"], old["text.positions.weight"][:40])
    assert torch.equal(new["relative.table"][11**2 :], old["relative.table"][7**2 :])
    assert torch.equal(new["mlm_head.bias"], old["mlm_head.bias"])
    assert torch.equal(new["blocks.2.experts.fused.norm.weight"], old["blocks.2.experts.fused.norm.weight"])
    assert new["blocks.1.experts.fused.norm.weight"].unique().tolist() == [1.0], "fresh"
    with torch.no_grad():
        ids = torch.tensor([[1, 7, 9, 2]])
        torch.testing.assert_close(model.eval().encode_text(ids, ids), texts.encode_text(ids, ids))
    del old["blocks.0.experts.text.norm.weight"]
    with pytest.raises(ModelError, match=r"1 missing: blocks\.0\.experts\.text\.norm\.weight"):
        from capfilt.models.vlmo.checkpoint import continued

        continued(config, texts.config, old, "here")


def test_a_vit_fits_where_positions_are_absolute(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(1)
    vit = ViTModel(
        ViTConfig(
            image_size=32,
            patch_size=8,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=256,
            layer_norm_eps=1e-6,
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    vit.save_pretrained(tmp_path)
    model = build(architecture_of("vlmo/tiny").changed(relative_positions=False, layer_scale=None)).eval()
    assert isinstance(model, Vlmo)
    assert "positions" in initialise(model, vision=str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.modality.weight[1] = 0
        ours, _ = model.run(model.encode_image(images), "image", 0)
        torch.testing.assert_close(ours, vit(images).last_hidden_state, atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match=r"has no relative positions .* vision\.relative_positions=false"):
        initialise(build(architecture_of("vlmo/tiny")), vision=str(tmp_path))


def test_the_weights_that_decay_are_those_of_the_released_code() -> None:
    model = small()
    spared_names = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")  # it matches these
    theirs = {ours: several[0] for ours, several in VlmoPt().names(model.config).items()}
    wanted = {ours for ours, name in theirs.items() if not any(part in name for part in spared_names)}
    optimizer = make_optimizer(model, OptimizerConfig(decay_vectors=False, decay_scalars=True))
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in decaying} == wanted
    assert {"blocks.0.attention_scale", "blocks.0.experts.text.norm.weight", "logit_scale", "cls"} <= wanted
    assert not {"relative.table", "norm.weight", "blocks.0.attention.query_bias"} & wanted
