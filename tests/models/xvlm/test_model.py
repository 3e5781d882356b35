"""X-VLM's towers and fusion layers beside transformers', and its regions beside the parts that they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capfilt.models import architecture_of, blank, build
from capfilt.models.layers.config import SwinConfig
from capfilt.models.layers.swin import SwinTransformer
from capfilt.models.xvlm.checkpoint import XvlmTh, join_clip, swin_names, vision_names
from capfilt.models.xvlm.config import RegionVitConfig, XvlmConfig
from capfilt.models.xvlm.model import Regions, RegionVit, Xvlm

VIT = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "hidden": 64}


@pytest.fixture
def model() -> Xvlm:
    torch.manual_seed(0)
    model = build(architecture_of("xvlm/tiny"))
    assert isinstance(model, Xvlm)
    return model.eval()


@pytest.fixture
def texts() -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    torch.manual_seed(1)
    return torch.randint(5, 190, (2, 5)) * mask, mask


def test_parameters_of_the_published_size() -> None:
    model = blank(architecture_of("xvlm/base-swin-224"))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["vision"] == 86_743_224  # Swin-B without its classifier
    # BERT-base's masked-LM model, and cross-attention of six layers from 768 to 1024.
    cross = 2 * 768 * 769 + 2 * 768 * 1025 + 2 * 768
    assert counts["text"] == 109_514_298 + 6 * cross
    heads = 768 * 1536 + 1536 + 2 * 1536
    assert counts["match_head"] == heads + 1537 * 2
    assert counts["box_head"] == heads + 1537 * 4
    assert counts["image_projection"] + counts["text_projection"] == 1025 * 256 + 769 * 256
    assert round(sum(counts.values()) / 1e6) == 216  # the paper's figure
    large = blank(architecture_of("xvlm/base-swin-384"))
    assert large.config.image_size == 384
    assert large.state_dict()["vision.stages.0.blocks.0.attention.offsets"].shape == (23**2, 4)
    for name, vision in (("clip", 85_799_424), ("deit", 85_798_656)):  # transformers' CLIPVisionModel and ViTModel
        vit = blank(architecture_of(f"xvlm/base-{name}-224"))
        assert sum(p.numel() for p in vit.vision.parameters()) == vision  # type: ignore[union-attr]
        cross = 4 * 768 * 769 + 2 * 768
        assert sum(p.numel() for p in vit.text.parameters()) == 109_514_298 + 6 * cross  # type: ignore[union-attr]
        assert vit.config.image_grid == 14


@pytest.mark.parametrize(("depths", "side"), [((2, 2), 32), ((2, 2, 3), 96)])
def test_the_tower_is_transformers_swin(depths: tuple[int, ...], side: int) -> None:
    from transformers import SwinConfig as TheirConfig
    from transformers import SwinModel

    torch.manual_seed(0)
    heads = tuple(2**n for n in range(1, len(depths) + 1))
    config = SwinConfig(image_size=side, patch_size=4, embed=16, depths=depths, stage_heads=heads, init_std=0.3)
    ours = SwinTransformer(config).eval()
    theirs = SwinModel(
        TheirConfig(
            image_size=side,
            patch_size=4,
            embed_dim=16,
            depths=list(depths),
            num_heads=list(heads),
            window_size=config.window,
        ),
        add_pooling_layer=False,
    ).eval()
    theirs.load_state_dict(_hf(ours))
    pictures = torch.randn(2, 3, side, side)
    with torch.no_grad():
        tokens, expected = ours(pictures), theirs(pictures).last_hidden_state
    assert tokens.shape == (2, config.num_tokens, config.width)
    torch.testing.assert_close(tokens[:, 1:], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens[:, 0], expected.mean(dim=1), atol=1e-5, rtol=1e-5)


def test_a_vit_is_transformers_clip_and_its_last_blocks_see_regions_alone() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    theirs = CLIPVisionModel(CLIPVisionConfig(**shape, image_size=32, patch_size=8, hidden_act="quick_gelu")).eval()
    config = RegionVitConfig(
        image_size=32, patch_size=8, width=32, depth=3, heads=2, hidden=48, region_blocks=2,
        layer_norm_eps=1e-5, patch_bias=False, pre_norm=True, activation="quick_gelu",
    )  # fmt: skip
    ours = RegionVit(config).eval()
    renamed = dict[str, Tensor]()
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("vision_model.").removeprefix("embeddings.")
        name = name.replace("patch_embedding.", "patch_embed.").replace("position_embedding.", "pos_embed.")
        renamed[f"vision_encoder.{name}"] = torch.randn_like(tensor) / 5
    theirs.load_state_dict(dict(zip(theirs.state_dict(), renamed.values(), strict=True)))
    join_clip(renamed)
    ours.load_state_dict(
        {name.removeprefix("vision."): renamed[theirs] for name, (theirs,) in vision_names(config).items()}
    )
    images, seen = torch.randn(2, 3, 32, 32), torch.zeros(3, 17, dtype=torch.long)
    seen[0, [0, 1, 2, 5, 6]] = seen[1, [0, 16]] = seen[2] = 1
    with torch.no_grad():
        parts, whole = ours.encode_regions(images, torch.tensor([1, 0, 0]), seen)
        states = theirs(images, output_hidden_states=True).hidden_states
        norm = theirs.get_submodule(next(n for n, _ in theirs.named_modules() if n.endswith("post_layernorm")))
        expected = norm(states[-1])
        torch.testing.assert_close(ours(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(whole, expected[[1, 0, 0]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(parts[2], expected[0], atol=1e-5, rtol=1e-5)
        # What is in a region, run by itself through their last two layers.
        layers = [module for module in theirs.modules() if type(module).__name__ == "CLIPEncoderLayer"]
        for region, (image, tokens) in enumerate(((1, [0, 1, 2, 5, 6]), (0, [0, 16]))):
            x = states[1][image : image + 1, tokens]
            for layer in layers[1:]:
                x = layer(x, attention_mask=None)
                x = x[0] if isinstance(x, tuple) else x
            torch.testing.assert_close(parts[region, tokens], norm(x)[0], atol=1e-5, rtol=1e-5)


def _hf(tower: SwinTransformer) -> dict[str, Tensor]:
    """A tower's tensors by transformers' names."""
    state, renamed = tower.state_dict(), dict[str, Tensor]()
    for ours, (theirs,) in swin_names(tower.config, "", "").items():
        name = theirs
        for old, new in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"), ("patch_embed.norm", "embeddings.norm"),
            ("layers.", "encoder.layers."), (".norm1", ".layernorm_before"), (".norm2", ".layernorm_after"),
            ("attn.proj", "attention.o_proj"), ("attn.qkv", "attention.qkv"),
            ("attn.relative_position_bias_table", "attention.relative_position_bias.relative_position_bias_table"),
        ):  # fmt: skip
            name = name.replace(old, new)
        name = f"layernorm.{name.removeprefix('norm.')}" if name.startswith("norm.") else name
        if "attention.qkv" in name:
            for letter, part in zip("qkv", state[ours].chunk(3), strict=True):
                renamed[name.replace("qkv", f"{letter}_proj")] = part
        else:
            renamed[name] = state[ours]
    return renamed


def test_the_fusion_layers_are_those_of_blip(model: Xvlm, texts: tuple[Tensor, Tensor]) -> None:
    """transformers' BLIP drops the image's mask, of which whole images need none."""
    from transformers.models.blip.configuration_blip import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextLayer

    text = model.config.text
    config = BlipTextConfig(
        hidden_size=text.width,
        encoder_hidden_size=model.config.vision.width,
        num_attention_heads=text.heads,
        intermediate_size=text.hidden,
        layer_norm_eps=text.layer_norm_eps,
        is_decoder=True,
    )
    config._attn_implementation = "eager"
    layers = [BlipTextLayer(config, n).eval() for n in range(text.fusion_layer, text.depth)]
    state = model.state_dict()
    for n, layer in enumerate(layers, text.fusion_layer):
        prefix = f"text_encoder.bert.encoder.layer.{n}."
        layer.load_state_dict(
            {
                several[0].removeprefix(prefix): state[ours]
                for ours, several in XvlmTh().names(model.config).items()
                if several[0].startswith(prefix)
            }
        )
    ids, mask = texts
    with torch.no_grad():
        tokens = model.encode_image(torch.randn(2, 3, 32, 32))
        states = model.encode_text(ids, mask)
        fused = model.fuse_states(states, mask, model.image_context(tokens, "encoder"))
        hidden = (mask[:, None, None] == 0) * -1e30
        for layer in layers:
            out = layer(states, attention_mask=hidden, encoder_hidden_states=tokens)
            states = out[0] if isinstance(out, tuple) else out
    torch.testing.assert_close(fused[mask.bool()], states[mask.bool()], atol=1e-5, rtol=0)


def test_a_region_is_a_part_of_its_picture(model: Xvlm, texts: tuple[Tensor, Tensor]) -> None:
    """The mean of its tokens is its [CLS], and texts attend to nothing else of the picture."""
    ids, mask = texts
    seen = torch.zeros(2, 17, dtype=torch.long)
    seen[0, [0, 1, 2, 5, 6]] = 1
    seen[1] = 1
    regions = Regions(torch.tensor([1, 0]), seen)
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        parts, whole = model.encode_regions(pictures, regions)
        tokens = model.encode_image(pictures)
        torch.testing.assert_close(whole, tokens[[1, 0]])
        torch.testing.assert_close(parts[0, 0], tokens[1, [1, 2, 5, 6]].mean(dim=0))
        torch.testing.assert_close(parts[1], tokens[0])
        fused = model.fuse(ids, mask, model.region_context(parts, regions))
        kept = model.image_context(torch.cat([parts[:1, :1], tokens[1:, [1, 2, 5, 6]]], dim=1), "encoder")
        torch.testing.assert_close(fused[:1], model.fuse(ids[:1], mask[:1], kept))
        boxes = model.predict_box(model.fuse(ids, mask, model.image_context(whole, "encoder")))
    assert boxes.shape == (2, 4)
    assert ((boxes > 0) & (boxes < 1)).all()


def test_logits_at_some_positions_are_those_of_all(model: Xvlm, texts: tuple[Tensor, Tensor]) -> None:
    ids, mask = texts
    with torch.no_grad():
        image = model.image_context(model.encode_image(torch.randn(2, 3, 32, 32)), "encoder")
        every, places = model.unmask(ids, mask, image), torch.tensor([[1, 3], [2, 0]])
        some = model.fuse_hidden(ids, mask, image, places)
        states = model.encode_text(ids, mask)
        torch.testing.assert_close(model.fuse_states(states, mask, image), model.fuse(ids, mask, image))
    torch.testing.assert_close(some, torch.stack([every[0, [1, 3]], every[1, [2, 0]]]))


def test_a_step_at_a_time_writes_what_reading_left_to_right_does() -> None:
    torch.manual_seed(0)
    config = architecture_of("xvlm/tiny")
    assert isinstance(config, XvlmConfig)
    assert config.capabilities == {"encode_image", "encode_text", "fuse", "unmask", "ground"}
    assert config.for_role("filter").capabilities == {"encode_image", "encode_text", "fuse"}
    writer = build(config.for_role("captioner")).eval()
    assert writer.capabilities == {"encode_image", "decode"}
    ids = torch.randint(5, 190, (2, 4))
    with torch.no_grad():
        image = writer.image_context(writer.encode_image(torch.randn(2, 3, 32, 32)), "decoder")
        whole, cache = writer.decode(ids, None, image), writer.cache(2, 4, image)
        for t in range(4):
            step = writer.decode_step(ids[:, t : t + 1], image, cache)
            torch.testing.assert_close(step, whole[:, t])


def test_recomputed_blocks_give_the_same_gradients(model: Xvlm) -> None:
    model.train()
    pictures, gradients = torch.randn(2, 3, 32, 32), list[Tensor]()
    for blocks in (0, 3):
        model.zero_grad()
        model.recompute_vision(blocks)
        model.encode_image(pictures).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.vision.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"image_size": 36}, "image_size 36 is not a multiple of 8"),
        ({"stage_heads": [1, 5]}, "stage 1 is 64 wide, not a multiple of its 5 heads"),
        ({"stage_heads": [1]}, "stage_heads has 1 stages and depths 2"),
        ({**VIT, "image_size": 30}, "image_size 30 is not a multiple of patch_size 8"),
        ({**VIT, "region_blocks": 3}, "region_blocks is 3, and the tower has 2 blocks"),
        ({**VIT, "embed": 32}, r"vision\.RegionVitConfig\.embed"),
    ],
)
def test_what_cannot_be_built_is_said(vision: dict[str, object], said: str) -> None:
    tiny = architecture_of("xvlm/tiny").model_dump()
    below = {} if "width" in vision else tiny["vision"]
    with pytest.raises(ValueError, match=said):
        XvlmConfig.model_validate({**tiny, "vision": {**below, **vision}})
