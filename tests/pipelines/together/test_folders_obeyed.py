"""annotate with folders of transformers whose tokenizer keeps capitals and whose pictures are normalised their own way:
the scores are those that transformers gives with the folder's own processor."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from capfilt import config as configs
from capfilt.data import annotations, shards
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import CapfiltError, ModelError, RecipeError, TextError
from capfilt.evaluation.config import EvaluateConfig
from capfilt.inference.config import AnnotateConfig
from capfilt.inference.roles import preprocess_for
from capfilt.models.checkpoints import files, store
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.pipelines import annotate, evaluate, export
from capfilt.runs.progress import Progress
from capfilt.stages import train
from capfilt.stages.runner import CommandOptions
from capfilt.stages.workload import Place

TEXTS = [
    "벤치에 앉은 여자",
    "ベンチに座っている女性",
    "schöne Kühe",
    "schon Kuhe",
    "लाल गाड़ी",
    "một người phụ nữ",
    "Paris",
]
MEANS = {"captioner": [0.1, 0.2, 0.3], "filter": [0.6, 0.5, 0.4]}


@pytest.fixture(scope="module")
def hf() -> SimpleNamespace:
    """The classes of transformers, imported once."""
    from transformers import BertTokenizer
    from transformers.models.blip import modeling_blip as blip
    from transformers.models.blip.configuration_blip import BlipConfig
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    return SimpleNamespace(
        Tokenizer=BertTokenizer, Processor=BlipImageProcessorPil, Config=BlipConfig,
        classes={"captioner": blip.BlipForConditionalGeneration, "filter": blip.BlipForImageTextRetrieval},
    )  # fmt: skip


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def home(hf: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`captioner` and `filter` as transformers saves them, and `0.tar` of as many pictures as there are texts."""
    home = tmp_path_factory.mktemp("obeyed")
    words = sorted({word for text in TEXTS for word in text.split()})
    letters = sorted({letter for text in TEXTS for letter in text if letter != " "})
    words += [letter for letter in letters if letter not in words]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *(f"##{letter}" for letter in letters)]
    tokenizer = hf.Tokenizer(vocab={word: i for i, word in enumerate(vocab)}, do_lower_case=False, strip_accents=False)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"vocab_size": len(vocab) + 9, "bos_token_id": len(vocab) + 7, "sep_token_id": 3, "initializer_range": 0.5}
    for name, cls in hf.classes.items():
        torch.manual_seed(0)
        vision = {**size, "image_size": 32, "patch_size": 16, "initializer_range": 0.5}
        text = {**size, **marks, "max_position_embeddings": 64, "encoder_hidden_size": 16}
        config = hf.Config(vision_config=vision, text_config=text, image_text_hidden_size=8, initializer_range=0.5)
        cls(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
        said = {"image_processor_type": "BlipImageProcessor", "size": {"height": 32, "width": 32}}
        (home / name / "preprocessor_config.json").write_text(json.dumps({**said, "image_mean": MEANS[name]}))
    shards.write(home / "0.tar", [Sample(f"{i}", picture(i), "png", text, {}) for i, text in enumerate(TEXTS)])
    return home


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(home, tmp_path / "home"))


def here(out: Path) -> Place:
    return Place("local", out, CommandOptions(), Progress(quiet=True))


def run(home: Path, out: Path, *sets: str) -> list[dict[str, Any]]:
    config = configs.build(AnnotateConfig, ("precision=fp32", "decode.max_length=16", *sets))
    models = (str(home / "captioner"), str(home / "filter"))
    annotate.run(here(out), [str(home / "0.tar")], models, 0, config)
    result: list[dict[str, Any]] = annotations.read(out / "annotations" / "0.parquet").to_pylist()
    return result


def test_scores_are_those_of_transformers_with_its_own_processor(
    home: Path, hf: SimpleNamespace, tmp_path: Path
) -> None:
    rows = run(home, tmp_path / "out")
    assert len(rows) == 2 * len(TEXTS)
    check_scores(home, hf, rows)
    assert np.std([row["itm"] for row in rows]) > 0.01
    by_text = {row["text"]: row["itm"] for row in rows if row["source"] == "web"}
    assert by_text["schöne Kühe"] != by_text["schon Kuhe"]


def test_captioner_and_filter_resize_apart_and_to_their_own_size(
    home: Path, copied: Path, hf: SimpleNamespace, tmp_path: Path
) -> None:
    """Scores are those of the filter's pictures, texts those of the captioner's, which are as before."""
    with torch.no_grad():
        config = hf.classes["filter"].from_pretrained(home / "filter").config
        config.vision_config.image_size = 48
        torch.manual_seed(1)
        hf.classes["filter"](config).save_pretrained(copied / "filter")
    change(copied / "filter" / "preprocessor_config.json", resample=2, size={"height": 48, "width": 48})
    rows = run(copied, tmp_path / "out")
    assert [row["text"] for row in rows] == [row["text"] for row in run(home, tmp_path / "before")]
    check_scores(copied, hf, rows)


