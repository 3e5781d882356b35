from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from capfilt import config as configs
from capfilt import presets
from capfilt.models import FAMILIES, Blip, BlipConfig, blank
from capfilt.models.blip.model import replace_first
from capfilt.models.layers.bert import TextTransformer
from capfilt.models.layers.image_context import ImageContext

MakeBlip = Callable[..., Blip]
IDS = torch.tensor([[2, 10, 11, 12, 13, 3], [2, 20, 21, 3, 0, 0], [2, 9, 8, 7, 3, 0], [2, 5, 3, 0, 0, 0]])
MASK = (IDS != 0).long()


def preset(name: str) -> BlipConfig:
    return configs.read(presets.find("models", name), FAMILIES[name.partition("/")[0]].config)


def weights_of(config: BlipConfig) -> int:
    return sum(p.numel() for p in blank(config).parameters())


def changed(config: BlipConfig, image_size: int = 224, **text: object) -> BlipConfig:
    vision = config.vision.model_copy(update={"image_size": image_size})
    return config.model_copy(update={"vision": vision, "text": config.text.model_copy(update=text)})


class TestParameters:
    """Counts of the paper's Table 3, of the public checkpoints, and of the same models in transformers."""

    @pytest.mark.parametrize(
        ("share", "count"),
        [
            ("all", 224_075_071),
            ("all_but_cross_attention", 252_441_919),
            ("all_but_self_attention", 252_441_919),
            ("none", 361_333_567),
        ],
    )
    def test_of_each_way_to_share(self, share: str, count: int) -> None:
        assert weights_of(changed(preset("blip/base"), share=share)) == count

    def test_of_the_large_model(self) -> None:
        assert weights_of(preset("blip/large")) == 474_729_023

    def test_of_a_captioner_at_384(self) -> None:
        assert weights_of(changed(preset("blip/base"), 384, roles=("decoder",))) == 223_971_644
        assert weights_of(changed(preset("blip/large"), 384, roles=("decoder",))) == 446_290_492

    def test_of_a_retrieval_model_at_384(self) -> None:
        temperature = 1
        assert weights_of(changed(preset("blip/base"), 384, roles=("encoder",))) == 223_744_258 + temperature

    @pytest.mark.parametrize(("name", "count"), [("blip/base", 85_798_656), ("blip/large", 303_301_632)])
    def test_of_the_vision_towers(self, name: str, count: int) -> None:
        with torch.device("meta"):
            assert sum(p.numel() for p in Blip(preset(name)).vision.parameters()) == count


class TestPresets:
    @pytest.mark.parametrize("name", presets.names("models"))
    def test_each_loads_and_builds(self, name: str) -> None:
        config = preset(name)
        assert config.family == name.partition("/")[0]
        assert all(p.device.type == "meta" for p in blank(config).parameters())

    @pytest.mark.parametrize("family", FAMILIES)
    def test_each_family_has_a_tiny_one(self, family: str) -> None:
        assert weights_of(preset(f"{family}/tiny")) < 1_000_000

    def test_the_paper_s_values_not_those_of_transformers(self) -> None:
        base, large = preset("blip/base"), preset("blip/large")
        for config in (base, large):
            text = config.text
            assert (text.width, text.depth, text.heads, text.hidden, text.max_positions) == (768, 12, 12, 3072, 512)
            assert (text.dropout, text.layer_norm_eps, text.vocab_size) == (0.1, 1e-12, 30524)
            assert (text.dec, text.enc, text.share) == (30522, 30523, "all_but_self_attention")
            assert (config.projection, config.temperature, config.vision.layer_norm_eps) == (256, 0.07, 1e-6)
            assert config.vision.image_size == 224
        assert (base.vision.width, base.vision.depth, base.vision.heads, base.vision.drop_path) == (768, 12, 12, 0)
        assert (large.vision.width, large.vision.depth, large.vision.heads, large.vision.drop_path) == (
            1024,
            24,
            16,
            0.1,
        )


class TestFirstToken:
    def keys(self, model: Blip, role: str) -> ImageContext:
        return model.image_context(torch.randn(4, 5, 24, generator=torch.Generator().manual_seed(3)), role)  # type: ignore[arg-type]

    def test_is_replaced_in_a_copy(self) -> None:
        ids = IDS.clone()
        assert replace_first(ids, 99)[:, 0].tolist() == [99] * 4
        assert torch.equal(replace_first(ids, 99)[:, 1:], IDS[:, 1:])
        assert torch.equal(ids, IDS)

    def test_matching_reads_enc_and_not_cls(self, small_blip: MakeBlip) -> None:
        model = small_blip()
        keys = self.keys(model, "encoder")
        by_hand = IDS.clone()
        by_hand[:, 0] = model.config.text.vocab_size - 1
        assert torch.equal(model.fuse(IDS, MASK, keys), model.text(by_hand, "encoder", MASK, keys))
        with_cls = model.match(model.text(IDS, "encoder", MASK, keys))
        assert not torch.allclose(model.match(model.fuse(IDS, MASK, keys)), with_cls, atol=1e-3)

    def test_writing_begins_with_dec(self, small_blip: MakeBlip) -> None:
        model = small_blip()
        keys = self.keys(model, "decoder")
        by_hand = IDS.clone()
        by_hand[:, 0] = model.config.text.vocab_size - 2
        wanted = model.text.logits(model.text(by_hand, "decoder", MASK, keys))
        assert torch.equal(model.decode(IDS, MASK, keys), wanted)

    def test_a_text_on_its_own_keeps_cls(self, small_blip: MakeBlip) -> None:
        model = small_blip()
        assert torch.equal(model.encode_text(IDS, MASK), model.text(IDS, "encoder", MASK))


