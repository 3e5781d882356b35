"""X-VLM's `.th` in and out, of a pretraining, a fine-tuning and a captioner; other picture sizes; Swin, CLIP, BERT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.models import build
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.initial_weights import initialise
from capfilt.models.layers.config import FusionTextConfig, SwinConfig
from capfilt.models.layers.relative_positions import resize_offsets
from capfilt.models.layers.vit import resize_positions
from capfilt.models.xvlm.checkpoint import swin_names
from capfilt.models.xvlm.config import RegionVitConfig, XvlmConfig
from capfilt.models.xvlm.model import Xvlm

SWIN = SwinConfig(image_size=32, patch_size=4, embed=16, depths=(2, 2), stage_heads=(1, 2))
DEIT = RegionVitConfig(image_size=32, patch_size=8, width=64, depth=4, heads=1, hidden=96)
OF_CLIP = {"layer_norm_eps": 1e-5, "patch_bias": False, "pre_norm": True, "activation": "quick_gelu"}
CLIP = DEIT.model_copy(update=OF_CLIP)


def small(vision: SwinConfig | RegionVitConfig = SWIN, **text: object) -> Xvlm:
    """Heads of the text stack and of a ViT are 64 wide, as a file's shapes are read."""
    torch.manual_seed(0)
    return Xvlm(
        XvlmConfig(
            vision=vision,
            text=FusionTextConfig(
                vocab_size=30, width=64, depth=2, heads=1, hidden=96, fusion_layer=1, max_positions=9
            ).model_copy(update=text),
            projection=8,
        )
    )


def saved(model: Xvlm, path: Path, wrapped: bool = True, **more: Tensor) -> Path:
    """As X-VLM's own code writes it: with the constants of Swin, and with or without `model` around it."""
    store.save_pth(model, path)
    tensors = torch.load(path, weights_only=True)["model"]
    place = "vision_encoder.layers.0.blocks.1."
    if isinstance(model.config.vision, SwinConfig):
        names = f"{place}attn_mask", f"{place}attn.relative_position_index"
        tensors |= {names[0]: torch.zeros(4, 16, 16), names[1]: torch.zeros(16)}
    torch.save({"model": tensors | more} if wrapped else tensors | more, path)
    return path


@pytest.mark.parametrize(
    "text",
    [{}, {"roles": ("encoder",)}, {"roles": ("decoder",)}, {"tie_lm_head": False}],
    ids=["pretrained", "fine-tuned", "captioner", "untied"],
)
@pytest.mark.parametrize("yaml", [True, False])
def test_there_and_back(text: dict[str, object], yaml: bool, tmp_path: Path) -> None:
    model = small(**text)
    path = saved(model, tmp_path / "model.th", wrapped=yaml)
    if not yaml:
        path.with_suffix(".yaml").unlink()
    again = store.load(path)
    # Of the width of projections that a captioner has not a file says nothing.
    assert again.config == (model.config if yaml else model.config.changed(projection=again.config.projection))
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    written = torch.load(path, weights_only=True)
    stack = {("encoder",): "text_encoder.", ("decoder",): "text_decoder.bert."}.get(
        model.config.text.roles, "text_encoder.bert."
    )
    assert f"{stack}embeddings.token_type_embeddings.weight" in (written["model"] if yaml else written)
    assert store.left_behind(path) == {"constants of Swin, which the picture size decides": 2}


