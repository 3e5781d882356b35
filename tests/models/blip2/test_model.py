from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from capfilt import presets
from capfilt.models import Blip2, Blip2Config, blank, build, read_architecture
from capfilt.models.blip2 import transformers_config

MakeBlip2 = Callable[..., Blip2]


@pytest.fixture
def case() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 190, (2, 6), generator=draw)
    ids[1, 4:] = 0
    return torch.randn(2, 3, 16, 16, generator=draw), ids, (ids != 0).long()


@pytest.mark.parametrize(
    ("name", "trained"), [("blip2/pretrain", 186_705_470), ("blip2/opt-2.7b", 107_133_696), ("blip2/flan-t5-xl", None)]
)
def test_as_many_weights_as_published(name: str, trained: int | None) -> None:
    model = blank(read_architecture(presets.find("models", name)))
    assert isinstance(model, Blip2)
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == (trained or found)
    tower = [*model.vision.parameters(), *model.vision_norm.parameters()]
    assert sum(p.numel() for p in tower) == 985_952_256
    assert not any(p.requires_grad for p in model.vision.parameters())


@pytest.mark.parametrize(("set_to", "eps"), [(None, 1e-6), (1e-5, 1e-5)])
def test_the_norm_behind_the_tower_has_the_tower_s_epsilon_or_lavis(
    small_blip2: MakeBlip2, set_to: float | None, eps: float
) -> None:
    config = Blip2Config(**{**small_blip2(roles=("encoder",)).config.model_dump(), "vision_norm_eps": set_to})
    assert ("vision_norm_eps" in config.model_dump()) == (set_to is not None)
    model = build(config)
    assert isinstance(model, Blip2)
    assert model.vision_norm.eps == eps
    assert model.vision.blocks[0].attention_norm.eps == 1e-6
    # It travels through a folder of transformers, which has no such key.
    described = transformers_config.describe(config, 0.07)
    assert transformers_config.architecture(described, True, Path("folder")).vision_norm_eps == set_to


