"""VLMo's passes: images as transformers' BEiT reads them, texts and pairs as the formulas say, sizes as published."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models import architecture_of, blank, build
from capfilt.models.checkpoints.initial_weights import initialise
from capfilt.models.vlmo.blocks import image_index, joint_index, resize_relative, text_index
from capfilt.models.vlmo.config import VlmoConfig
from capfilt.models.vlmo.model import Vlmo

TINY = architecture_of("vlmo/tiny")


def tiny(**changes: object) -> Vlmo:
    torch.manual_seed(0)
    model = build(TINY.changed(**changes))
    assert isinstance(model, Vlmo)
    with torch.no_grad():  # nothing stays at a value that hides it
        for p in model.parameters():
            if p.ndim < 2 or p.abs().max() == 0:
                p.add_(torch.randn_like(p) * 0.3)
        if model.relative is not None:
            model.relative.table.normal_()
    return model.eval()


@pytest.fixture
def texts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(5, 190, (3, 7))
    ids[1, 4:] = 0
    return ids, (ids != 0).long()


@pytest.mark.parametrize(
    ("name", "trunk", "public", "whole"),
    [
        ("base", 151_792_128, 175_430_496, 202_445_470),
        ("base-plus", 149_938_368, 166_567_360, 184_980_734),
        ("large", 529_810_432, 561_544_448, 599_127_102),
    ],
)
def test_sizes_are_the_published_ones(name: str, trunk: int, public: int, whole: int) -> None:
    model = blank(architecture_of(f"vlmo/{name}"))
    sizes: dict[str, int] = {}
    for key, p in model.named_parameters():
        sizes[key.partition(".")[0]] = sizes.get(key.partition(".")[0], 0) + p.numel()
    blocks = sum(sizes.get(part, 0) for part in ("cls", "patches", "positions", "blocks", "norm"))
    assert blocks == trunk
    assert blocks + sizes["text"] + sizes["modality"] + sizes.get("relative", 0) == public, "175, 167, 562 M"
    assert sum(sizes.values()) == whole


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "in memory"])
def test_an_image_is_read_as_beit_reads_it(saved: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from transformers import BeitConfig, BeitModel

    torch.manual_seed(2)
    beit = BeitModel(
        BeitConfig(
            image_size=32,
            patch_size=8,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=256,
            layer_norm_eps=1e-6,
            layer_scale_init_value=0.1,
            use_relative_position_bias=True,
            use_mean_pooling=False,
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        for p in beit.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    if saved:
        beit.save_pretrained(tmp_path)
    else:
        torch.save(beit.state_dict(), tmp_path / "beit.bin")
    model = tiny()
    filled = initialise(model, vision=str(tmp_path if saved else tmp_path / "beit.bin"))
    assert "relative.table" in filled
    assert not any(".text." in name for name in filled)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        model.modality.weight[1] = 0  # BEiT has none
        ours, _ = model.run(model.encode_image(images), "image", 0)
        torch.testing.assert_close(ours, beit(images).last_hidden_state, atol=1e-5, rtol=0)


def by_hand(model: Vlmo, x: Tensor, experts: list[list[str]], bias_rows: Tensor, seen: Tensor) -> Tensor:
    """A pass over one sequence [N, D], written out: `experts[i][n]` reads row n in block i."""
    heads, depth = model.config.vision.heads, len(model.blocks)
    for i, block in enumerate(model.blocks):
        attention = block.attention
        normed = block.attention_norm(x)
        q, k, v = (normed @ w.T for w in attention.qkv.weight.chunk(3))
        q, v = q + attention.query_bias, v + attention.value_bias
        width = x.shape[1] // heads
        mixed = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            scores = q[:, part] @ k[:, part].T / width**0.5
            if model.relative is not None:
                assert model.relative.table.shape[1] == heads * depth
                scores = scores + model.relative.table[bias_rows, i * heads + h]
            scores[:, ~seen] = -torch.inf
            mixed.append(scores.softmax(1) @ v[:, part])
        x = x + block.attention_scale * attention.out(torch.cat(mixed, 1))
        x = torch.stack(
            [row + block.expert_scale * block.experts[e](row) for row, e in zip(x, experts[i], strict=True)]
        )
    out: Tensor = model.norm(x)
    return out


@torch.no_grad()
def test_experts_read_their_own_rows_and_padding_is_not_seen(texts: tuple[Tensor, Tensor]) -> None:
    model = tiny()
    ids, mask = texts
    tokens = model.encode_image(torch.randn(3, 3, 32, 32))
    N, T = tokens.shape[1], ids.shape[1]
    fused = model.fuse(ids, mask, model.image_context(tokens, "encoder"))
    alone, tail = model.run(model.embed_text(ids), "text", T, mask.bool(), tail=True)
    for b in range(3):
        seen = torch.cat([mask[b].bool(), torch.ones(N, dtype=torch.bool)])
        x = torch.cat([model.embed_text(ids[b : b + 1])[0], tokens[b]])
        both = [["text"] * T + ["image"] * N] * 2 + [["fused"] * (T + N)] * 2
        expected = by_hand(model, x, both, joint_index(T, 64, 4), seen)
        torch.testing.assert_close(fused[b][seen], expected[seen], atol=2e-5, rtol=1e-4)
        rows = text_index(T, 64, 4)
        for given, last in ((alone, "text"), (tail, "fused")):
            assert given is not None
            ways = [["text"] * T] * 2 + [[last] * T] * 2
            expected = by_hand(model, x[:T], ways, rows, mask[b].bool())
            torch.testing.assert_close(given[b][mask[b].bool()], expected[mask[b].bool()], atol=2e-5, rtol=1e-4)
    longer = F.pad(ids, (0, 20)), F.pad(mask, (0, 20))
    again = model.fuse(*longer, model.image_context(tokens, "encoder"))
    torch.testing.assert_close(again[:, 0], fused[:, 0], atol=1e-5, rtol=1e-4)
    lengths, counts = mask.sum(1).tolist(), [2, 1]
    image = model.image_context(tokens[:2], "encoder")
    quick = model.fuse_cls(ids, lengths, image, counts)
    slow = model.fuse(ids, mask, image.select(torch.tensor([0, 0, 1])))
    torch.testing.assert_close(quick, slow[:, :1], atol=1e-5, rtol=1e-4)


def test_rows_of_the_table_are_those_of_the_public_file() -> None:
    joint = joint_index(40, 196, 14)
    assert joint.shape == (237, 237)
    assert joint.max() == 1125, "1,126 rows"
    assert joint[:40, 40:].unique().tolist() == [732], "text to image"
    assert joint[40:, :40].unique().tolist() == [733], "image to text"
    assert joint[0, :40].tolist() == [1125] + [1123] * 39
    assert joint[1:40, 0].unique().tolist() == [1124]
    # Text offsets are key - query, image offsets query - key; offset 0 is the middle.
    assert joint[1, 1:4].tolist() == [734 + 194, 734 + 195, 734 + 196]
    assert joint[41, 41:44].tolist() == [364, 363, 362]
    assert joint[41, 40 + 1 + 14] == 364 - 27, "the patch below"
    assert joint[40, 40:].tolist() == [731] + [729] * 196
    assert torch.equal(joint[40:, 40:], image_index(14))


@pytest.mark.parametrize(("old", "new"), [(4, 6), (6, 4), (2, 3)])
def test_a_table_is_stretched_by_a_cubic_spline(old: int, new: int) -> None:
    scipy = pytest.importorskip("scipy.interpolate")
    torch.manual_seed(3)
    side = 2 * old - 1
    table = torch.randn(side**2 + 3 + 10, 3)
    resized = resize_relative(table, new, 10)
    assert torch.equal(resized[-13:], table[-13:])
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (side // 2)) / (1 - q) > (2 * new - 1) // 2:
            high = q
        else:
            low = q
    distances, step = [], 1.0
    for i in range(side // 2):
        distances.append(step)
        step += q ** (i + 1)
    places = [-d for d in reversed(distances)] + [0.0, *distances]
    wanted = torch.arange(-(new - 1), new).numpy()
    degree = 3 if side > 3 else 1
    for c in range(3):
        grid = table[: side**2, c].view(side, side).double().numpy()
        spline = scipy.RectBivariateSpline(places, places, grid, kx=degree, ky=degree)
        expected = torch.from_numpy(spline(wanted, wanted)).flatten().float()
        torch.testing.assert_close(resized[:-13, c], expected, atol=1e-5, rtol=1e-5)


def test_positions_of_base_plus_are_absolute(texts: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = build(TINY.changed(relative_positions=False, layer_scale=None)).eval()
    assert isinstance(model, Vlmo)
    assert model.relative is None
    assert {name for name in model.state_dict() if "position" in name} == {"positions", "text.positions.weight"}
    ids, mask = texts
    before = model.encode_text(ids, mask)
    with torch.no_grad():
        model.text.positions.weight.normal_()
    assert not torch.allclose(model.encode_text(ids, mask), before)
    relative = tiny()
    before = relative.encode_text(ids, mask)
    with torch.no_grad():
        relative.text.positions.weight.normal_()
    torch.testing.assert_close(relative.encode_text(ids, mask), before), "there for checkpoints alone"


def test_dropped_branches_and_recomputed_blocks(texts: tuple[Tensor, Tensor]) -> None:
    ids, mask = texts
    model = tiny(drop_path=0.5).train()
    tokens = model.encode_image(torch.randn(3, 3, 32, 32))
    losses, grads = [], []
    for blocks in (0, 2):
        model.recompute_vision(blocks)
        torch.manual_seed(5)
        loss = model.match(model.fuse(ids, mask, model.image_context(tokens, "encoder"))).square().sum()
        grads.append(torch.autograd.grad(loss, model.blocks[3].experts["fused"].norm.weight)[0])
        losses.append(loss.detach())
    assert losses[0] == losses[1]
    torch.testing.assert_close(grads[0], grads[1])
    torch.manual_seed(6)
    other = model.match(model.fuse(ids, mask, model.image_context(tokens, "encoder"))).square().sum()
    assert other != losses[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"image_size": 30}, "image_size 30 is not a multiple of patch_size 8"),
        ({"heads": 3}, "width 64 is not a multiple of heads 3"),
        ({"fused": 4}, "fused 4 must be less than depth 4"),
    ],
)
def test_impossible_architectures_are_refused(change: dict[str, object], why: str) -> None:
    assert isinstance(TINY, VlmoConfig)
    with pytest.raises(ValueError, match=why):
        VlmoConfig.model_validate(
            {"vision": TINY.vision.model_dump() | change, "text": TINY.text.model_dump(), "family": "vlmo"}
        )
