"""Our BLIP against transformers', by the comparisons of benchmarks/parity.py."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

CLASSES = ["BlipForConditionalGeneration", "BlipForImageTextRetrieval", "BlipForQuestionAnswering"]


@pytest.fixture(scope="module")
def parity(pytestconfig: pytest.Config) -> ModuleType:
    """The module benchmarks/parity.py, which imports transformers: once for all that is here."""
    spec = importlib.util.spec_from_file_location("parity", pytestconfig.rootpath / "benchmarks" / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def captioner(parity: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> object:
    """A captioner twice: transformers' and ours."""
    return parity.eager_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("direction", ["in", "out"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_answer_is_the_same(parity: ModuleType, name: str, direction: str, size: int, tmp_path: Path) -> None:
    chosen = parity.SIZES[size]
    pair = parity.DIRECTIONS[direction](name, chosen, tmp_path)
    own_size = pair.ours.config.vision.image_size
    assert own_size != chosen.other_image_size
    for image_size in (own_size, chosen.other_image_size):
        far = parity.compare(pair.at(image_size, tmp_path), image_size)
        assert len(far) >= 3
        assert max(far.values()) <= parity.LIMIT, far


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.slow
def test_no_tensor_could_be_wrong_unseen(parity: ModuleType, name: str, tmp_path: Path) -> None:
    """What the comparisons are worth: each notices a change of any single tensor."""
    pair = parity.theirs_to_ours(name, parity.SIZES[0], tmp_path)
    assert max(parity.compare(pair, 224).values()) <= parity.LIMIT
    unseen = []
    for key, weight in pair.ours.named_parameters():
        before = weight.detach().clone()
        weight.data += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        if max(parity.compare(pair, 224).values()) <= parity.LIMIT:
            unseen.append(key)
        weight.data.copy_(before)
    # A bias of keys shifts all scores of a query alike: softmax does not see it. ITC's temperature is no answer.
    assert {key for key in unseen if not key.endswith(("block.key.bias", "temperature"))} == set()


def test_itm_behind_the_two_tokens_differs(parity: ModuleType, tmp_path: Path) -> None:
    ours = parity.ours_to_theirs("BlipForImageTextRetrieval", parity.SIZES[0], tmp_path).ours
    asked = parity.batch(ours.config.text.vocab_size, 224)
    logits = {}
    for token in ("enc", "cls"):
        model = parity.store.load(tmp_path, itm_token=token).eval()
        with torch.no_grad():
            keys = model.image_context(model.encode_image(asked.pixels), "encoder")
            logits[token] = model.match(model.fuse(asked.ids, asked.mask, keys))
    assert (logits["enc"] - logits["cls"]).abs().max() > 0.01
    assert parity.store.architecture(tmp_path).itm_token == "enc"


class TestTexts:
    """Greedy and beam search, token for token."""

    @pytest.mark.parametrize("how", range(5))
    def test_are_those_of_transformers(self, parity: ModuleType, captioner: object, how: int) -> None:
        assert len(parity.GENERATIONS) == 5
        theirs, ours = parity.texts(captioner, list(parity.GENERATIONS)[how])
        assert ours == theirs
        assert len({len(row) for row in ours}) >= 5, "texts that all end alike prove little"
        assert len(set(map(tuple, ours))) >= parity.IMAGES // 2

    @pytest.mark.parametrize("how", ["greedy", "beam 3"])
    def test_are_those_after_a_prompt_too(self, parity: ModuleType, captioner: object, how: str) -> None:
        theirs, ours = parity.texts(captioner, how, prompt=(10, 11, 12), lengths=(7, 16))
        assert ours == theirs
        assert min(map(len, ours)) == 7 - 4  # lengths count the prompt, with [DEC]
        assert max(map(len, ours)) == 16 - 4

    def test_are_those_of_the_original_accounting_where_the_rules_agree(
        self, parity: ModuleType, captioner: object, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Sums that no length divides are the same, whatever counts as length."""
        how = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
        monkeypatch.setitem(parity.GENERATIONS, "sums alone", how)
        theirs, ours = parity.texts(captioner, "sums alone", (10, 11, 12), (7, 16), accounting="original")
        assert ours == theirs
        assert len({len(row) for row in ours}) >= 5


def test_the_page_lists_every_comparison(parity: ModuleType, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    page = (pytestconfig.rootpath / "docs" / "parity.md").read_text()
    assert "python benchmarks/parity.py" in page
    rows = re.findall(r"^\| (Blip\w+) \| (theirs|ours), .* \| (.*) \| (\S+)(?: of \d+ differ)? \|$", page, re.M)
    told = {(name, direction, what) for name, direction, what, _ in rows}
    for name in CLASSES:
        far = parity.compare(parity.theirs_to_ours(name, parity.SIZES[0], tmp_path / name), 224)
        assert {(name, direction, what) for what in far for direction in ("theirs", "ours")} <= told
    assert {(CLASSES[0], "theirs", f"texts: {how}") for how in parity.GENERATIONS} <= told
    assert all(float(far) <= parity.LIMIT for *_, far in rows)
