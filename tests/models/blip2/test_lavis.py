"""LAVIS' `.pth` of BLIP-2 in and out. Its names are checked against transformers' by the published renaming."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from capfilt import config as configs
from capfilt import presets
from capfilt.errors import ModelError
from capfilt.models import Blip2, Blip2Config, blank, read_architecture
from capfilt.models.blip2 import lavis
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.files import Tensors

MakeBlip2 = Callable[..., Blip2]
STAGES = {"stage 1": {}, "filter": {"roles": ("encoder",)}, "opt": {"language": "opt"}, "t5": {"language": "t5"}}


def state(model: Blip2) -> Tensors:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: Blip2, other: Blip2) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def in_file(path: Path) -> Tensors:
    tensors: Tensors = torch.load(path, weights_only=True)["model"]
    return tensors


def without(tensors: Tensors, *prefixes: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize("stage", STAGES)
def test_everything_comes_back_bit_by_bit(small_blip2: MakeBlip2, tmp_path: Path, stage: str) -> None:
    model, path = small_blip2(**STAGES[stage], seed=4), tmp_path / "model.pth"
    store.save_pth(model, path)
    again = store.load(path)
    assert same(again, model)
    assert again.config == model.config
    store.save_pth(again, tmp_path / "again.pth")
    one, other = in_file(path), in_file(tmp_path / "again.pth")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_untied_output_matrix_comes_back_too(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    config = small_blip2("t5").config
    assert config.language is not None
    untied = config.model_copy(update={"language": config.language.model_copy(update={"tied": False})})
    model = Blip2(untied)
    store.save_pth(model, tmp_path / "model.pth")
    assert same(store.load(tmp_path / "model.pth"), model)
    # What is tied the tensors decide, whatever the YAML says.
    (tmp_path / "model.yaml").write_text(configs.to_yaml(config))
    assert store.architecture(tmp_path / "model.pth") == untied


def test_the_names_are_those_of_lavis(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    store.save_pth(small_blip2(), tmp_path / "model.pth")
    tensors = in_file(tmp_path / "model.pth")
    dense = ("weight", "bias")
    expected = {"query_tokens", "temp", "visual_encoder.cls_token", "visual_encoder.pos_embed"}
    expected |= {"Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.bias"}
    expected |= {f"Qformer.bert.embeddings.{part}_embeddings.weight" for part in ("word", "position")}
    parts = ["ln_vision", "vision_proj", "text_proj", "itm_head", "visual_encoder.patch_embed.proj"]
    parts += ["Qformer.bert.embeddings.LayerNorm", "Qformer.cls.predictions.decoder"]
    parts += [f"Qformer.cls.predictions.transform.{part}" for part in ("dense", "LayerNorm")]
    for n in range(3):
        block, layer = f"visual_encoder.blocks.{n}", f"Qformer.bert.encoder.layer.{n}"
        expected |= {f"{block}.attn.q_bias", f"{block}.attn.v_bias", f"{block}.attn.qkv.weight"}
        parts += [f"{block}.{part}" for part in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")]
        for kind in ("attention", "crossattention")[: 2 - n % 2]:  # every second layer attends to the image
            parts += [f"{layer}.{kind}.self.{part}" for part in ("query", "key", "value")]
            parts += [f"{layer}.{kind}.output.{part}" for part in ("dense", "LayerNorm")]
        for ending in ("", "_query"):
            parts += [f"{layer}.intermediate{ending}.dense"]
            parts += [f"{layer}.output{ending}.{part}" for part in ("dense", "LayerNorm")]
    assert tensors.keys() == expected | {f"{part}.{each}" for part in parts for each in dense}
    words = tensors["Qformer.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(tensors["Qformer.cls.predictions.decoder.weight"], words)


def to_transformers(tensors: Tensors) -> Tensors:
    """LAVIS' names -> transformers', by the renaming of the published conversion, and the biases joined."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".attn.q_bias"):
            value = tensors[name.replace("q_bias", "v_bias")]
            name, tensor = name.replace("q_bias", "qkv.bias"), torch.cat([tensor, torch.zeros_like(tensor), value])
        elif name.endswith((".attn.v_bias", "position_ids", "temp")) or name.startswith("Qformer.cls."):
            continue
        for pattern, new in (
            (r"^ln_vision", "vision_model.post_layernorm"),
            (r"^visual_encoder\.patch_embed\.proj", "vision_model.embeddings.patch_embedding"),
            (r"^visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
            (r"^visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
            (r"^visual_encoder\.blocks", "vision_model.encoder.layers"),
            (r"\.attn\.proj\.", ".self_attn.projection."),
            (r"\.attn\.", ".self_attn."),
            (r"\.norm(\d)\.", r".layer_norm\1."),
            (r"^Qformer\.bert\.embeddings\.LayerNorm", "qformer.layernorm"),
            (r"^Qformer\.bert\.embeddings", "embeddings"),
            (r"^Qformer\.bert", "qformer"),
            (r"attention\.self\.", "attention.attention."),
            (r"^(opt|t5)_proj", "language_projection"),
            (r"^(opt|t5)_model", "language_model"),
            (r"^(vision|text)_proj\.", r"\1_projection."),
        ):
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("name", ["Blip2ForImageTextRetrieval", "opt", "t5"])
def test_what_is_computed_from_a_file_is_what_transformers_computes(
    parity: ModuleType, name: str, tmp_path: Path
) -> None:
    """The way out by our map, the way to transformers by the renaming: every answer must be the same."""
    config = parity.architecture(name, 1)
    ours = Blip2(config).eval()
    parity.scramble(ours, 1)
    store.save_pth(ours, tmp_path / "model.pth")
    described = parity.describe(config, 0.07)
    theirs = parity.CLASSES[name](parity.HfConfig(**{k: v for k, v in described.items() if k != "architectures"}))
    missing, unexpected = theirs.load_state_dict(to_transformers(in_file(tmp_path / "model.pth")), strict=False)
    assert unexpected == []
    assert all(re.search(r"embed_tokens|lm_head|position_ids", key) for key in missing), missing  # tied, constants
    theirs.tie_weights()
    loaded = store.load(tmp_path / "model.pth").eval()
    far = parity.compare(parity.Pair(theirs.eval(), loaded))
    assert len(far) >= 5
    assert max(far.values()) <= parity.LIMIT, far


class TestWhatATrainingLeaves:
    """LAVIS deletes frozen weights before it writes: the tower, the language model."""

    def trained(self, model: Blip2, path: Path) -> Path:
        """The file of a training, with what else LAVIS puts there, and the YAML of an architecture that is not BLIP-2's
        as released."""
        store.save_pth(model, path)
        tensors = without(in_file(path), "visual_encoder.", "opt_model.", "t5_model.")
        if model.config.language is not None and model.config.language.kind == "t5":
            # Of tied weights it knows the first name alone.
            words = model.state_dict()["language.model.shared.weight"]
            tensors |= {f"t5_model.{part}.embed_tokens.weight": words for part in ("encoder", "decoder")}
        rest = {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "config": {"run": {"seed": 42}}, "epoch": 9}
        torch.save({"model": tensors, "scaler": None, **rest}, path)
        return path

    def eva(self, model: Blip2, path: Path) -> Path:
        """The tower as a file of EVA has it: with a block and a norm that BLIP-2 does not use."""
        store.save_pth(model, path)
        tower = {n.removeprefix("visual_encoder."): t for n, t in in_file(path).items() if "visual_encoder." in n}
        tower |= {n.replace(".2.", ".3."): t for n, t in tower.items() if ".2." in n}
        torch.save({**tower, "norm.weight": torch.ones(24), "norm.bias": torch.ones(24)}, path)
        path.with_suffix(".yaml").unlink()
        return path

    @pytest.mark.parametrize("stage", STAGES)
    def test_is_completed_and_then_whole(self, small_blip2: MakeBlip2, tmp_path: Path, stage: str) -> None:
        model = small_blip2(**STAGES[stage], seed=2)
        path = self.trained(model, tmp_path / "trained.pth")
        sources = {"vision": str(self.eva(model, tmp_path / "eva.pth"))}
        if model.config.language is not None:
            model.language.model.save_pretrained(tmp_path / "language")
            sources["language"] = str(tmp_path / "language")
        assert same(store.load_filled(path, sources), model)  # type: ignore[arg-type]

    def test_is_refused_where_it_is_incomplete(self, small_blip2: MakeBlip2, tmp_path: Path) -> None:
        model = small_blip2("opt")
        path = self.trained(model, tmp_path / "trained.pth")
        how = r"and a frozen language model .*--vision FILE-OR-NAME --language FILE-OR-NAME --out FOLDER"
        for read in (store.load, store.architecture, lambda path: store.load_continued(path, model.config)):
            with pytest.raises(ModelError, match=rf"lacks a frozen vision tower .* {how}"):
                read(path)
        sources = {"vision": str(self.eva(model, tmp_path / "eva.pth"))}
        with pytest.raises(ModelError, match=r"lacks a frozen language model .* --as capfilt --language"):
            store.load_filled(path, sources)
        store.save_pth(model, tmp_path / "whole.pth")
        with pytest.raises(ModelError, match="has the part vision, or no place for one: leave --vision out"):
            store.load_filled(tmp_path / "whole.pth", sources)
        store.save(model, tmp_path / "own")
        with pytest.raises(ModelError, match=r"is not a \.pth, and lacks no part: leave --vision out"):
            store.load_filled(tmp_path / "own", sources)

    def test_second_names_are_left_behind_by_name(self, small_blip2: MakeBlip2, tmp_path: Path) -> None:
        model = small_blip2("t5")
        left = store.left_behind(self.trained(model, tmp_path / "trained.pth"), model.config)
        assert left == {"a constant, 0, 1, 2, ...": 1, "second names of the frozen language model's words": 2}

    def test_a_part_that_is_there_in_part_is_named(self, small_blip2: MakeBlip2, tmp_path: Path) -> None:
        path = tmp_path / "model.pth"
        store.save_pth(small_blip2(), path)
        torch.save({"model": without(in_file(path), "visual_encoder.blocks.1.norm1")}, path)
        with pytest.raises(ModelError, match=r"2 missing: visual_encoder\.blocks\.1\.norm1\.bias"):
            store.load(path)


def test_every_key_is_used_or_named(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    store.save_pth(small_blip2(), path)
    tensors = in_file(path)
    torch.save({"model": without(tensors, "itm_head.bias") | {"stranger": torch.zeros(1)}}, path)
    with pytest.raises(ModelError, match=r"1 missing: itm_head.bias; 1 unexpected: stranger"):
        store.load(path)
    torch.save({"model": {**tensors, "query_tokens": tensors["query_tokens"][:, :2]}}, path)
    with pytest.raises(ModelError, match=r"1 of another shape: text\.query_tokens"):
        store.load(path)
    other = tensors["Qformer.cls.predictions.decoder.weight"] + 1
    torch.save({"model": {**tensors, "Qformer.cls.predictions.decoder.weight": other}}, path)
    with pytest.raises(ModelError, match=r"1 of two values: text\.words\.weight"):
        store.load(path)
    torch.save({"model": without(tensors, "query_tokens")}, path)
    path.with_suffix(".yaml").unlink()
    with pytest.raises(ModelError, match="is no checkpoint of BLIP-2's code, LAVIS: it lacks query_tokens"):
        store.load(path)


def test_biases_of_keys_have_no_place_and_no_effect(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    model, path = small_blip2(), tmp_path / "model.pth"
    for block in model.vision.blocks:
        block.attention.qkv.bias.data.normal_()
    store.save_pth(model, path)
    again = store.load(path)
    assert not torch.equal(again.vision.blocks[0].attention.qkv.bias, model.vision.blocks[0].attention.qkv.bias)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again.eval().encode_image(pixels), model.encode_image(pixels), atol=1e-4, rtol=1e-4)
    assert lavis.Lavis().left_out(model.config) == {lavis.KEY_BIASES: 3}


# ---- a released file, which has no YAML beside it ----


def released(name: str, **changes: Any) -> tuple[Blip2Config, Tensors]:
    """The architecture and the tensors, without memory, of a file of LAVIS of a published size."""
    config = read_architecture(presets.find("models", name))
    assert isinstance(config, Blip2Config)
    if changes:
        config = config.model_copy(update={"vision": config.vision.model_copy(update=changes)})
    model = blank(config)
    held: Tensors = dict(model.state_dict())
    tensors = lavis.Lavis().write(config, held)
    return config.model_copy(update={"vision_norm_eps": 1e-5}), tensors


def test_the_first_stage_is_known_by_its_shapes() -> None:
    config, tensors = released("blip2/pretrain")
    there = Path("blip2_pretrained.pth")
    assert lavis.Lavis().architecture(without(tensors, "visual_encoder."), None, there) == config
    # A tower that was fine-tuned on COCO is in the file, in fp32, and reads larger pictures.
    config, tensors = released("blip2/pretrain", image_size=364)
    wide = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    assert lavis.Lavis().architecture(wide, None, there) == config.model_copy(update={"frozen": "fp32"})
    assert {name for name in wide if name.endswith("qkv.bias")} == {
        f"visual_encoder.blocks.{n}.attn.qkv.bias" for n in range(39)
    }


@pytest.mark.parametrize("name", ["opt-2.7b", "flan-t5-xl"])
def test_the_second_stage_has_its_language_model_described_where_that_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = released(f"blip2/{name}")
    alone = without(tensors, "visual_encoder.", "opt_model.", "t5_model.")
    with pytest.raises(ModelError, match=r"second stage, and lacks its .* --vision eva_vit_g.pth --language FOLDER"):
        lavis.Lavis().architecture(dict(alone), None, Path("there.pth"))
    monkeypatch.setattr(lavis, "described_at", lambda _source: config.language)
    assert lavis.Lavis().describe(alone, {"language": "there"}, Path("there.pth")) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t | {"ln_vision.weight": torch.ones(1024)}, "CLIP's ViT-L, which has a norm before its blocks"),
        (lambda t: t | {"ln_vision.weight": torch.ones(64)}, r"its tower is 64 wide.*into there\.yaml beside it"),
        (lambda t: t | {"query_tokens": torch.ones(1, 8, 64)}, r"its Q-Former is 64 wide.*into there\.yaml beside it"),
        (lambda t: without(t, "ln_vision"), r"does not fit any architecture: ln_vision\.weight is missing"),
        (lambda t: t | {"t5_proj.weight": torch.ones(2048, 768)}, "second stage, and lacks its T5"),
        (
            lambda t: t | {"opt_proj.weight": torch.ones(8, 768), "opt_model.model.decoder.x": torch.ones(1)},
            "has its OPT in it, whose heads leave no trace",
        ),
    ],
)
def test_what_only_a_yaml_can_say_is_asked_for(change: Callable[[Tensors], Tensors], said: str) -> None:
    _, tensors = released("blip2/pretrain")
    with pytest.raises(ModelError, match=said):
        lavis.Lavis().architecture(change(without(tensors, "visual_encoder.")), None, Path("there.pth"))


def test_instructions_in_the_qformer_are_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tensors = released("blip2/pretrain")
    language = read_architecture(presets.find("models", "blip2/opt-2.7b"))
    assert isinstance(language, Blip2Config)
    monkeypatch.setattr(lavis, "described_at", lambda _source: language.language)
    instructed = without(tensors, "visual_encoder.") | {"opt_proj.weight": torch.ones(2560, 768)}
    with pytest.raises(ModelError, match="InstructBLIP"):
        lavis.Lavis().describe(instructed, {"language": "there"}, Path("there.pth"))


def test_there_is_no_momentum_to_go_on_with(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    store.save_pth(small_blip2(), tmp_path / "model.pth")
    with pytest.raises(ModelError, match="has no momentum copy"):
        store.read_momentum(tmp_path / "model.pth", small_blip2())


def test_nothing_but_tensors_is_opened(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    store.save_pth(small_blip2(), tmp_path / "model.pth")
    tensors: dict[str, Tensor] = in_file(tmp_path / "model.pth")
    torch.save({"model": tensors, "config": Path("/")}, tmp_path / "model.pth")
    with pytest.raises(ModelError, match=r"cannot be read as tensors alone \(it holds pathlib"):
        store.load(tmp_path / "model.pth")
