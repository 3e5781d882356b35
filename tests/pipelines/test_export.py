"""Models that leave for transformers, and transformers' models that come to work here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference_pixels import normalised, squashed
from torch import Tensor
from typer.testing import CliRunner

from capfilt import config as configs
from capfilt import presets
from capfilt.cli import app
from capfilt.data import annotations
from capfilt.data.loading.config import Source
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import RecipeError, RunError, UsageError
from capfilt.evaluation.config import EvaluateConfig
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import AnnotateConfig, DecodeConfig
from capfilt.inference.device import Compute
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import Blip, BlipConfig
from capfilt.models.checkpoints import store
from capfilt.pipelines import annotate, evaluate, export
from capfilt.runs.progress import Progress
from capfilt.stages.runner import CommandOptions
from capfilt.stages.workload import Place
from capfilt.training.config import TrainConfig
from capfilt.training.job import TrainJob
from capfilt.training.loop import train

MakeBlip = Callable[..., Blip]
TOKENIZER = Tokenizer.load("world")
TEXTS = ["a red circle", "two blue squares on a table"]


@pytest.fixture(scope="module")
def hf() -> SimpleNamespace:
    """The classes of transformers, imported once."""
    from transformers.models.auto.processing_auto import AutoProcessor
    from transformers.models.blip import modeling_blip as blip
    from transformers.models.blip.configuration_blip import BlipConfig as Config

    return SimpleNamespace(AutoProcessor=AutoProcessor, Config=Config, Captioner=blip.BlipForConditionalGeneration,
                           Filter=blip.BlipForImageTextRetrieval, Answerer=blip.BlipForQuestionAnswering)  # fmt: skip


@pytest.fixture(scope="module")
def trained(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model after a few steps of the demo's pretraining."""
    out = tmp_path_factory.mktemp("pretrain")
    config = TrainConfig.model_validate(
        {"steps": 3, "loader": {"batch_size": 16, "max_length": 24}, "objectives": {"queue": 0}, "precision": "fp32"}
    )
    architecture = configs.read(presets.find("models", "blip/tiny"), BlipConfig)
    job = TrainJob(
        out=out,
        architecture=architecture,
        tokenizer="world",
        sources=(Source(shards=str(small_world / "human")),),
        train=config,
        compute=Compute(device="cpu", precision="fp32"),
    )
    train(job)
    return job.model_folder


def save(model: Blip, folder: Path) -> Path:
    """A model folder of ours."""
    TOKENIZER.save(folder)
    store.save(model, folder)
    return folder


def opened(cls: Any, folder: Path) -> Any:
    """A model by transformers, which must find every tensor and no other."""
    model, answer = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(answer.values()), answer
    return model.eval()


