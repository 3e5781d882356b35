"""Prompts that leave no room for a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from capfilt import config as configs
from capfilt import presets
from capfilt.data.loading.config import LoaderConfig
from capfilt.errors import RecipeError
from capfilt.inference.config import DecodeConfig
from capfilt.inference.roles import check_prompts
from capfilt.models import BlipConfig

PROMPT = "a picture of "


def test_one_that_fits_and_one_that_does_not() -> None:
    architecture = configs.read(presets.find("models", "blip/tiny"), BlipConfig)
    fits = LoaderConfig(batch_size=4, prompt=PROMPT, max_length=6)
    check_prompts("world", architecture, {"train": fits}, [DecodeConfig(prompt=PROMPT, max_length=6, min_length=5)])
    with pytest.raises(RecipeError, match=r"train\.loader\.prompt has 5 tokens .* loader\.max_length 5 leaves none"):
        check_prompts("world", architecture, {"train": fits.model_copy(update={"max_length": 5})})
    with pytest.raises(RecipeError, match=r"decode\.prompt has 4 tokens .* decode\.max_length 4 leaves none"):
        check_prompts("world", architecture, {}, [DecodeConfig(prompt=PROMPT, max_length=4, min_length=2)])


@pytest.mark.parametrize("key", ["annotate.decode", "evaluate.decode", "captioner.loader", "pretrain.loader"])
def test_a_bootstrap_is_refused_before_it_begins(key: str, recipe: Any, capfilt: Any, tmp_path: Path) -> None:
    words = ("bootstrap", recipe(tmp_path), "--out", tmp_path / "run", "--set", f"{key}.prompt={PROMPT * 9}")
    done = capfilt(*words)
    assert done.code == 2, done.err
    assert ".prompt has " in done.err
    assert not (tmp_path / "run").exists()
