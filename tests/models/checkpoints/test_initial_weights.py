"""What a pretraining begins from, against the towers of transformers that the files come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ModelError, RecipeError
from capfilt.models import Blip
from capfilt.models.blip.checkpoint import VISION
from capfilt.models.checkpoints import files
from capfilt.models.checkpoints.initial_weights import InitialConfig, initialise
from capfilt.models.checkpoints.key_maps import expand

MakeBlip = Callable[..., Blip]
Hub = tuple[Path, list[str]]
WORDS = len(Tokenizer.load("world"))
IDS = torch.tensor([[2, 10, 11, 12, 3], [2, 20, 21, 3, 0]])
MASK = (IDS != 0).long()
FRESH_ALWAYS = {"temperature", *(f"{head}.{x}" for head in ("image_projection", "text_projection", "match_head")
                                 for x in ("weight", "bias"))}  # fmt: skip


@pytest.fixture(scope="module")
def hf() -> SimpleNamespace:
    """The classes of transformers, imported once."""
    from transformers.models.bert import modeling_bert as bert
    from transformers.models.bert.configuration_bert import BertConfig
    from transformers.models.deit.configuration_deit import DeiTConfig
    from transformers.models.deit.modeling_deit import DeiTModel
    from transformers.models.vit import modeling_vit as vit
    from transformers.models.vit.configuration_vit import ViTConfig

    return SimpleNamespace(bert=bert, vit=vit, BertConfig=BertConfig, ViTConfig=ViTConfig, DeiTConfig=DeiTConfig,
                           DeiTModel=DeiTModel)  # fmt: skip


def vit_config(config: Any, **options: object) -> Any:
    """The vision tower of small_blip, as transformers says it."""
    return config(
        **{
            "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
            "image_size": 16, "patch_size": 8, "layer_norm_eps": 1e-6, **options,
        }
    )  # fmt: skip


def bert_config(hf: SimpleNamespace, **options: object) -> Any:
    """The text stack of small_blip without [DEC] and [ENC], as transformers says it."""
    return hf.BertConfig(
        **{
            "vocab_size": WORDS - 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 64, **options,
        }
    )  # fmt: skip


def scrambled(model: nn.Module, folder: Path, **zeros: str) -> Any:
    """A model of transformers with weights that matter, saved."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.eval().save_pretrained(folder)  # type: ignore[operator]
    return model


