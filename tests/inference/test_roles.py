"""Models that do not fit a role are refused by their folder, in one line, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ModelError, RecipeError
from capfilt.inference.config import DecodeConfig
from capfilt.inference.roles import (
    check_any_role,
    check_capabilities,
    check_captioner,
    check_filter,
    scores_given,
)
from capfilt.models import Blip
from capfilt.models.checkpoints import store

MakeBlip = Callable[..., Blip]
DECODE = DecodeConfig(max_length=10)


def saved(model: Blip, folder: Path) -> Path:
    """The folder of a model without its weights: none of them is needed to refuse it."""
    store.save(model, folder)
    Tokenizer.load("world").save(folder)
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def captioner(small_blip: MakeBlip, tmp_path: Path) -> Path:
    return saved(small_blip(roles=("decoder",)), tmp_path / "captioner")


@pytest.fixture
def filter_(small_blip: MakeBlip, tmp_path: Path) -> Path:
    return saved(small_blip(roles=("encoder",)), tmp_path / "filter")


def test_each_role_needs_its_capabilities(captioner: Path, filter_: Path) -> None:
    assert check_captioner(captioner, DECODE).capabilities >= {"decode"}
    assert check_filter(filter_, ("itm", "itc")).capabilities >= {"fuse"}
    with pytest.raises(RecipeError, match=r"captioner cannot be the filter: it cannot encode_text\. A filter must"):
        check_filter(captioner)
    with pytest.raises(RecipeError, match=r"filter cannot be the captioner: it cannot decode\. A captioner must"):
        check_captioner(filter_, DECODE)


def test_a_filter_that_cannot_fuse_gives_itc_alone() -> None:
    both, dual = frozenset({"encode_image", "encode_text", "fuse"}), frozenset({"encode_image", "encode_text"})
    assert (scores_given(both), scores_given(dual)) == (("itm", "itc"), ("itc",))
    check_capabilities("filter", "m", dual)
    with pytest.raises(RecipeError, match="m cannot be the captioner: it cannot decode"):
        check_capabilities("captioner", "m", dual)


def test_what_can_be_evaluated_can_play_a_role(
    small_blip: MakeBlip, captioner: Path, filter_: Path, tmp_path: Path
) -> None:
    for folder in (captioner, filter_):
        check_any_role(folder, DECODE)
    answers = Blip(small_blip(width=24).config.model_copy(update={"answers": True}))
    with pytest.raises(RecipeError, match="can be neither captioner nor filter"):
        check_any_role(saved(answers, tmp_path / "answers"), DECODE)


def test_what_lies_beside_the_weights_must_fit_too(captioner: Path, filter_: Path) -> None:
    with pytest.raises(RecipeError, match=r"decode\.prompt has 13 tokens .* decode\.max_length 10 leaves none"):
        check_captioner(captioner, DecodeConfig(max_length=10, prompt="red " * 12))
    (filter_ / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 64}}')
    with pytest.raises(ModelError, match="it makes pictures of 64 px, and the model reads 16 px"):
        check_filter(filter_)