@torch.no_grad()
def check_scores(home: Path, hf: SimpleNamespace, rows: list[dict[str, Any]]) -> None:
    """Each row has the scores that the filter of transformers gives to its picture and text alone."""
    model = hf.classes["filter"].from_pretrained(home / "filter").eval()
    tokenizer = hf.Tokenizer.from_pretrained(home / "filter")
    processor = hf.Processor.from_pretrained(home / "filter")
    for row in rows:
        image = Image.open(io.BytesIO(picture(int(row["key"]))))
        pixels = torch.from_numpy(np.stack(processor(image)["pixel_values"]))
        text = " ".join(re.sub(r"[.!\"()*#:;~]", " ", row["text"]).split())
        requested = tokenizer(text, return_tensors="pt", truncation=True, max_length=35)
        ids, mask = requested.input_ids, requested.attention_mask
        itc = model(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score
        ids[:, 0] = model.config.text_config.vocab_size - 1  # [ENC], behind which it was trained
        itm = model(ids, pixels, attention_mask=mask).itm_score.softmax(dim=1)[0, 1]
        assert row["itm"] == pytest.approx(itm.item(), abs=1e-5), row
        assert row["itc"] == pytest.approx(itc.item(), abs=1e-5), row


@torch.no_grad()
def test_captions_are_those_of_transformers_with_its_own_processor(
    home: Path, hf: SimpleNamespace, tmp_path: Path
) -> None:
    rows = run(home, tmp_path / "out", "decode.method=beam", "decode.min_length=5")
    model = hf.classes["captioner"].from_pretrained(home / "captioner").eval()
    processor = hf.Processor.from_pretrained(home / "captioner")
    ours = Tokenizer.load(home / "captioner")
    for row in rows:
        if row["source"] == "synthetic":
            image = Image.open(io.BytesIO(picture(int(row["key"]))))
            pixels = torch.from_numpy(np.stack(processor(image)["pixel_values"]))
            ids = model.generate(pixels, num_beams=3, do_sample=False, min_length=5, max_length=16)
            assert row["text"] == ours.decode(ids[0])


def test_another_mean_is_another_model(home: Path, copied: Path) -> None:
    one = store.fingerprint(home / "filter")
    assert store.fingerprint(copied / "filter") == one, "wherever it lies"
    seen = {one}
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        (copied / "filter" / name).write_text((copied / "filter" / name).read_text() + "\n")
        seen.add(store.fingerprint(copied / "filter"))
    assert len(seen) == 3


def test_it_leaves_for_every_form_and_reads_as_before(home: Path, hf: SimpleNamespace, tmp_path: Path) -> None:
    theirs = hf.Tokenizer.from_pretrained(home / "captioner")
    for form in export.FORMS.keys() - {"open_clip"}:  # which has no model of the family
        export.run(str(home / "captioner"), form, tmp_path / form)
        result = tmp_path / form / "model.pth" if form == "pth" else tmp_path / form
        ours = Tokenizer.load(result)
        assert not ours.lower_case
        for text in TEXTS:
            assert ours.encode([text], 64)[0][0].tolist() == theirs(text).input_ids
        assert preprocess_for(result, store.architecture(result)).mean == tuple(MEANS["captioner"])
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert [again(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


class TestRefused:
    """Before anything is read or planned: there is no run folder afterwards."""

    def refused(self, home: Path, kind: type[CapfiltError], why: str, *sets: str) -> None:
        with pytest.raises(kind, match=why) as answer:
            run(home, home / "out", *sets)
        assert "\n" not in str(answer.value)
        assert not (home / "out").exists()

    def test_pictures_of_another_size_than_the_model_s(self, copied: Path) -> None:
        change(copied / "filter" / "preprocessor_config.json", size={"height": 64, "width": 64})
        self.refused(copied, ModelError, "it makes pictures of 64 px, and the model reads 32 px")

    def test_a_tokenizer_that_cannot_be_obeyed(self, copied: Path) -> None:
        (copied / "captioner" / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
        self.refused(copied, TextError, "a tokenizer of the kind BPE")

    def test_the_tokenizer_of_another_model(self, copied: Path) -> None:
        path = copied / "filter" / "tokenizer.json"
        tree = json.loads(path.read_text())
        tree["model"]["vocab"] |= {f"more{i}": len(tree["model"]["vocab"]) + i for i in range(20)}
        path.write_text(json.dumps(tree))
        self.refused(copied, ModelError, "it is the tokenizer of another model")

    @pytest.mark.parametrize("length", [15, 40])
    def test_a_prompt_that_leaves_no_room(self, copied: Path, length: int) -> None:
        prompt = "decode.prompt=" + " ".join(["Paris"] * length)
        self.refused(
            copied, RecipeError, rf"decode\.prompt has {length + 1} tokens .* decode\.max_length 16 leaves none", prompt
        )
        config = ["decode.max_length=16", prompt]
        with pytest.raises(RecipeError, match=rf"decode\.prompt has {length + 1} tokens"):
            where, examined = here(copied / "examined"), configs.build(EvaluateConfig, config)
            evaluate.run(where, str(copied / "captioner"), [str(copied / "0.tar")], examined)
        assert run(copied, copied / "fits", "decode.prompt=" + " ".join(["Paris"] * 14))

    def test_a_training_from_a_model_that_normalises_its_own_way(self, home: Path) -> None:
        with pytest.raises(RecipeError, match=r"preprocessor_config\.json"):
            architecture = store.architecture(home / "filter")
            train.check_start(home / "filter", architecture, InitialConfig())


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("method", ["nucleus", "greedy", "beam"])
def test_a_captioner_whose_logits_are_no_numbers_is_refused(copied: Path, spoilt: float, method: str) -> None:
    path = copied / "captioner" / files.SAFE
    tensors = safetensors.torch.load_file(path)
    bias = next(name for name in tensors if name.endswith("predictions.bias"))
    tensors[bias][7] = spoilt
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CapfiltError, match="the captioner's logits are NaN or infinite"):
        run(copied, copied / "out", f"decode.method={method}")
    assert not (copied / "out" / "annotations" / "0.parquet").exists()
