from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from capfilt.cli import app
from capfilt.data import shards
from capfilt.data.text.tokenizer import clean_caption
from capfilt.pipelines.bench.annotate import made_up_words, make_shard
from capfilt.pipelines.bench.bench import BenchConfig

TINY = ("model=blip/tiny", "images=6", "width=40", "batch_size=4", "tokens=5", "repeats=2", "compared=4")


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["bench", *words])


@pytest.mark.parametrize(("more", "passes"), [(("captions=3",), 2), (("shared=true", "method=greedy"), 1)])
def test_the_record_is_whole(more: tuple[str, ...], passes: int) -> None:
    sets = [word for assignment in (*TINY, *more) for word in ("--set", assignment)]
    done = run("annotate", *sets, "--json")
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    captions = answer["setup"]["captions"]
    assert answer["captions_per_second"] == pytest.approx(captions * answer["images_per_second"])
    assert answer["pairs_per_second"] == pytest.approx((1 + captions) * answer["images_per_second"])
    assert {"read", "decode", "vision", "caption", "score", "write", "other"} <= answer["share"].keys()
    assert sum(share for name, share in answer["share"].items() if name != "decode") == pytest.approx(1)
    assert min(answer["share"][name] for name in ("read", "decode", "vision", "caption", "score", "write")) > 0
    assert len(answer["runs"]["stage_seconds"]) == len(answer["runs"]["bare_seconds"]) == 2
    assert answer["against_fp32"]["batches_of_one"]["equal_tokens"] == 1
    assert answer["against_fp32"]["bf16"].keys() == {"equal_tokens", "itm_error", "itc_error"}
    assert answer["ratio"].keys() == {"stage_of_bare", "vision_floor_of_stage"}
    assert answer["setup"]["architecture"]["vision"]["width"] == 64
    assert {"cpu", "cores", "threads"} <= answer["machine"].keys()
    assert {"python", "torch", "capfilt"} <= answer["versions"].keys()


def test_a_person_sees_rates_and_shares() -> None:
    done = run("annotate", *[word for assignment in TINY for word in ("--set", assignment)])
    assert done.exit_code == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert {"images_per_second", "pairs_per_second", "share.vision", "ratio.stage_of_bare"} <= set(names)
    assert not any(name.startswith(("setup", "runs")) for name in names)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("pretrain",), "there is no benchmark of 'pretrain'; there are: annotate."),
        (("--set", "modle=blip/tiny"), "Did you mean 'model'?"),
        (("--set", "model=blip/tinny"), "blip/tiny"),
        (("--set", "method=sampling"), "sampling"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_words_have_one_token_each(tmp_path: Path) -> None:
    config = BenchConfig(images=3, width=40)
    tokenizer = made_up_words(500)
    assert len(tokenizer) == 500
    for item in shards.read(make_shard(tmp_path / "0.tar", config, 500)):
        text = item.text  # type: ignore[union-attr]
        ids, mask = tokenizer.encode([clean_caption(text)], 35)
        assert mask.sum() == len(text.split()) + 2
        assert tokenizer.unk not in ids
