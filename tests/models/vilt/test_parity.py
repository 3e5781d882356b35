"""Our ViLT against transformers', by the comparisons of benchmarks/parity_vilt.py."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from capfilt.models import architecture_of

CLASSES = [
    "ViltModel", "ViltForMaskedLM", "ViltForImageAndTextRetrieval", "ViltForQuestionAnswering",
    "ViltForImagesAndTextClassification", "ViltForTokenClassification",
]  # fmt: skip


@pytest.fixture(scope="module")
def parity(pytestconfig: pytest.Config) -> ModuleType:
    """The module benchmarks/parity_vilt.py, which imports transformers: once for all that is here."""
    path = pytestconfig.rootpath / "benchmarks" / "parity_vilt.py"
    spec = importlib.util.spec_from_file_location("parity_vilt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity_vilt"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_answer_is_the_same(parity: ModuleType, name: str, direction: str, tmp_path: Path) -> None:
    assert list(parity.CLASSES) == CLASSES
    for shape, padded in ((0, True), (1, False)):
        pair = parity.DIRECTIONS[direction](name, shape, tmp_path / str(shape))
        far = parity.compare(pair, padded)
        assert far
        assert max(far.values()) <= parity.LIMIT, far


@pytest.mark.parametrize("name", ["ViltModel", "ViltForImagesAndTextClassification"])
@pytest.mark.slow
def test_no_tensor_could_be_wrong_unseen(parity: ModuleType, name: str, tmp_path: Path) -> None:
    """What the comparisons are worth: each notices a change of any single tensor."""
    pair = parity.theirs_to_ours(name, 0, tmp_path)
    unseen = []
    for key, weight in pair.ours.named_parameters():
        before = weight.detach().clone()
        weight.data += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        if max(parity.compare(pair, True).values()) <= parity.LIMIT:
            unseen.append(key)
        weight.data.copy_(before)
    assert unseen == []


def test_norms_of_two_epsilons_go_out_and_come_back(parity: ModuleType, tmp_path: Path) -> None:
    """transformers has one; the blocks' travels beside it, and is read here."""
    ours = parity.Vilt(parity.architecture("ViltModel", 0, eps=1e-6))
    parity.scramble(ours, 0)
    parity.store.save_hf(ours.eval(), tmp_path, {})
    back = parity.store.load(tmp_path)
    assert (back.config.text.layer_norm_eps, back.config.vision.layer_norm_eps) == (1e-12, 1e-6)
    assert back.config == ours.config


def test_a_classifier_s_answers_travel_with_it(parity: ModuleType, tmp_path: Path) -> None:
    """Those of transformers' `id2label`, and what `classify` says by them of one picture or of two."""
    import transformers

    from capfilt.data.text.language_tokenizer import tokenizer_of
    from capfilt.inference.answers import classify
    from capfilt.inference.local_model import LocalModel

    for head, name in (("vqa", CLASSES[3]), ("nlvr2", CLASSES[4])):
        images = 1 if head == "vqa" else 2
        given = architecture_of("vilt/tiny").model_dump() | {"heads": (head,), "labels": 2, "images": images}
        config = parity.ViltConfig.model_validate(given | {"label_names": ("no", "yes")})
        ours = parity.Vilt(config).eval()
        parity.store.save_hf(ours, tmp_path / head, {})
        assert parity.store.architecture(tmp_path / head).known_answers == ("no", "yes")
        theirs = getattr(transformers, name).from_pretrained(tmp_path / head).eval()
        assert theirs.config.id2label == {0: "no", 1: "yes"}
        local = LocalModel(ours, tokenizer_of("world", "bert"))
        ids = torch.from_numpy(local.tokenizer.encode(["a red ring"], 20)[0])
        pixels = torch.randn(images, 3, 32, 32)
        with torch.no_grad():
            logits = theirs(ids, pixel_values=pixels if images == 1 else pixels[None]).logits
        told = classify(local, pixels, ["a red ring"], [0])
        torch.testing.assert_close(told, logits.softmax(dim=1), atol=1e-5, rtol=1e-4)


def test_the_page_lists_every_comparison(parity: ModuleType, pytestconfig: pytest.Config) -> None:
    page = (pytestconfig.rootpath / "docs" / "parity.md").read_text()
    rows = re.findall(r"^\| (Vilt\w+) \| (theirs|ours), .* \| (\S+) \|$", page, re.M)
    assert {(name, whose) for name, whose, _ in rows} == {
        (name, whose) for name in CLASSES for whose in ("theirs", "ours")
    }
    assert all(float(far) <= parity.LIMIT for *_, far in rows)