def asked(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, ids and mask of two pictures and two texts."""
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    ids, mask = (torch.from_numpy(x) for x in TOKENIZER.encode(TEXTS, 20))
    return pixels, ids, mask


def behind(token: int, ids: Tensor) -> Tensor:
    return torch.cat([torch.full_like(ids[:, :1], token), ids[:, 1:]], dim=1)


def close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


class TestToTransformers:
    @torch.no_grad()
    def test_a_model_of_the_demo_goes_out_and_comes_back(
        self, hf: SimpleNamespace, trained: Path, tmp_path: Path
    ) -> None:
        answer = export.run(str(trained), "hf", tmp_path / "out")
        captioner, judge = (tmp_path / "out" / part for part in ("captioner", "filter"))
        assert answer["written"] == [str(captioner), str(judge)]
        ours = store.load(trained).eval()
        pixels, ids, mask = asked(32)
        tokens = ours.encode_image(pixels)
        logits = ours.decode(ids, mask, ours.image_context(tokens, "decoder"))
        match = ours.match(ours.fuse(ids, mask, ours.image_context(tokens, "encoder")))
        cosines = ours.project_image(tokens) @ ours.project_text(ours.encode_text(ids, mask)).T

        theirs = opened(hf.Captioner, captioner)
        close(theirs(pixels, behind(TOKENIZER.dec, ids), attention_mask=mask).logits, logits)
        theirs = opened(hf.Filter, judge)
        close(theirs(behind(TOKENIZER.enc, ids), pixels, attention_mask=mask).itm_score, match)
        close(theirs(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score, cosines)

        back = store.load(store.find(str(captioner))).eval()
        assert torch.equal(back.decode(ids, mask, back.image_context(tokens, "decoder")), logits)
        back = store.load(store.find(str(judge))).eval()
        assert torch.equal(back.match(back.fuse(ids, mask, back.image_context(tokens, "encoder"))), match)
        torch.testing.assert_close(back.temperature, ours.temperature)

    @torch.no_grad()
    def test_its_processor_prepares_and_reads_as_ours(
        self, hf: SimpleNamespace, small_blip: MakeBlip, tmp_path: Path
    ) -> None:
        model = small_blip(roles=("decoder",))
        export.run(str(save(model, tmp_path / "model")), "hf", tmp_path / "out")
        processor = hf.AutoProcessor.from_pretrained(tmp_path / "out")
        pictures = [
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (20 + 9 * i, 31, 3), np.uint8)) for i in range(4)
        ]
        seen = processor(images=pictures, return_tensors="pt")["pixel_values"]
        mine = torch.from_numpy(normalised(np.stack([squashed(picture, 16) for picture in pictures])))
        close(mine, seen)
        assert processor(text=TEXTS, padding=True, return_tensors="pt")["input_ids"].tolist() == asked(16)[1].tolist()
        written = opened(hf.Captioner, tmp_path / "out").generate(
            seen, num_beams=3, do_sample=False, min_length=5, max_length=20
        )
        config = DecodeConfig(method="beam", beams=3, min_length=5, max_length=20)
        texts = LocalCaptioner(LocalModel(model, TOKENIZER), config).write(model.encode_image(mine), list("abcd"))
        theirs = [processor.decode(row, skip_special_tokens=True) for row in written]
        assert [[text] for text in theirs] == texts
        assert len(set(theirs)) > 1

    def test_the_usage_beside_it_runs(
        self,
        hf: SimpleNamespace,
        small_blip: MakeBlip,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        models = {
            "captioner": small_blip(roles=("decoder",)),
            "filter": small_blip(roles=("encoder",)),
            "answers": Blip(small_blip(width=24).config.model_copy(update={"answers": True})),
        }
        monkeypatch.chdir(tmp_path)
        image, text = Image.new("RGB", (40, 30), "red"), TEXTS[0]
        for name, model in models.items():
            export.run(str(save(model, tmp_path / f"{name}-model")), "hf", tmp_path / name)
            usage = (tmp_path / name / "README.md").read_text()
            code = "\n".join(line[4:] for line in usage.splitlines() if line.startswith("    "))
            scope: dict[str, Any] = {"image": image, "text": text, "question": text}
            exec(code, scope)
            if name == "filter":
                pixels = torch.from_numpy(normalised(squashed(image, 16)[None]))
                filter_ = FusionFilter(LocalModel(model.eval(), TOKENIZER))
                scores = filter_.score_tokens(model.encode_image(pixels), [[text]])
                for name, score in (("p_match", "itm"), ("cosine", "itc")):
                    assert [[scope[name].item()]] == [pytest.approx(row, abs=1e-5) for row in scores[score] or []]
        assert capsys.readouterr().out.count("\n") >= 2

    def test_untied_and_the_other_sizes_stay(self, hf: SimpleNamespace, small_blip: MakeBlip, tmp_path: Path) -> None:
        model = small_blip(roles=("decoder",), tie_lm_head=False, image_size=32)
        export.run(str(save(model, tmp_path / "model")), "hf", tmp_path / "out")
        theirs = opened(hf.Captioner, tmp_path / "out")
        words = theirs.text_decoder.bert.embeddings.word_embeddings.weight
        assert not torch.equal(theirs.text_decoder.cls.predictions.decoder.weight, words)
        assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["size"] == {
            "height": 32,
            "width": 32,
        }


class TestOtherForms:
    @pytest.mark.parametrize(("form", "file"), [("pth", "model.pth"), ("capfilt", "model.safetensors")])
    def test_keep_the_whole_model(self, small_blip: MakeBlip, form: str, file: str, tmp_path: Path) -> None:
        model = small_blip()
        export.run(str(save(model, tmp_path / "model")), form, tmp_path / "out")
        assert (tmp_path / "out" / file).is_file()
        result = store.find(str(tmp_path / "out" / file if form == "pth" else tmp_path / "out"))
        assert Tokenizer.load(result).vocab == TOKENIZER.vocab
        assert store.load(result).config == model.config
        state = store.load(result).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


class TestCommand:
    @pytest.fixture
    def model(self, small_blip: MakeBlip, tmp_path: Path) -> Path:
        return save(small_blip(), tmp_path / "model")

    def test_tells_what_it_wrote(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        done = CliRunner().invoke(app, ["export", str(model), "--as", "hf", "--out", str(out)])
        assert done.exit_code == 0
        assert done.output.splitlines()[:2] == [str(out / "captioner"), str(out / "filter")]
        answer = CliRunner().invoke(app, ["export", str(out / "filter"), "--out", str(tmp_path / "again"), "--json"])
        assert json.loads(answer.output) == {
            "model": str(out / "filter"), "as": "hf", "written": [str(tmp_path / "again")], "left_behind": {},
        }  # fmt: skip
        done = CliRunner().invoke(app, ["export", str(model), "--as", "onnx", "--out", str(tmp_path / "b")])
        assert done.exit_code == 2
        assert "--as onnx: a model leaves as hf, pth, open_clip, capfilt; data leave as webdataset," in done.output

    def test_refuses(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"--as ptt: .* Did you mean 'pth'"):
            export.run(str(model), "ptt", tmp_path / "out")
        with pytest.raises(RunError, match="holds something already"):
            export.run(str(model), "hf", model)
        assert not (tmp_path / "out").exists()


class TestAnnotateWithTransformersModels:
    """Captioner and filter as transformers saves them."""

    @pytest.fixture
    def folders(self, hf: SimpleNamespace, tmp_path: Path) -> tuple[Path, Path]:
        text = {
            "vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 64, "bos_token_id": TOKENIZER.dec,
            "sep_token_id": TOKENIZER.sep, "pad_token_id": TOKENIZER.pad, "initializer_range": 0.3,
        }  # fmt: skip
        vision = {
            "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 16, "initializer_range": 0.3,
        }  # fmt: skip
        made = []
        for cls in (hf.Captioner, hf.Filter):
            torch.manual_seed(0)
            model = cls(
                hf.Config(text_config=text, vision_config=vision, image_text_hidden_size=8, initializer_range=0.3)
            )
            folder = tmp_path / cls.__name__
            model.save_pretrained(folder)
            # As published: BERT's vocabulary, without [DEC] and [ENC].
            (folder / "vocab.txt").write_text("\n".join(TOKENIZER.vocab[:-2]) + "\n")
            made.append(folder)
        return made[0], made[1]

    def run(self, models: tuple[Path, Path], shards: Path, out: Path, *sets: str) -> dict[str, Any]:
        config = configs.build(AnnotateConfig, sets)
        place = Place("local", out, CommandOptions(), Progress(quiet=True))
        return annotate.run(place, [str(shards / "human")], (str(models[0]), str(models[1])), 0, config)

    def test_every_picture_gets_its_rows(
        self, hf: SimpleNamespace, folders: tuple[Path, Path], small_world: Path, tmp_path: Path
    ) -> None:
        answer = self.run(folders, small_world, tmp_path / "out", "captions=2", "precision=fp32")
        assert answer["samples"] == {"in": 48, "kept": 48, "dropped": 0, "failed": 0}
        rows = [
            row
            for path in sorted((tmp_path / "out" / "annotations").glob("*.parquet"))
            for row in annotations.read(path).to_pylist()
        ]
        synthetic = [row for row in rows if row["source"] == "synthetic"]
        assert len(synthetic) == 96
        assert len({row["text"] for row in synthetic}) > 48
        assert all(re.fullmatch(r"blip-[0-9a-f]{64}", row["filter"]) for row in rows)
        assert all(0 <= row["itm"] <= 1 and -1 <= row["itc"] <= 1 for row in rows)
        assert np.std([row["itm"] for row in rows]) > 0.01

    def test_beams_give_several_texts(
        self, hf: SimpleNamespace, folders: tuple[Path, Path], small_world: Path, tmp_path: Path
    ) -> None:
        answer = self.run(folders, small_world, tmp_path / "out", "captions=3", "decode.method=beam")
        assert answer["texts"]["kept"]["synthetic"] == 3 * 48
        table = annotations.read(next((tmp_path / "out" / "annotations").glob("*.parquet"))).to_pylist()
        by_key: dict[str, set[str]] = {}
        for row in table:
            if row["source"] == "synthetic":
                by_key.setdefault(row["key"], set()).add(row["text"])
        assert max(map(len, by_key.values())) == 3
        with pytest.raises(RecipeError, match=r"captions 4 of 3 beams: decode\.beams must be at least as many"):
            self.run(folders, small_world, tmp_path / "b", "captions=4", "decode.method=beam")

    def test_roles_must_fit(
        self, folders: tuple[Path, Path], hf: SimpleNamespace, small_world: Path, tmp_path: Path
    ) -> None:
        _, judge = folders
        with pytest.raises(RecipeError, match="BlipForImageTextRetrieval cannot be the captioner: it cannot decode"):
            self.run((judge, judge), small_world, tmp_path / "a")
        answers = tmp_path / "answers"
        vision = {**small(), "image_size": 32, "patch_size": 16}
        text = {**small(), "vocab_size": 40, "bos_token_id": 38}
        hf.Answerer(hf.Config(vision_config=vision, text_config=text)).save_pretrained(answers)
        with pytest.raises(RecipeError, match="answers cannot be the captioner: it cannot decode"):
            self.run((answers, judge), small_world, tmp_path / "b")


class TestEvaluateWithTransformersModels:
    def run(self, model: Path, shards: Path) -> dict[str, Any]:
        place = Place("local", model.with_name("examined"), CommandOptions(gpus=None), Progress(quiet=True))
        return evaluate.run(place, str(model), [str(shards / "human")], EvaluateConfig())

    def test_a_filter_is_examined_and_a_model_that_answers_is_not(
        self, small_blip: MakeBlip, small_world: Path, tmp_path: Path
    ) -> None:
        export.run(str(save(small_blip(roles=("encoder",)), tmp_path / "filter")), "hf", tmp_path / "a")
        assert 0 <= self.run(tmp_path / "a", small_world)["retrieval"]["tr@1"] <= 100
        answers = Blip(small_blip(width=24).config.model_copy(update={"answers": True}))
        export.run(str(save(answers, tmp_path / "answers")), "hf", tmp_path / "b")
        with pytest.raises(RecipeError, match="can be neither captioner nor filter"):
            self.run(tmp_path / "b", small_world)


def small() -> dict[str, int]:
    """One layer of transformers', 16 wide."""
    return {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
