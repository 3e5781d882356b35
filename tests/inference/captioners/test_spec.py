from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import NoModelError, RecipeError
from capfilt.inference.captioners.spec import LocalSpec, captioner_spec
from capfilt.inference.config import AnnotateConfig, VlmConfig
from capfilt.models import Blip
from capfilt.models.checkpoints import store


@pytest.fixture(scope="module")
def blip(small_blip: Callable[..., Blip], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    store.save(small_blip(roles=("decoder",)), folder)
    Tokenizer.load("world").save(folder)
    return folder


def test_a_model_of_ours_has_no_named_prompts_unless_it_goes_on_from_the_web_text(blip: Path) -> None:
    spec = captioner_spec(str(blip))
    assert spec == LocalSpec(model=blip)
    assert spec.fingerprint() == store.fingerprint(blip)
    spec.check(AnnotateConfig())
    assert not spec.names_prompts(AnnotateConfig())
    spec.check(AnnotateConfig(web_prefix=8))
    assert spec.names_prompts(AnnotateConfig(web_prefix=8))


def test_settings_without_room_or_effect_are_refused(blip: Path) -> None:
    spec = LocalSpec(model=blip)
    with pytest.raises(RecipeError, match=r"positions of .*; lower one of them"):
        spec.check(AnnotateConfig(web_prefix=200))
    with pytest.raises(RecipeError, match="the keys of `vlm` have no effect"):
        spec.check(AnnotateConfig(vlm=VlmConfig(max_new_tokens=9)))


def test_a_folder_that_is_no_model_of_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoModelError, match=r"no model of transformers: it has no config\.json"):
        captioner_spec(f"hf:{tmp_path}")
    with pytest.raises(NoModelError, match="no such file or folder"):
        captioner_spec(f"hf:{tmp_path}/nowhere")
