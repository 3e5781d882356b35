"""ALBEF's layers beside transformers' BERT and BLIP, and its quick paths beside the plain ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from capfilt.models import architecture_of, blank, build
from capfilt.models.albef.checkpoint import AlbefPth
from capfilt.models.albef.config import AlbefConfig
from capfilt.models.albef.model import Albef


@pytest.fixture
def model() -> Albef:
    torch.manual_seed(0)
    model = build(architecture_of("albef/tiny"))
    assert isinstance(model, Albef)
    return model.eval()


@pytest.fixture
def texts() -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    torch.manual_seed(1)
    return torch.randint(5, 190, (2, 5)) * mask, mask


def test_parameters_of_the_published_size() -> None:
    model = blank(architecture_of("albef/base"))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["vision"] == 85_844_736  # ViT-B/16 at 256 px without a head
    # BERT-base's masked-LM model, and cross-attention of six layers of 768.
    assert counts["text"] == 109_514_298 + 6 * (4 * 768 * 769 + 2 * 768)


def theirs(model: Albef) -> dict[str, Tensor]:
    """The tensors by BERT's names."""
    state = model.state_dict()
    return {
        several[0].removeprefix("text_encoder.bert."): state[ours]
        for ours, several in AlbefPth().names(model.config).items()
        if several[0].startswith("text_encoder.bert.")
    }


def test_the_text_layers_are_bert(model: Albef, texts: tuple[Tensor, Tensor]) -> None:
    from transformers import BertConfig, BertModel

    text = model.config.text
    bert = BertModel(
        BertConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.width,
            num_hidden_layers=text.fusion_layer,
            num_attention_heads=text.heads,
            intermediate_size=text.hidden,
            max_position_embeddings=text.max_positions,
            layer_norm_eps=text.layer_norm_eps,
        ),
        add_pooling_layer=False,
    ).eval()
    missing, _ = bert.load_state_dict(theirs(model), strict=False)
    assert not missing
    ids, mask = texts
    with torch.no_grad():
        expected = bert(ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(model.encode_text(ids, mask)[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


def test_the_fusion_layers_are_those_of_blip(model: Albef, texts: tuple[Tensor, Tensor]) -> None:
    """transformers' BLIP drops the image's mask, of which whole images need none."""
    from transformers.models.blip.configuration_blip import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    text = model.config.text
    blip = BlipTextModel(
        BlipTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.width,
            encoder_hidden_size=model.config.vision.width,
            num_hidden_layers=text.depth - text.fusion_layer,
            num_attention_heads=text.heads,
            intermediate_size=text.hidden,
            max_position_embeddings=text.max_positions,
            layer_norm_eps=text.layer_norm_eps,
        ),
        add_pooling_layer=False,
    ).eval()
    upper = {
        name.replace(f"layer.{n}.", f"layer.{n - text.fusion_layer}."): tensor
        for name, tensor in theirs(model).items()
        for n in range(text.fusion_layer, text.depth)
        if f"layer.{n}." in name
    }
    missing, _ = blip.encoder.load_state_dict(
        {name.removeprefix("encoder."): tensor for name, tensor in upper.items()}, strict=False
    )
    assert not missing
    ids, mask = texts
    with torch.no_grad():
        tokens = model.encode_image(torch.randn(2, 3, 32, 32))
        states = model.encode_text(ids, mask)
        fused = model.fuse_states(states, mask, model.image_context(tokens, "encoder"))
        expected = blip(
            encoder_embeds=states, attention_mask=mask, encoder_hidden_states=tokens, is_decoder=False
        ).last_hidden_state
    torch.testing.assert_close(fused[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


def test_all_ways_to_a_fused_state_agree(model: Albef, texts: tuple[Tensor, Tensor]) -> None:
    ids, mask = texts
    lengths = mask.sum(dim=1).tolist()
    with torch.no_grad():
        image = model.image_context(model.encode_image(torch.randn(2, 3, 32, 32)), "encoder")
        fused = model.fuse(ids, mask, image)
        states = model.encode_text(ids, mask)
        torch.testing.assert_close(model.fuse_states(states, mask, image), fused)
        torch.testing.assert_close(model.fuse_cls(ids, lengths, image, [1, 1])[:, 0], fused[:, 0])
        torch.testing.assert_close(model.encode_cls(ids, lengths)[:, 0], states[:, 0])


def test_an_image_mask_hides_tokens(model: Albef, texts: tuple[Tensor, Tensor]) -> None:
    ids, mask = texts
    with torch.no_grad():
        tokens = model.encode_image(torch.randn(2, 3, 32, 32))
        seen = torch.ones(2, 1, 1, tokens.shape[1], dtype=torch.bool)
        seen[:, :, :, 5:] = False
        part = model.image_context(tokens, "encoder")._replace(mask=seen)
        expected = model.fuse(ids, mask, model.image_context(tokens[:, :5], "encoder"))
        torch.testing.assert_close(model.fuse(ids, mask, part), expected)
        swapped = part.select(torch.tensor([1, 0]))
        torch.testing.assert_close(model.fuse(ids.flip(0), mask.flip(0), swapped), expected.flip(0))


def test_a_filter_guesses_no_words() -> None:
    config = architecture_of("albef/tiny")
    assert isinstance(config, AlbefConfig)
    assert "unmask" in config.capabilities
    assert config.for_role("filter").capabilities == {"encode_image", "encode_text", "fuse"}


def test_layers_of_which_none_fuses_are_refused() -> None:
    tiny = architecture_of("albef/tiny").model_dump()
    tiny["text"]["fusion_layer"] = 4
    with pytest.raises(ValueError, match="fusion_layer 4 leaves none of 4 layers to attend to images"):
        AlbefConfig.model_validate(tiny)
