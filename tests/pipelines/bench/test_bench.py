from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from capfilt.cli import app
from capfilt.data import shards
from capfilt.data.text.tokenizer import clean_caption
from capfilt.pipelines.bench.annotate import BESIDE
from capfilt.pipelines.bench.made_up import made_up_words, make_shard

TINY = ("images=6", "width=40", "batch_size=4", "tokens=5", "repeats=2")
WITHOUT = ("ray", "faiss", "img2dataset", "transformers", "cv2")
"""Packages that a machine may lack where only `annotate` and `train` are measured."""


def run(*words: str, sets: tuple[str, ...] = ()) -> Result:
    settings = [word for assignment in sets for word in ("--set", assignment)]
    return CliRunner().invoke(app, ["bench", *words, *settings])


def record(*words: str, sets: tuple[str, ...]) -> dict[str, Any]:
    done = run(*words, "--json", sets=sets)
    assert done.exit_code == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_the_record_of_annotate_is_whole() -> None:
    answer = record("annotate", sets=("model=blip/tiny", "captions=3", "compared=4", *TINY))
    assert answer["captions_per_second"] == pytest.approx(3 * answer["images_per_second"])
    assert answer["pairs_per_second"] == pytest.approx(4 * answer["images_per_second"])
    low, high = answer["images_per_second_spread"]
    assert low <= answer["images_per_second"] * 1.001
    assert answer["images_per_second"] <= high * 1.001
    assert {"read", "decode", "vision", "caption", "score", "write", "other"} <= answer["share"].keys()
    assert sum(share for name, share in answer["share"].items() if name not in BESIDE) == pytest.approx(1)
    assert min(answer["share"][name] for name in ("read", "decode", "vision", "caption", "score", "write")) > 0
    assert answer["floor"]["reached"].keys() == {"vision", "caption", "score", "all"}
    assert (
        0
        < answer["floor"]["reached"]["all"]
        == pytest.approx(answer["images_per_second"] / answer["floor"]["images_per_second"])
    )
    assert answer["against_fp32"]["batches_of_one"]["equal_tokens"] == 1
    assert answer["against_fp32"]["bf16"].keys() == {"equal_tokens", "itm_error", "itc_error"}
    assert (answer["setup"]["images"], answer["setup"]["batch_size"]) == (6, 4)
    assert answer["setup"]["architectures"][0]["vision"]["width"] == 64
    assert {"cpu", "cores", "threads"} <= answer["machine"].keys()
    assert {"python", "torch", "capfilt"} <= answer["versions"].keys()


def test_the_time_decides_how_much_is_measured_and_a_person_sees_rates_and_shares() -> None:
    """Pictures of a repeat are found; the filter is of another family, which reads the same words in other tokens."""
    sets = ("model=blip/tiny", "filter=clip/tiny", "width=40", "tokens=5", "method=greedy")
    done = run("annotate", "--seconds", "1", sets=sets)
    assert done.exit_code == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert {"images_per_second", "pairs_per_second", "share.vision", "floor.reached.all"} <= set(names)
    assert not any(name.startswith(("setup", "runs", "against_fp32")) for name in names)
    assert "images/s" in done.stderr


def test_steps_of_a_training_are_measured_until_the_time_is_over() -> None:
    answer = record("train", "--seconds", "1", sets=("model=vilt/tiny", "batch_size=4", "width=40", "tokens=8"))
    assert len(answer["runs"]["seconds"]) >= 1
    assert answer["images_per_second"] == pytest.approx(4 / answer["step_seconds"])
    assert answer["share"].keys() == {"data", "compute", "update"}
    assert sum(answer["share"].values()) == pytest.approx(1)
    assert min(answer["share"].values()) >= 0
    floor = answer["floor"]
    assert floor["reached"]["all"] == pytest.approx(answer["images_per_second"] / floor["images_per_second"])
    assert floor["reached"]["compute"] == pytest.approx(floor["reached"]["all"] / answer["share"]["compute"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:value is deprecated")  # img2dataset's way with albumentations
def test_a_worker_that_downloads_is_held_against_what_cannot_be_left_out() -> None:
    answer = record("download", sets=("urls=300", "width=64", "resize_mode=border", "image_size=32", "repeats=2"))
    low, high = answer["images_per_second_spread"]
    assert 0 < low <= answer["images_per_second"] * 1.001 <= high * 1.002
    assert len(answer["runs"]["seconds"]) == 2
    assert answer["share"]["fetch"] + answer["share"]["settle"] == pytest.approx(1)
    floor = answer["floor"]
    assert floor["milliseconds_an_image"].keys() == {"receive", "hash", "write", "resize"}
    assert floor["images_per_second"] == pytest.approx(1e3 / sum(floor["milliseconds_an_image"].values()))
    assert floor["reached"]["all"] == pytest.approx(answer["images_per_second"] / floor["images_per_second"], rel=0.01)


def test_without_img2dataset_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "img2dataset", None)
    monkeypatch.setitem(sys.modules, "img2dataset.downloader", None)
    done = run("download")
    assert done.exit_code == 2
    assert "error: bench download needs img2dataset" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", ["annotate --set shared=true", "train --set batch_size=2"])
def test_it_needs_none_of_the_packages_of_other_verbs(words: str) -> None:
    program = f"""
        import sys
        for name in {WITHOUT}:
            sys.modules[name] = None
        from capfilt.cli import app
        app("bench {words} --set model=blip/tiny --set width=40 --set tokens=5 --seconds 1".split())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "floor.reached.all" in done.stdout


@pytest.mark.parametrize(
    ("words", "sets", "said"),
    [
        (("pretrain",), (), "there is no benchmark of 'pretrain'; there are: annotate, train, download."),
        ((), ("modle=blip/tiny",), "Did you mean 'model'?"),
        ((), ("model=blip/tinny",), "blip/tiny"),
        ((), ("method=sampling",), "sampling"),
        ((), ("model=clip/tiny",), "clip/tiny cannot be the captioner: it cannot decode"),
        ((), ("shared=true", "filter=clip/tiny"), "filter names another"),
        ((), ("model=blip2/opt-2.7b", "filter=blip/tiny"), "bench makes up no vocabulary of opt"),
        (("download",), ("model=blip/tiny",), "unknown key 'model'"),
        (("train",), ("model=classifier/tiny",), "classifier, which is not pretrained"),
        ((), ("model=blip/tiny", "tokens=64"), "tokens is 64, and blip/tiny has 64 positions: set tokens=63 at most."),
        (("train",), ("model=blip/tiny", "tokens=65"), "blip/tiny has 64 positions: set tokens=64 at most."),
    ],
)
def test_what_cannot_be_meant_is_refused(words: tuple[str, ...], sets: tuple[str, ...], said: str) -> None:
    done = run(*words, sets=sets)
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_words_have_one_token_each(tmp_path: Path) -> None:
    tokenizer = made_up_words(500)
    assert len(tokenizer) == 500
    for item in shards.read(make_shard(tmp_path / "0.tar", 3, 40, 493)):
        text = item.text  # type: ignore[union-attr]
        ids, mask = tokenizer.encode([clean_caption(text)], 35)
        assert mask.sum() == len(text.split()) + 2
        assert tokenizer.unk not in ids