@pytest.mark.parametrize("vision", [CLIP, DEIT], ids=["clip", "deit"])
@pytest.mark.parametrize("yaml", [True, False])
def test_a_vit_there_and_back(
    vision: RegionVitConfig, yaml: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small(vision)
    path = saved(model, tmp_path / "model.th", wrapped=yaml)
    if not yaml:
        path.with_suffix(".yaml").unlink()
    again = store.load(path)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert ("taken for quick_gelu" in caplog.text) == (vision.pre_norm and not yaml)
    larger = store.load(path, image_size=48)
    expected = resize_positions(model.state_dict()["vision.positions"], 48, 8)
    assert torch.equal(larger.state_dict()["vision.positions"], expected)


def test_a_key_too_many_and_one_too_few_are_named(tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "model.th", strange=torch.zeros(1))
    with pytest.raises(ModelError, match=r"does not fit the architecture: 1 unexpected: strange"):
        store.load(path)
    content = torch.load(path, weights_only=True)["model"]
    del content["strange"], content["bbox_head.3.weight"]
    torch.save(content, path)
    with pytest.raises(ModelError, match=r"1 missing: bbox_head\.3\.weight"):
        store.load(path)


def test_windows_of_another_picture_size_are_interpolated(tmp_path: Path) -> None:
    model = small()
    path = saved(model, tmp_path / "model.th")
    larger = store.load(path, image_size=56)
    name = "vision.stages.0.blocks.1.attention.offsets"
    known, resized = model.state_dict()[name], larger.state_dict()[name]
    assert resized.shape == (13**2, 1)
    torch.testing.assert_close(resized[13 * 6 + 6], known[7 * 3 + 3])  # no offset at all
    with torch.no_grad():
        assert larger.encode_image(torch.randn(1, 3, 56, 56)).shape == (1, 50, 32)


def test_offsets_are_interpolated_as_scipy_does() -> None:
    """BEiT's rule; its own code uses scipy's interp2d, which is gone, of the splines that RectBivariateSpline has."""
    interpolate = pytest.importorskip("scipy.interpolate", reason="scipy is not installed")
    table = torch.randn(13**2, 2)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**6) / (1 - q) > 11 else (q, high)
    near, at = list[float](), 1.0
    for n in range(6):
        near.append(at)
        at += q ** (n + 1)
    known = [*(-x for x in reversed(near)), 0.0, *near]
    wanted = list(range(-11, 12))
    resized = resize_offsets(table, 12)
    for head in range(2):
        spline = interpolate.RectBivariateSpline(known, known, table[:, head].view(13, 13).double().numpy())
        expected = torch.from_numpy(spline(wanted, wanted)).float().flatten()
        torch.testing.assert_close(resized[:, head], expected, atol=1e-5, rtol=1e-5)


def test_swin_and_bert_give_what_they_have(tmp_path: Path) -> None:
    """A Swin of its own code, trained with other windows, and a BERT with its head."""
    from transformers import BertConfig, BertForMaskedLM

    model = small()
    other = build(model.config.changed(image_size=24))
    state = other.state_dict()
    swin = {theirs[0]: state[ours] for ours, theirs in swin_names(other.config.vision, "vision.", "").items()}  # type: ignore[attr-defined]
    constants = {"layers.0.blocks.1.attn_mask": torch.zeros(1), "head.weight": torch.zeros(3, 32)}
    torch.save({"model": swin | constants}, tmp_path / "swin.pth")
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=30,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            intermediate_size=96,
            max_position_embeddings=20,
        )
    )
    bert.save_pretrained(tmp_path / "bert")
    filled = initialise(model, vision=str(tmp_path / "swin.pth"), text=str(tmp_path / "bert"))
    assert {name for name in model.state_dict() if name.startswith("vision.")} <= set(filled)
    assert torch.equal(model.state_dict()["vision.norm.weight"], swin["norm.weight"])
    table = "vision.stages.0.blocks.0.attention.offsets"
    torch.testing.assert_close(model.state_dict()[table], resize_offsets(state[table], 4))
    assert {name for name in model.fresh if not name.startswith("text.layers.1.cross_attention.")} == {
        *(f"{side}_projection.{end}" for side in ("image", "text") for end in ("weight", "bias")),
        *(f"{head}_head.{n}.{end}" for head in ("match", "box") for n in (0, 1, 3) for end in ("weight", "bias")),
        "temperature",
    }
    upper = "text.layers.1.feed_forward.shared.block.up.weight"
    assert torch.equal(model.state_dict()[upper], bert.state_dict()["bert.encoder.layer.1.intermediate.dense.weight"])


def test_a_clip_gives_its_vision_tower(tmp_path: Path) -> None:
    """Whichever format it is in; one of another activation is refused by what it says of itself."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 1, "intermediate_size": 96,
        "image_size": 24, "patch_size": 8, "hidden_act": "quick_gelu",
    }  # fmt: skip
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    text |= {"vocab_size": 40, "max_position_embeddings": 8, "hidden_act": "quick_gelu"}
    torch.manual_seed(1)
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    model = small(CLIP)
    filled = initialise(model, vision=str(tmp_path / "clip"))
    assert set(filled) == {name for name in model.state_dict() if name.startswith("vision.")}
    theirs, state = clip.state_dict(), model.state_dict()
    positions = theirs["vision_model.embeddings.position_embedding.weight"][None]
    torch.testing.assert_close(state["vision.positions"], resize_positions(positions, 32, 8))
    up = state["vision.blocks.3.feed_forward.up.weight"]
    assert torch.equal(up, theirs["vision_model.encoder.layers.3.mlp.fc1.weight"])
    with pytest.raises(ModelError, match=r"its vision\.activation is quick_gelu, here gelu"):
        initialise(small(CLIP.model_copy(update={"activation": "gelu"})), vision=str(tmp_path / "clip"))
