"""BLIP-2 from the command line: both stages, what they leave, and what they play in `annotate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from reference_pixels import normalised, squashed

import capfilt.data.annotations as tables
from capfilt import presets
from capfilt.data.loading.config import LoaderConfig, Source
from capfilt.data.text.language_tokenizer import LanguageTokenizer
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import RecipeError
from capfilt.inference.captioners.local import LocalCaptioner
from capfilt.inference.config import DecodeConfig
from capfilt.inference.device import Compute
from capfilt.inference.filters.fusion import FusionFilter
from capfilt.inference.local_model import LocalModel
from capfilt.models import Blip2, read_architecture
from capfilt.models.checkpoints import store
from capfilt.models.checkpoints.initial_weights import InitialConfig
from capfilt.objectives.config import ObjectivesConfig
from capfilt.pipelines import export
from capfilt.training.checkpoints import states
from capfilt.training.checkpoints.files import StateFiles
from capfilt.training.config import TeachConfig, TrainConfig
from capfilt.training.job import TrainJob
from capfilt.training.language_model import teach
from capfilt.training.loop import train

FEW = {"train.steps": 3, "train.loader.batch_size": 8, "train.log_every": 1, "train.checkpoint_every": 2}


def sets(**more: Any) -> list[str]:
    given = {**FEW, **{key.replace("__", "."): value for key, value in more.items()}}
    return [word for key, value in given.items() for word in ("--set", f"{key}={value}")]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that has read nothing."""
    folder = tmp_path_factory.mktemp("language")
    config = read_architecture(presets.find("models", "blip2/tiny-opt")).language
    assert config is not None
    teach(folder, config, [["a red square above a blue circle", "the green star"]] * 9, TeachConfig(steps=0), seed=0)
    return folder