def test_grouped_texts_are_fused_as_if_images_were_repeated(small_blip: MakeBlip) -> None:
    model = small_blip()
    tokens = torch.randn(2, 5, 24)
    grouped = model.fuse(IDS, MASK, model.image_context(tokens, "encoder"))
    repeated = model.fuse(IDS, MASK, model.image_context(tokens.repeat_interleave(2, dim=0), "encoder"))
    torch.testing.assert_close(grouped, repeated, atol=5e-6, rtol=0)
    written = model.decode(IDS, MASK, model.image_context(tokens, "decoder"))
    again = model.decode(IDS, MASK, model.image_context(tokens.repeat_interleave(2, dim=0), "decoder"))
    torch.testing.assert_close(written, again, atol=5e-6, rtol=0)


def test_what_is_fused_depends_on_the_image(small_blip: MakeBlip) -> None:
    model = small_blip()
    logits = [
        model.match(model.fuse(IDS, MASK, model.image_context(torch.randn(4, 5, 24), "encoder"))) for _ in range(2)
    ]
    assert not torch.allclose(*logits, atol=1e-3)


def test_projections_are_unit_vectors_of_the_first_token(small_blip: MakeBlip) -> None:
    model = small_blip()
    tokens, states = model.encode_image(torch.randn(4, 3, 16, 16)), model.encode_text(IDS, MASK)
    for found, layer, source in (
        (model.project_image(tokens), model.image_projection, tokens),
        (model.project_text(states), model.text_projection, states),
    ):
        raw = layer(source[:, 0])
        torch.testing.assert_close(found, raw / raw.square().sum(dim=1, keepdim=True).sqrt())
        torch.testing.assert_close(found.norm(dim=1), torch.ones(4))


def test_projections_stay_fp32_under_autocast(small_blip: MakeBlip) -> None:
    model = small_blip()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.project_text(model.encode_text(IDS, MASK))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("roles", "can"),
    [
        (("encoder", "decoder"), {"encode_image", "encode_text", "fuse", "decode"}),
        (("encoder",), {"encode_image", "encode_text", "fuse"}),
        (("decoder",), {"encode_image", "decode"}),
    ],
)
def test_verbs_follow_from_the_roles(small_blip: MakeBlip, roles: tuple[str, ...], can: set[str]) -> None:
    model = small_blip(roles=roles)
    assert model.capabilities == can
    assert hasattr(model, "match_head") == ("fuse" in can)
    assert (model.text.head is not None) == ("decode" in can)


@pytest.mark.parametrize(
    ("share", "shared"),
    [("all", True), ("all_but_cross_attention", False), ("all_but_self_attention", True), ("none", False)],
)
def test_image_keys_serve_both_roles_where_cross_attention_is_shared(
    small_blip: MakeBlip, share: str, shared: bool
) -> None:
    model = small_blip(share=share)
    tokens = torch.randn(1, 5, 24)
    same = all(
        torch.equal(a, b)
        for a, b in zip(
            model.image_context(tokens, "encoder").tensors, model.image_context(tokens, "decoder").tensors, strict=True
        )
    )
    assert model.shares_image_context == same == shared


def test_the_stack_is_bert_s_layer_by_layer(small_blip: MakeBlip) -> None:
    """Post-norm: attend, add, normalise; then the image; then feed forward."""
    model = small_blip(share="all")
    text: TextTransformer = model.text
    ids, mask, image = IDS[:1], MASK[:1], torch.randn(1, 5, 24)
    embed = text.embeddings.of("encoder")
    x = embed.norm(embed.words.weight[replace_first(ids, model.config.text.enc)] + embed.positions.weight[:6])
    for layer in text.layers:
        for part, source in ((layer.self_attention, None), (layer.cross_attention, image)):
            block = part.of("encoder")
            own = block.block.keys_values(x if source is None else source)
            x = block.norm(x + block.block(x, own))
        block = layer.feed_forward.of("encoder")
        x = block.norm(x + block.block(x))
    torch.testing.assert_close(model.fuse(ids, mask, model.image_context(image, "encoder")), x, atol=1e-6, rtol=0)