def edit(folder: Path, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = rename(safetensors.torch.load_file(folder / files.SAFE))
    safetensors.torch.save_file(tensors, folder / files.SAFE)


def pixels(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


class TestVision:
    @pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification"])
    def test_of_transformers(self, hf: SimpleNamespace, small_blip: MakeBlip, kind: str, tmp_path: Path) -> None:
        theirs = scrambled(getattr(hf.vit, kind)(vit_config(hf.ViTConfig)), tmp_path)
        model = small_blip()
        told = initialise(model, vision=str(tmp_path))
        body = theirs if kind == "ViTModel" else theirs.vit
        with torch.no_grad():
            torch.testing.assert_close(
                model.encode_image(pixels(16)), body(pixels(16)).last_hidden_state, rtol=0, atol=1e-5
            )
        assert told == {name for name in model.state_dict() if name.startswith("vision.")}

    def test_positions_follow_the_picture_size(self, hf: SimpleNamespace, small_blip: MakeBlip, tmp_path: Path) -> None:
        theirs = scrambled(hf.vit.ViTModel(vit_config(hf.ViTConfig)), tmp_path)
        model = small_blip(image_size=32)
        initialise(model, vision=str(tmp_path))
        with torch.no_grad():
            told = theirs(pixels(32), interpolate_pos_encoding=True).last_hidden_state
            torch.testing.assert_close(model.encode_image(pixels(32)), told, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("name", ["model.safetensors", "deit.pth"])
    def test_of_timm_and_deit(self, small_blip: MakeBlip, name: str, tmp_path: Path) -> None:
        other, model = small_blip(seed=1), small_blip()
        prefix, table = VISION["pth"]
        assert prefix == "visual_encoder."
        tensors = {theirs: other.state_dict()[f"vision.{ours}"].clone() for ours, theirs in expand(table, 2, "", "")}
        assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.bias", "norm.bias"} <= set(
            tensors
        )
        tensors |= {"head.weight": torch.zeros(10, 24), "head.bias": torch.zeros(10)}
        if name == "deit.pth":
            torch.save({"model": tensors}, tmp_path / name)
        else:
            safetensors.torch.save_file(tensors, tmp_path / name)
        initialise(model, vision=str(tmp_path / name))
        with torch.no_grad():
            assert torch.equal(model.encode_image(pixels(16)), other.encode_image(pixels(16)))

    def test_a_name_of_the_hub(self, hf: SimpleNamespace, small_blip: MakeBlip, hub: Hub) -> None:
        scrambled(hf.vit.ViTModel(vit_config(hf.ViTConfig)), hub[0] / "facebook" / "deit-tiny")
        assert len(initialise(small_blip(), vision="facebook/deit-tiny")) == 30

    def test_a_distilled_deit_is_refused(self, hf: SimpleNamespace, small_blip: MakeBlip, tmp_path: Path) -> None:
        scrambled(hf.DeiTModel(vit_config(hf.DeiTConfig)), tmp_path)
        with pytest.raises(ModelError, match="is a distilled DeiT, with a second token"):
            initialise(small_blip(), vision=str(tmp_path))

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"patch_size": 4}, r"vision\.patches\.weight is \[24, 3, 8, 8\], there \[24, 3, 4, 4\]"),
            ({"num_hidden_layers": 1}, r"12 missing: encoder\.layer\.1"),
            ({"num_hidden_layers": 3}, r"12 unexpected: encoder\.layer\.2"),
        ],
    )
    def test_another_architecture_is_refused(
        self, hf: SimpleNamespace, small_blip: MakeBlip, options: dict[str, int], told: str, tmp_path: Path
    ) -> None:
        scrambled(hf.vit.ViTModel(vit_config(hf.ViTConfig, **options)), tmp_path)
        with pytest.raises(ModelError, match=told):
            initialise(small_blip(), vision=str(tmp_path))


class TestText:
    @pytest.mark.parametrize("share", ["all_but_self_attention", "none"])
    @pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
    def test_of_transformers(
        self, hf: SimpleNamespace, small_blip: MakeBlip, kind: str, share: str, tmp_path: Path
    ) -> None:
        theirs = getattr(hf.bert, kind)(bert_config(hf))
        body = theirs if kind == "BertModel" else theirs.bert
        scrambled(theirs, tmp_path)
        # BLIP has no token types and BERT adds one to every word: only without it the two can agree.
        body.embeddings.token_type_embeddings.weight.data.zero_()
        model = small_blip(share=share)
        told = initialise(model, text=str(tmp_path))
        with torch.no_grad():
            states = body(IDS, attention_mask=MASK).last_hidden_state
            torch.testing.assert_close(model.encode_text(IDS, MASK), states, rtol=0, atol=1e-5)
            if kind != "BertModel":
                logits = theirs(IDS, attention_mask=MASK)
                said = logits.logits if kind == "BertForMaskedLM" else logits.prediction_logits
                torch.testing.assert_close(model.text.logits(states)[..., : WORDS - 2], said, rtol=0, atol=1e-5)
        fresh = {name for name in model.state_dict().keys() - told if not name.startswith(("vision.", "text.head."))}
        assert fresh - FRESH_ALWAYS == {name for name in model.state_dict() if "cross_attention" in name}
        assert any(name.startswith("text.head.") for name in model.state_dict().keys() - told) == (kind == "BertModel")
        both = [name for name in told if ".self_attention.decoder." in name]
        assert len(both) == 2 * 10

    def test_the_two_marks_stay_fresh(self, hf: SimpleNamespace, small_blip: MakeBlip, tmp_path: Path) -> None:
        scrambled(hf.bert.BertForMaskedLM(bert_config(hf)), tmp_path)
        before, model = small_blip(tie_lm_head=False), small_blip(tie_lm_head=False)
        initialise(model, text=str(tmp_path))
        old, new = before.state_dict(), model.state_dict()
        for name in ("text.embeddings.shared.words.weight", "text.head.weight"):
            assert torch.equal(old[name][-2:], new[name][-2:])
            assert not torch.equal(old[name][:-2], new[name][:-2])
        assert torch.equal(new["text.head.weight"][:-2], new["text.embeddings.shared.words.weight"][:-2])

    def test_old_names_of_layer_norms(self, hf: SimpleNamespace, small_blip: MakeBlip, tmp_path: Path) -> None:
        """bert-base-uncased on the hub has them."""
        scrambled(hf.bert.BertForPreTraining(bert_config(hf)), tmp_path)
        new, old = small_blip(), small_blip()
        initialise(new, text=str(tmp_path))
        edit(
            tmp_path,
            lambda t: {
                n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
                for n, v in t.items()
            },
        )
        initialise(old, text=str(tmp_path))
        assert all(torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters(), strict=True))

    def test_fewer_positions_and_one_role(self, hf: SimpleNamespace, small_blip: MakeBlip, tmp_path: Path) -> None:
        scrambled(hf.bert.BertForMaskedLM(bert_config(hf)), tmp_path)
        model = small_blip(max_positions=20, roles=("encoder",))
        initialise(model, text=str(tmp_path))
        whole = safetensors.torch.load_file(tmp_path / files.SAFE)["bert.embeddings.position_embeddings.weight"]
        assert torch.equal(model.state_dict()["text.embeddings.shared.positions.weight"], whole[:20])

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"vocab_size": 50}, rf"has 50 words, the model {WORDS - 2} beside .* model\.text\.vocab_size=52"),
            ({"max_position_embeddings": 32}, r"positions\.weight is \[64, 16\], there \[32, 16\]"),
            ({"hidden_size": 32}, r"is \[197, 16\], there \[195, 32\]"),
        ],
    )
    def test_another_architecture_is_refused(
        self, hf: SimpleNamespace, small_blip: MakeBlip, options: dict[str, int], told: str, tmp_path: Path
    ) -> None:
        scrambled(hf.bert.BertModel(bert_config(hf, **options)), tmp_path)
        with pytest.raises(ModelError, match=told):
            initialise(small_blip(), text=str(tmp_path))