@pytest.fixture(scope="module")
def stages(
    capfilt: Any, small_world: Path, language: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Both stages, trained for a moment by their presets."""
    home = tmp_path_factory.mktemp("blip2")
    data = {"data": small_world / "human", "resources__workers": 1}
    words = ["pretrain", "blip2-tiny-stage1", "--out", home / "one", *sets(**data, initial__vision="null")]
    done = capfilt(*words, "--json")
    assert done.code == 0, done.err
    first = Path(json.loads(done.out)["model"])
    named = {"start": first, "tokenizer": language, "initial__language": language}
    done = capfilt("pretrain", "blip2-tiny-stage2", "--out", home / "two", *sets(**data, **named), "--json")
    assert done.code == 0, done.err
    return {"first": first, "second": Path(json.loads(done.out)["model"])}


def test_the_first_stage_learns_with_a_frozen_vision_tower(stages: dict[str, Path]) -> None:
    model = store.load(stages["first"])
    assert isinstance(model, Blip2)
    assert model.capabilities == {"encode_image", "encode_text", "fuse", "decode"}
    log = (stages["first"].parent / "log.jsonl").read_text().splitlines()
    assert {"itc", "itm", "lm", "itm_accuracy"} <= set(json.loads(log[-1]))


def test_the_second_stage_keeps_what_is_frozen_to_the_bit(stages: dict[str, Path], language: Path) -> None:
    first, second = (store.read(stages[name])[1] for name in ("first", "second"))
    from safetensors.torch import load_file

    spoken = load_file(language / "model.safetensors")
    assert sum(name.startswith("vision.") for name in second) > 20
    for name, tensor in second.items():
        if name.startswith("vision."):
            assert torch.equal(tensor, first[name]), name
        if name.startswith("language."):
            assert torch.equal(tensor, spoken[name.removeprefix("language.model.")]), name
    moved = [n for n in first if n in second and not n.startswith("vision.") and not torch.equal(first[n], second[n])]
    assert len(moved) > 20
    assert not any(name.startswith(("text.words", "image_projection")) for name in second)


def test_a_stopped_training_goes_on_to_the_same_weights(
    small_world: Path, language: Path, stages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights are in no state on disk: they are read again."""

    class Killed(Exception):
        pass

    def kill(self: states.States, *state: Any) -> None:
        saved(self, *state)
        self.finish()
        raise Killed

    def job(name: str) -> TrainJob:
        return TrainJob(
            out=tmp_path / name,
            architecture=read_architecture(presets.find("models", "blip2/tiny-opt")),
            start=stages["first"],
            initial=InitialConfig(language=str(language)),
            tokenizer=str(language),
            sources=(Source(shards=str(small_world / "human")),),
            train=TrainConfig(
                steps=3,
                checkpoint_every=2,
                loader=LoaderConfig(batch_size=8),
                objectives=ObjectivesConfig(losses={"lm": 1.0}, queue=0, smoothing=0.0),
                precision="fp32",
            ),
            compute=Compute(device="cpu", precision="fp32"),
        )

    train(job("whole"))
    saved = states.States.save
    monkeypatch.setattr(states.States, "save", kill)
    with pytest.raises(Killed):
        train(job("run"))
    monkeypatch.undo()
    files = StateFiles(tmp_path / "run/states")
    (step,) = files.steps()
    kept = files.names(step)
    assert not any(name.startswith(("learner.model.vision.", "learner.model.language.")) for name in kept)
    assert any(name.startswith("learner.model.text.") for name in kept)
    train(job("run"))
    one, other = (store.read(tmp_path / name / "checkpoint")[1] for name in ("whole", "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("writer", ["first", "second"])
@pytest.mark.parametrize("method", ["nucleus", "greedy", "beam"])
def test_both_stages_write_and_the_first_judges(
    capfilt: Any, small_world: Path, stages: dict[str, Path], tmp_path: Path, writer: str, method: str
) -> None:
    settings = {"decode.method": method, "decode.max_length": 12, "decode.min_length": 3, "precision": "fp32"}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    shard = small_world / "human" / "00000.tar"
    done = capfilt(
        "annotate", shard, "--captioner", stages[writer], "--filter", stages["first"], "--out", tmp_path, *words
    )
    assert done.code == 0, done.err
    rows = list(tables.rows(tables.read(tmp_path / "annotations" / "00000.parquet")))
    written = [row for row in rows if row.source == "synthetic"]
    assert len(written) == 16
    assert all(row.status == "ok" and 0 <= row.itm <= 1 and -1 <= row.itc <= 1 for row in rows if row.text)


def test_it_is_evaluated(capfilt: Any, small_world: Path, stages: dict[str, Path]) -> None:
    result = {}
    for name, folder in stages.items():
        done = capfilt("evaluate", folder, small_world / "human", "--set", "rerank=4", "--json")
        assert done.code == 0, done.err
        result[name] = json.loads(done.out)
    assert {"retrieval", "captioning"} <= set(result["first"])
    assert "retrieval" not in result["second"]
    assert "cider" in result["second"]["captioning"]


def test_the_second_stage_cannot_be_the_filter(
    capfilt: Any, small_world: Path, stages: dict[str, Path], tmp_path: Path
) -> None:
    models = ["--captioner", stages["second"], "--filter", stages["second"]]
    done = capfilt("annotate", small_world / "human", *models, "--out", tmp_path)
    assert done.code == 2
    assert (
        "cannot be the filter: it cannot encode_text. A filter must be able to encode_image, encode_text" in done.line
    )


@pytest.mark.parametrize("stage", ["first", "second"])
def test_the_usage_beside_it_runs_and_says_what_we_say(
    stages: dict[str, Path],
    tmp_path: Path,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    export.run(str(stages[stage]), "hf", tmp_path / "hf")
    usage = (tmp_path / "hf" / "README.md").read_text()
    code = "\n".join(line[4:] for line in usage.splitlines() if line.startswith("    "))
    image, text = Image.new("RGB", (40, 30), "red"), "a red square"
    scope: dict[str, Any] = {"image": image, "text": text}
    exec(code, scope)
    model = store.load(stages[stage]).eval()
    pixels = torch.from_numpy(normalised(squashed(image, 32)[None]))
    with torch.no_grad():
        tokens = model.encode_image(pixels)
    if stage == "first":
        scores = FusionFilter(LocalModel(model, Tokenizer.load(stages[stage]))).score_tokens(tokens, [[text]])
        assert [[scope["p_match"].item()]] == [pytest.approx(of_image, abs=1e-4) for of_image in scores["itm"] or []]
        assert [[scope["cosine"].item()]] == [pytest.approx(of_image, abs=1e-4) for of_image in scores["itc"] or []]
        return
    config = DecodeConfig(method="greedy", min_length=1, max_length=31)
    tokenizer = LanguageTokenizer.load(stages[stage])
    ((written,),) = LocalCaptioner(LocalModel(model, tokenizer), config).write(tokens, ["u"])
    assert capsys.readouterr().out.strip() == written


@pytest.mark.parametrize("stage", ["first", "second"])
def test_transformers_opens_what_is_exported(stages: dict[str, Path], tmp_path: Path, stage: str) -> None:
    import transformers

    answer = export.run(str(stages[stage]), "hf", tmp_path / "hf")
    assert answer["written"] == [str(tmp_path / "hf")]
    assert list(answer["left_behind"].values()) == ([5] if stage == "first" else [])
    name = {"first": "Blip2ForImageTextRetrieval", "second": "Blip2ForConditionalGeneration"}[stage]
    model, loading = getattr(transformers, name).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading.values()), loading
    again = store.load(tmp_path / "hf")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = model.eval().vision_model(pixels).last_hidden_state
        torch.testing.assert_close(again.eval().encode_image(pixels), theirs, atol=1e-4, rtol=1e-4)
    readme = (tmp_path / "hf" / "README.md").read_text()
    assert name in readme
    assert "END" not in readme
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("a red square").input_ids


@pytest.mark.parametrize(
    ("recipe", "change", "code", "said"),
    [
        ("blip2-tiny-stage1", {"train__objectives__queue": 16}, 2, "BLIP-2 has no queue: set it to 0"),
        ("blip2-tiny-stage1", {"train__objectives__alpha": 0.1}, 2, "which BLIP-2 does not have: leave it out"),
        ("blip2-tiny-stage1", {"initial__language": "x/y"}, 2, "has no language model: leave it out"),
        ("blip2-tiny-stage1", {"start": "FIRST", "model": "blip/tiny"}, 2, "start and initial both say"),
        (
            "blip2-tiny-stage2",
            {"train__objectives__losses": "{itc: 1.0}"},
            2,
            "'itc' needs a model that can encode_text",
        ),
        (
            "blip2-tiny-stage2",
            {"start": "null", "initial__language": "null"},
            2,
            "say which it is with initial.language",
        ),
        ("blip2-tiny-stage2", {"initial__language": "null"}, 2, "no language model, and `model` has: say which"),
        ("blip2-tiny-stage2", {"initial__language": "nowhere"}, 2, "nowhere: no such file or folder"),
        ("blip2-tiny-stage2", {"tokenizer": "nowhere"}, 1, "no tokenizer of a language model at 'nowhere'"),
    ],
)
def test_what_does_not_meet_is_said(
    capfilt: Any,
    small_world: Path,
    language: Path,
    stages: dict[str, Path],
    tmp_path: Path,
    recipe: str,
    change: dict[str, Any],
    code: int,
    said: str,
) -> None:
    named = {"start": stages["first"], "tokenizer": language, "initial__language": language}
    given = {"data": small_world / "human", **(named if recipe.endswith("2") else {}), **change}
    given = {key: stages["first"] if value == "FIRST" else value for key, value in given.items()}
    done = capfilt("pretrain", recipe, "--out", tmp_path / "run", *sets(**given, resources__workers=1))
    assert done.code == code, done.err
    assert said in done.line


def test_what_the_tower_sees_is_kept_and_shared_by_both_stages(
    capfilt: Any, small_world: Path, language: Path, stages: dict[str, Path], tmp_path: Path
) -> None:
    """The log of both stages is that of trainings that look at every picture again, and the tower looked once."""
    kept = tmp_path / "kept"
    data = {"data": small_world / "human", "resources__workers": 1, "train__features": kept}
    done = capfilt("pretrain", "blip2-tiny-stage1", "--out", tmp_path / "1", *sets(**data, initial__vision="null"))
    assert done.code == 0, done.err
    made = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert len(made) == 3
    named = {"start": stages["first"], "tokenizer": language, "initial__language": language}
    done = capfilt("pretrain", "blip2-tiny-stage2", "--out", tmp_path / "2", *sets(**data, **named))
    assert done.code == 0, done.err
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == made
    for stage, number in (("first", 1), ("second", 2)):
        plain, cached = (
            [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (stages[stage].parent, tmp_path / str(number) / "pretrain")
        )
        for one, other in zip(plain, cached, strict=True):
            losses = {"itc", "itm", "lm", "grad_norm"} & one.keys()
            assert {name: other[name] for name in losses} == pytest.approx(
                {name: one[name] for name in losses}, rel=1e-4
            )


@pytest.mark.parametrize(
    ("recipe", "change", "said"),
    [
        ("blip2-tiny-stage1", {"train__loader__augment": "{flip: true}"}, "features are kept of pictures as they are"),
        ("blip-tiny", {}, "features are kept of a frozen tower, and this one is trained: set features=false"),
    ],
)
def test_features_that_would_not_hold_are_refused(
    capfilt: Any, tmp_path: Path, recipe: str, change: dict[str, Any], said: str
) -> None:
    done = capfilt("pretrain", recipe, "--out", tmp_path / "run", *sets(train__features="true", **change))
    assert done.code == 2
    assert said in done.line


def test_a_start_of_the_other_family_is_refused(
    capfilt: Any, small_world: Path, stages: dict[str, Path], tmp_path: Path
) -> None:
    words = sets(data=small_world / "human", start=stages["first"])
    done = capfilt("pretrain", "blip-tiny", "--out", tmp_path / "run", *words)
    assert done.code == 2
    assert "is of the family blip2, and `model` of blip" in done.line


def test_a_folder_says_of_which_family_it_is(stages: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stages["first"], tmp_path / "copy"))
    tree = yaml.safe_load((folder / "architecture.yaml").read_text())
    (folder / "architecture.yaml").write_text(yaml.safe_dump({**tree, "family": "blip3"}))
    with pytest.raises(RecipeError, match="there is no family 'blip3'"):
        store.architecture(folder)