class TestFrozen:
    def test_towers_take_no_gradient_and_the_norm_behind_does(self, small_blip2: MakeBlip2, case: tuple) -> None:
        model = small_blip2("opt").train()
        assert not model.vision.training
        assert not any(module.training for module in model.language.modules())
        assert model.text.training
        images, ids, mask = case
        logits, labels = model.predict(model.encode_image(images), ids, mask, 1)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        given = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert {name.partition(".")[0] for name in given} == {"vision_norm", "text", "language_projection"}
        assert given == {n for n, p in model.named_parameters() if p.requires_grad}

    @pytest.mark.parametrize(("frozen", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
    def test_are_held_in_the_format_of_the_architecture(
        self, small_blip2: MakeBlip2, case: tuple, frozen: str, dtype: torch.dtype
    ) -> None:
        model = small_blip2("opt", frozen=frozen)
        assert model.vision.blocks[0].attention.qkv.weight.dtype == dtype
        assert {p.dtype for p in model.language.parameters()} == {dtype}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        tokens = model.encode_image(case[0])
        assert tokens.dtype == torch.float32
        exact = small_blip2("opt")
        exact.load_state_dict(model.state_dict())
        torch.testing.assert_close(tokens, exact.encode_image(case[0]), atol=0.1, rtol=0.1)
        assert torch.equal(tokens, exact.encode_image(case[0])) == (frozen == "fp32")


def test_keys_without_a_bias_learn_none(small_blip2: MakeBlip2, case: tuple) -> None:
    config = small_blip2().config
    without = config.model_copy(update={"vision": config.vision.model_copy(update={"key_bias": False})})
    one, other = Blip2(config), Blip2(without)
    bias = "vision.blocks.0.attention.qkv.bias"
    with torch.no_grad():
        one.state_dict()[bias].normal_()
    other.load_state_dict(one.state_dict())
    # Softmax does not see what is added to all keys alike: the numbers are the same, the gradient is exactly nothing.
    torch.testing.assert_close(one.encode_image(case[0]), other.encode_image(case[0]), atol=1e-5, rtol=1e-5)
    other.vision.requires_grad_(True)
    other.vision(case[0]).square().sum().backward()
    gradient = dict(other.named_parameters())[bias].grad.chunk(3)
    assert gradient[0].any()
    assert not gradient[1].any()
    assert gradient[2].any()


class TestVerbs:
    def test_an_image_is_as_near_as_its_nearest_query(self, small_blip2: MakeBlip2, case: tuple) -> None:
        model, (images, ids, mask) = small_blip2(), case
        image = model.project_image(model.encode_image(images)).detach()
        text = model.project_text(model.encode_text(ids, mask)).detach()
        assert image.shape == (2, 3, 8)
        torch.testing.assert_close(image.norm(dim=-1), torch.ones(2, 3))
        for i in range(2):
            for t in range(2):
                near = max(float(image[i, q] @ text[t]) for q in range(3))
                assert model.similarity(image, text)[i, t].item() == pytest.approx(near, abs=1e-6)

    def test_a_pair_is_scored_by_the_mean_over_queries(self, small_blip2: MakeBlip2, case: tuple) -> None:
        model, (images, ids, mask) = small_blip2(), case
        states = model.fuse(ids, mask, model.image_context(model.encode_image(images), "encoder"))
        assert states.shape == (2, 3, 16)
        wanted = torch.stack([model.match_head(states[:, q]) for q in range(3)]).mean(dim=0)
        torch.testing.assert_close(model.match(states), wanted)

    @pytest.mark.parametrize("counts", [[1, 2], [2, 2]])
    def test_only_the_firsts_are_the_same(self, small_blip2: MakeBlip2, case: tuple, counts: list[int]) -> None:
        model, (images, ids, mask) = small_blip2(), case
        rows = torch.tensor([0, 1, 0, 1])[: sum(counts)]
        ids, mask, lengths = ids[rows], mask[rows], mask[rows].sum(dim=1).tolist()
        torch.testing.assert_close(model.encode_cls(ids, lengths), model.encode_text(ids, mask)[:, :1])
        keys = model.image_context(model.encode_image(images), "encoder")
        each = torch.repeat_interleave(torch.tensor(counts))
        wanted = model.fuse(ids, mask, keys.select(each))
        torch.testing.assert_close(model.fuse_cls(ids, lengths, keys, counts), wanted)

    def test_it_writes_behind_dec_as_it_decodes(self, small_blip2: MakeBlip2, case: tuple) -> None:
        model, (images, ids, _) = small_blip2(), case
        seen = model.image_context(model.encode_image(images), "decoder")
        whole = model.decode(ids, None, seen)
        cache = model.cache(2, 8, seen)
        behind = torch.cat([torch.full((2, 1), model.config.text.dec), ids[:, 1:]], dim=1)
        torch.testing.assert_close(model.decode_step(behind[:, :3], seen, cache), whole[:, 2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.decode_step(behind[:, 3:4], seen, cache), whole[:, 3], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(
        ("language", "roles", "can"),
        [
            ("", ("encoder", "decoder"), {"encode_image", "encode_text", "fuse", "decode"}),
            ("", ("encoder",), {"encode_image", "encode_text", "fuse"}),
            ("", ("decoder",), {"encode_image", "decode"}),
            ("opt", (), {"encode_image", "decode"}),
        ],
    )
    def test_are_those_of_its_parts(
        self, small_blip2: MakeBlip2, language: str, roles: tuple[str, ...], can: set[str]
    ) -> None:
        assert small_blip2(language, roles=roles).capabilities == can


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": {"roles": ["decoder"]}, "language": {"kind": "opt", "settings": {"hidden_size": 8}}}, "text.roles"),
        ({"text": {"roles": []}}, "it could do nothing"),
        ({"vision": {"final_norm": True}}, "final_norm must be false"),
        ({"text": {"roles": []}, "language": {"kind": "t5", "settings": {"d_model": 8}}}, "in which T5 overflows"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(small_blip2: MakeBlip2, change: dict, said: str) -> None:
    tree = {**small_blip2().config.model_dump(), "frozen": "fp16"}
    tree = {**tree, **{k: {**(tree[k] or {}), **v} for k, v in change.items()}}
    with pytest.raises(ValidationError, match=said):
        Blip2Config(**tree)
