"""ALBEF's `.pth` in and out, of a pretraining and of a fine-tuning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from capfilt.errors import ModelError
from capfilt.models import architecture_of, build
from capfilt.models.albef.config import AlbefConfig
from capfilt.models.albef.model import Albef
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.initial_weights import initialise
from capfilt.models.layers.config import FusionTextConfig, VisionConfig
from capfilt.objectives.kinds.albef import AlbefObjectives
from capfilt.objectives.tasks.albef import AlbefPretraining


def small(**text: object) -> Albef:
    """Heads are 64 wide, as a file's shapes are read."""
    torch.manual_seed(0)
    return Albef(
        AlbefConfig(
            vision=VisionConfig(image_size=16, patch_size=8, width=64, depth=1, heads=1, hidden=96),
            text=FusionTextConfig(
                vocab_size=30, width=64, depth=2, heads=1, hidden=96, fusion_layer=1, max_positions=9
            ).model_copy(update=text),
            projection=8,
        )
    )


def saved(model: Albef, path: Path, **more: Tensor) -> Path:
    store.save_pth(model, path)
    content = torch.load(path, weights_only=True)
    torch.save({"model": content["model"] | more}, path)
    return path


@pytest.mark.parametrize("yaml", [True, False])
@pytest.mark.parametrize(
    "text", [{}, {"roles": ("encoder",)}, {"tie_lm_head": False}], ids=["pretrained", "fine-tuned", "untied"]
)
def test_there_and_back(text: dict[str, object], yaml: bool, tmp_path: Path) -> None:
    model = small(**text)
    if not model.config.text.tie_lm_head:
        assert model.text.head is not None
        assert model.text.head.weight is not None
    path = saved(model, tmp_path / "model.pth", image_queue=torch.zeros(8, 4))
    if not yaml:
        path.with_suffix(".yaml").unlink()
    again = store.load(path)
    # Of dropout and the like a file says nothing: the defaults are what is read.
    assert again.config == (model.config if yaml else AlbefConfig.model_validate(model.config.model_dump()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    written = torch.load(path, weights_only=True)["model"]
    stack = "text_encoder." if "decoder" not in model.config.text.roles else "text_encoder.bert."
    assert f"{stack}embeddings.token_type_embeddings.weight" in written
    assert ("text_encoder.cls.predictions.decoder.bias" in written) == ("decoder" in model.config.text.roles)


def test_a_key_too_many_and_one_too_few_are_named(tmp_path: Path) -> None:
    path = saved(small(), tmp_path / "model.pth", strange=torch.zeros(1))
    with pytest.raises(ModelError, match=r"does not fit the architecture: 1 unexpected: strange"):
        store.load(path)
    content = torch.load(path, weights_only=True)["model"]
    del content["strange"], content["itm_head.weight"]
    torch.save({"model": content}, path)
    with pytest.raises(ModelError, match=r"1 missing: itm_head\.weight"):
        store.load(path)


def test_blip_is_not_taken_for_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blip = build(architecture_of("blip/tiny").changed(width=64, heads=1))
    store.save_pth(blip, tmp_path / "blip.pth")
    (tmp_path / "blip.yaml").unlink()
    assert store.architecture(tmp_path / "blip.pth").family == "blip"
    saved(small(roles=("encoder",)), tmp_path / "albef.pth").with_suffix(".yaml").unlink()
    assert store.architecture(tmp_path / "albef.pth").family == "albef"


def test_the_momentum_copy_of_a_file_is_taken_over(tmp_path: Path) -> None:
    model = small()
    copies = {
        name.replace(".", "_m.", 1): tensor + 1
        for name, tensor in _written(model, tmp_path).items()
        if name.split(".")[0] in ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
    }
    queues = {"image_queue": torch.randn(8, 6), "text_queue": torch.randn(8, 6), "queue_ptr": torch.zeros(1)}
    path = saved(model, tmp_path / "whole.pth", **copies, **queues)
    task = AlbefPretraining(model, AlbefObjectives(queue=6))
    kept = store.read_momentum(path, task.momentum.model)
    assert torch.equal(kept["queue_image"], queues["image_queue"].T)
    assert torch.equal(kept["text.head.bias"], model.state_dict()["text.head.bias"] + 1)
    assert {name for name in task.momentum.model.state_dict() if not name.startswith(("match_head", "temp"))} <= {*kept}


def _written(model: Albef, folder: Path) -> dict[str, Tensor]:
    written: dict[str, Tensor] = torch.load(saved(model, folder / "copy.pth"), weights_only=True)["model"]
    return written


def test_bert_becomes_text_and_fusion_layers(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(1)
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
    bert.save_pretrained(tmp_path)
    model = small()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    filled = initialise(model, text=str(tmp_path))
    state = model.state_dict()
    theirs = bert.state_dict()
    for ours, name in {
        "text.embeddings.shared.types.weight": "bert.embeddings.token_type_embeddings.weight",
        "text.layers.1.feed_forward.shared.block.up.weight": "bert.encoder.layer.1.intermediate.dense.weight",
        "text.head.transform.weight": "cls.predictions.transform.dense.weight",
    }.items():
        assert ours in filled
        assert torch.equal(state[ours], theirs[name])
    crossing = [name for name in state if "cross_attention" in name]
    assert crossing
    assert all(torch.equal(state[name], fresh[name]) for name in crossing)
