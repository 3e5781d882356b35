"""LAVIS' checkpoints of BLIP-2 come to work here, completed with their frozen parts, and ours leave for LAVIS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import capfilt
from capfilt.cli import app
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import ModelError
from capfilt.inference.config import DecodeConfig
from capfilt.inference.roles import check_captioner
from capfilt.models import Blip2
from capfilt.models.checkpoints import store
from capfilt.training.language_model import make_tokenizer

MakeBlip2 = Callable[..., Blip2]
DECODE = {"decode.method": "greedy", "decode.max_length": 10, "decode.min_length": 3}
IMAGES = [Image.new("RGB", (20, 16), color) for color in ("red", "navy")]


@pytest.fixture
def parts(small_blip2: MakeBlip2, tmp_path: Path) -> dict[str, Path]:
    """A BLIP-2 with an OPT: `whole`, in our layout; and as LAVIS and its authors have it, in three places."""
    model = small_blip2("opt", seed=6)
    whole, language, path = tmp_path / "whole", tmp_path / "language", tmp_path / "trained.pth"
    tokenizer = make_tokenizer([["a red square", "two blue circles on a table"]], 299)
    for folder in (whole, language):
        tokenizer.save(folder)
    model.language.model.save_pretrained(language)
    store.save(model, whole)
    store.save_pth(model, path)
    tensors = torch.load(path, weights_only=True)["model"]
    tower = {n.removeprefix("visual_encoder."): t for n, t in tensors.items() if n.startswith("visual_encoder.")}
    torch.save(tower | {"norm.weight": torch.ones(24)}, tmp_path / "eva.pth")
    frozen = ("visual_encoder.", "opt_model.")
    torch.save({"model": {n: t for n, t in tensors.items() if not n.startswith(frozen)}, "epoch": 3}, path)
    return {"whole": whole, "language": language, "trained": path, "vision": tmp_path / "eva.pth"}


def test_a_file_without_its_frozen_parts_is_completed(parts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"trained\.pth lacks a frozen vision tower .* complete it with `capfilt export"
    ):
        check_captioner(parts["trained"], DecodeConfig())
    out = tmp_path / "out"
    words = ["export", str(parts["trained"]), "--as", "capfilt", "--out", str(out)]
    words += ["--vision", str(parts["vision"]), "--language", str(parts["language"])]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert (out / store.WEIGHTS).read_bytes() == (parts["whole"] / store.WEIGHTS).read_bytes()
    wanted = capfilt.load_model(parts["whole"], device="cpu").caption(IMAGES, settings=DECODE)
    assert capfilt.load_model(out, device="cpu").caption(IMAGES, settings=DECODE) == wanted
    assert not list(tmp_path.glob(".export-*")), "nothing is left between"


def test_it_goes_on_to_transformers_at_once(parts: dict[str, Path], tmp_path: Path) -> None:
    given = {"vision": parts["vision"], "language": parts["language"]}
    result = capfilt.export(parts["trained"], out=tmp_path / "hf", form="hf", **given)
    assert result.left_behind == {"a constant, 0, 1, 2, ...": 1}
    assert store.load(tmp_path / "hf").capabilities == {"encode_image", "decode"}
    wanted = capfilt.load_model(parts["whole"], device="cpu").caption(IMAGES, settings=DECODE)
    assert capfilt.load_model(tmp_path / "hf", device="cpu").caption(IMAGES, settings=DECODE) == wanted


def test_ours_leaves_for_lavis_and_works_where_it_lies(parts: dict[str, Path], tmp_path: Path) -> None:
    (written,) = capfilt.export(parts["whole"], out=tmp_path / "out", form="pth").written
    assert written == tmp_path / "out/model.pth"
    tensors = torch.load(tmp_path / "out/model.pth", weights_only=True)["model"]
    assert {"query_tokens", "opt_proj.weight", "visual_encoder.blocks.0.attn.q_bias"} <= tensors.keys()
    wanted = capfilt.load_model(parts["whole"], device="cpu").caption(IMAGES, settings=DECODE)
    assert capfilt.load_model(written, device="cpu").caption(IMAGES, settings=DECODE) == wanted


def test_the_first_stage_leaves_whole(small_blip2: MakeBlip2, tmp_path: Path) -> None:
    model = small_blip2()
    store.save(model, tmp_path / "own")
    Tokenizer.load("world").save(tmp_path / "own")
    result = capfilt.export(tmp_path / "own", out=tmp_path / "out", form="pth")
    assert list(result.left_behind.values()) == [3], "the biases of keys of three blocks"
    again = capfilt.load_model(tmp_path / "out/model.pth", device="cpu")
    assert again.capabilities == model.capabilities
    mine = capfilt.load_model(tmp_path / "own", device="cpu").score(IMAGES, ["a red circle", "blue"])
    assert again.score(IMAGES, ["a red circle", "blue"]) == mine


def test_a_whole_model_takes_no_parts(parts: dict[str, Path], tmp_path: Path) -> None:
    words = ["export", str(parts["whole"]), "--out", str(tmp_path / "out"), "--vision", str(parts["vision"])]
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    assert "lacks no part: leave --vision out" in done.output
    assert not (tmp_path / "out").exists()