def test_nothing_given_is_all_fresh(small_blip: MakeBlip) -> None:
    model = small_blip()
    told = initialise(model)
    assert not told


def test_a_folder_without_weights(small_blip: MakeBlip, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no weights; it needs model\.safetensors"):
        initialise(small_blip(), text=str(tmp_path))


class TestTraining:
    def test_a_model_from_scratch_begins_with_it(
        self, hf: SimpleNamespace, small_blip: MakeBlip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from capfilt.data.loading.config import Source
        from capfilt.inference.device import Compute
        from capfilt.training.config import TrainConfig
        from capfilt.training.job import TrainJob
        from capfilt.training.loop import initial_model

        scrambled(hf.vit.ViTModel(vit_config(hf.ViTConfig)), tmp_path / "vit")
        scrambled(hf.bert.BertModel(bert_config(hf)), tmp_path / "bert")
        monkeypatch.chdir(tmp_path)
        initial = InitialConfig(vision="vit", text="bert").located()
        assert Path(str(initial.vision)).is_absolute()
        job = TrainJob(
            out=tmp_path, architecture=small_blip().config, initial=initial, tokenizer="world",
            sources=(Source(shards="x"),), train=TrainConfig(steps=1, objectives={"losses": {"lm": 1.0}}),
            compute=Compute(device="cpu", precision="fp32"),
        )  # fmt: skip
        told = small_blip()
        initialise(told, str(initial.vision), str(initial.text))
        model = initial_model(job, WORDS)
        assert torch.equal(model.vision.positions, told.vision.positions)
        assert torch.equal(model.encode_text(IDS, MASK), told.encode_text(IDS, MASK))

    def test_not_beside_a_model_to_start_from(self, tmp_path: Path) -> None:
        from capfilt import config as configs
        from capfilt.pipelines.pretrain import PretrainConfig

        recipe = "model: blip/tiny\ndata: [{shards: x}]\ntrain: {steps: 1}\nstart: a\ninitial: {text: b}\n"
        (tmp_path / "a.yaml").write_text(recipe)
        with pytest.raises(RecipeError, match="start and initial"):
            configs.read(tmp_path / "a.yaml", PretrainConfig)
