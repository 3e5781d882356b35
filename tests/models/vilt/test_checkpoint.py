"""ViLT's own `.ckpt`, what of it is refused, and what goes on from one model to another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from capfilt.data.text.bert_tokenizers import BertTokenizer
from capfilt.errors import ModelError
from capfilt.models import architecture_of, build
from capfilt.models.checkpoints import store
from capfilt.models.vilt.config import ViltConfig
from capfilt.models.vilt.model import Vilt
from capfilt.pipelines import export


def tiny(*heads: str) -> Vilt:
    config = architecture_of("vilt/tiny")
    assert isinstance(config, ViltConfig)
    torch.manual_seed(0)
    model = build(config.changed_heads(heads))  # type: ignore[arg-type]
    assert isinstance(model, Vilt)
    return model.eval()


def test_a_ckpt_comes_back_as_it_was(tmp_path: Path) -> None:
    """By its shapes alone, and with the YAML beside it; its vocabulary lies beside it too."""
    model = tiny("mlm", "itm")
    store.save(model, tmp_path / "model")
    BertTokenizer.load("world").save(tmp_path / "model")
    written = export.run(str(tmp_path / "model"), "pth", tmp_path / "out")["written"]
    assert written == [str(tmp_path / "out/model.ckpt")]
    file = Path(written[0])
    whole = torch.load(file, weights_only=True)
    assert {"transformer.blocks.0.attn.qkv.weight", "mlm_score.decoder.weight", "itm_score.fc.bias"} <= set(
        whole["state_dict"]
    )
    back = store.load(store.find(str(file)))
    assert back.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    file.with_suffix(".yaml").unlink()
    whole |= {"epoch": 3, "global_step": 200_000, "hyper_parameters": {"config": {"vit": "vit_base_patch32_384"}}}
    whole["state_dict"] |= {"text_embeddings.position_ids": torch.arange(40)[None]}
    torch.save(whole, file)
    shaped = store.architecture(file)
    assert isinstance(shaped, ViltConfig)
    assert (shaped.heads, shaped.vision.grid, shaped.vision.heads) == (("mlm", "itm"), 4, 1)
    assert (shaped.vision.layer_norm_eps, shaped.text.layer_norm_eps) == (1e-6, 1e-12)


def test_what_does_not_belong_is_named(tmp_path: Path) -> None:
    model = tiny("itm")
    store.save_pth(model, file := tmp_path / "model.ckpt")
    whole = torch.load(file, weights_only=True)
    del whole["state_dict"]["pooler.dense.bias"]
    whole["state_dict"]["extra.weight"] = torch.zeros(1)
    torch.save(whole, file)
    with pytest.raises(ModelError, match=r"1 missing: pooler.dense.bias; 1 unexpected: extra.weight"):
        store.load(file)
    torch.save({**whole, "callbacks": {Path: {}}}, file)
    with pytest.raises(ModelError, match=r"other pickles are not opened, .* save its state_dict alone"):
        store.load(file)


def test_heads_that_a_start_lacks_begin_fresh_and_that_which_ranks_as_itm_s(tmp_path: Path) -> None:
    pretrained = tiny("mlm", "itm")
    store.save(pretrained, tmp_path / "a")
    ranks = store.load_continued(tmp_path / "a", tiny("rank").config)
    assert pretrained.match_head is not None
    assert torch.equal(ranks.state_dict()["rank_head.weight"], pretrained.match_head.weight[1:])
    store.save(tiny("mlm"), tmp_path / "b")
    both = store.load_continued(tmp_path / "b", pretrained.config)
    assert torch.equal(
        both.state_dict()["vision.blocks.0.attention.qkv.weight"], pretrained.vision.blocks[0].attention.qkv.weight
    )  # type: ignore[union-attr]


def test_a_pretrained_model_becomes_two_folders_of_transformers(tmp_path: Path) -> None:
    """The one that matches has one number, whose sigmoid is P(match)."""
    model = tiny("mlm", "itm")
    store.save(model, tmp_path / "model")
    BertTokenizer.load("world").save(tmp_path / "model")
    written = export.run(str(tmp_path / "model"), "hf", tmp_path / "out")["written"]
    assert [Path(folder).name for folder in written] == ["words", "filter"]
    back = store.load(tmp_path / "out/filter")
    images, ids = torch.randn(2, 3, 32, 32), torch.tensor([[2, 30, 3], [2, 40, 3]])
    scores = []
    for one in (model, back):
        states = one.fuse(ids, torch.ones_like(ids), one.image_context(one.encode_image(images), "encoder"))
        scores.append(one.match(states).softmax(dim=1)[:, 1])
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=1e-5)
