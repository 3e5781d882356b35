from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from capfilt import config as configs
from capfilt.cli import first_hour
from capfilt.data import shards
from capfilt.data.policy import PolicyConfig
from capfilt.data.sample import Sample
from capfilt.inference.config import AnnotateConfig
from capfilt.pipelines.bootstrap.config import BootstrapConfig
from capfilt.pipelines.init import profile, recipe
from capfilt.pipelines.init.profile import Profile
from capfilt.pipelines.init.recipe import Answers
from capfilt.pipelines.inspect.machine import Machine

SMALL = ("--set", "decode.max_length=12", "--set", "decode.min_length=3")


def read(path: Path) -> tuple[AnnotateConfig, PolicyConfig]:
    beside = path.with_name(f"{path.stem}-select.yaml")
    return configs.read(path, AnnotateConfig), configs.read(beside, PolicyConfig)


def test_the_recipes_run_as_they_are(finished_run: Path, tmp_path: Path, capfilt: Any, monkeypatch: Any) -> None:
    """What `init` says comes next is typed as it stands."""
    monkeypatch.chdir(tmp_path)
    roles = [str(finished_run / "round-1" / role) for role in ("captioner", "filter")]
    words = ("--captioner", roles[0], "--filter", roles[1], "--keep-rate", "0.5", "--out", "mine.yaml")
    done = capfilt("init", finished_run / "data/web", *words)
    assert done.code == 0, done.err
    assert "Data        60 pictures in 3 shards, 0.0" in done.out
    commands = [shlex.split(line) for line in done.out.splitlines() if line.startswith("  capfilt ")]
    assert [command[1] for command in commands] == ["annotate", "select", "report"]
    for _, verb, *rest in commands:
        address = [word for word in rest if word not in ("--address", "local")]
        done = capfilt(verb, *address, *(SMALL if verb == "annotate" else ()))
        assert done.code == 0, done.err
    assert sum(1 for _ in shards.read("runs/mine-clean/dataset/00000.tar")) > 0
    assert (tmp_path / "runs/mine-clean/report.html").is_file()


def test_what_is_there_is_not_replaced(finished_run: Path, tmp_path: Path, capfilt: Any) -> None:
    path = tmp_path / "a.yaml"
    (tmp_path / "a-select.yaml").write_text("mine")
    done = capfilt("init", finished_run / "data/web", "--out", path)
    assert (done.code, path.exists()) == (2, False)
    assert done.line.endswith("a-select.yaml is there already; --force replaces it, --out writes another.")
    done = capfilt("init", finished_run / "data/web", "--out", path, "--force", "--json")
    record = json.loads(done.out)
    assert record["recipes"] == [str(path), str(tmp_path / "a-select.yaml")]
    annotate, policy = read(path)
    assert (annotate.captions, policy.threshold) == (1, 0.5)
    assert recipe.CAPTIONER in record["next"][0]["words"], "public models where none are given"
    for words, said in (
        (("--out", tmp_path / "b"), "a recipe is a .yaml"),
        (("--out", tmp_path / "b.yaml", "--val", "v"), "give --human PAIRS too"),
        (("--out", tmp_path / "b.yaml", "--keep-rate", "2"), "less than or equal to 1"),
    ):
        done = capfilt("init", finished_run / "data/web", *words)
        assert done.code == 2
        assert said in done.err


@pytest.mark.slow
def test_human_pairs_make_it_a_recipe_of_the_loop(
    finished_run: Path, recipe: Any, tmp_path: Path, capfilt: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {name: str(finished_run / "data" / name) for name in ("web", "human", "val", "test")}
    pairs = [word for name in ("human", "val", "test") for word in (f"--{name}", data[name])]
    model = str(finished_run / "round-1/captioner")
    words = ("--captioner", model, "--filter", str(finished_run / "round-1/filter"))
    done = capfilt("init", data["web"], *pairs, *words, "--out", "loop.yaml")
    assert done.code == 0, done.err
    config = configs.read("loop.yaml", BootstrapConfig)
    assert (config.data.web, config.data.human, config.data.val) == ((data["web"],), data["human"], data["val"])
    assert config.captioner.pretrained == model  # type: ignore[union-attr]
    tiny = yaml.safe_load(recipe(tmp_path).read_text())
    sizes = {"model": tiny["model"], "pretrain": tiny["pretrain"], "annotate": tiny["annotate"]}
    Path("tiny.yaml").write_text(yaml.safe_dump({**yaml.safe_load(Path("loop.yaml").read_text()), **sizes}))
    ran = capfilt("bootstrap", "tiny.yaml", "--out", "runs/loop", "--set", "tokenizer=world")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize("gpus", [0, 1, 6, 64])
@pytest.mark.parametrize("given", [{}, {"captioner": "C: 'x' #y", "val": "v", "keep_rate": 0.25}])
def test_recipes_fit_every_machine(gpus: int, given: dict[str, Any], tmp_path: Path) -> None:
    machine = Machine(16, ("H200",) * gpus, 10**11, 10**12, "auto")
    found = Profile(
        {"Data": "a name with\nextends: evil\x1b[2J"}, {"languages": {"de": 0.5}, "small": 0.5, "boilerplate": 0.2}
    )
    loop = recipe.write(["s3://b/{000..009}.tar"], tmp_path / "a.yaml", found, machine, Answers(human="h", **given))
    for name, text in loop.files.items():
        Path(name).write_text(text)
    config = configs.read(tmp_path / "a.yaml", BootstrapConfig)
    workers = config.cluster.train.workers
    assert (config.cluster.annotate.gpus, config.cluster.train.gpus) == (min(1, gpus), min(1, gpus))
    assert config.pretrain.loader.batch_size % (workers * config.cluster.train.micro_batches) == 0
    assert config.select.threshold == ("keep-rate" if given.get("keep_rate") or not given else "calibrated")
    assert "evil" in loop.files[str(tmp_path / "a.yaml")].splitlines()[2], "a comment stays a comment"
    assert loop.commands[-1][1][-2:] == ["--address", "auto"]
    apart = recipe.write(["s"], tmp_path / "b.yaml", found, machine, Answers(**{**given, "val": None}))
    for name, text in apart.files.items():
        Path(name).write_text(text)
    annotate, policy = read(tmp_path / "b.yaml")
    assert ("batch_size" in annotate.model_fields_set) == (gpus == 0), "beside a GPU batches grow where it is not set"
    assert policy.rules.no_boilerplate
    assert (policy.threshold, policy.keep_rate) == (("keep-rate", 0.25) if given else (0.5, 0.5))
    assert apart.commands[0][1][1] == "estimate", "how many there are is not known"


# ---- what is seen of the data ----


def test_texts_pictures_and_copies_are_counted(tmp_path: Path, picture: Any) -> None:
    texts = ["ein roter Hund auf einer grünen Wiese", "IMG_1234.jpg", "", "click to enlarge this picture", "a red dog"]
    made = [
        Sample(f"{i:03d}", picture("PNG", 40, seed=i // 2 if i < 8 else i), "png", texts[i % 5], {}) for i in range(19)
    ]
    shards.write(tmp_path / "00000.tar", [*made, Sample("099", b"\x89PNG no picture", "png", "a text", {})])
    found = profile.look([str(tmp_path)], 0)
    figures = found.figures
    assert (figures["samples"], figures["shards"], figures["width"], figures["small"]) == (20, 1, 40, 1.0)
    assert figures["texts_each"] == pytest.approx(16 / 20)
    assert figures["boilerplate"] == pytest.approx(8 / 16)
    assert figures["copies_sha256"] == pytest.approx(4 / 20)
    assert figures["unreadable"] == pytest.approx(1 / 20)
    assert "20% have none" in found.facts["Texts"]
    assert found.facts["Languages"]
    with pytest.raises(Exception, match="no shard found"):
        profile.look([str(tmp_path / "nowhere")], 0)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_columns_of_a_list_are_told_by_what_is_in_them(form: str, tmp_path: Path, capfilt: Any) -> None:
    rows = [{"id": i, "link": f"https://e.org/{i}.jpg", "words": "a dog runs", "host": "e.org"} for i in range(20)]
    path = tmp_path / f"list.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "thumb": b"\xff\xd8" * 50} for row in rows]), path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    found = profile.look([str(path)], 0)
    assert (found.url_col, found.caption_col) == ("link", "words")
    done = capfilt("init", path, "--out", tmp_path / "l.yaml")
    assert done.code == 0, done.err
    fetch = next(line for line in done.out.splitlines() if line.startswith("  capfilt download"))
    assert "--url-col link --caption-col words" in fetch
    assert "shards/l --recipe" in done.out, "what comes next reads what was fetched"


def test_a_list_without_urls_is_none(tmp_path: Path, capfilt: Any) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    done = capfilt("init", tmp_path / "a.csv", "--out", tmp_path / "l.yaml")
    assert done.code != 0
    assert done.line.startswith("error: ")


# ---- at a terminal ----


def test_a_person_is_asked_for_what_is_not_given(
    finished_run: Path, tmp_path: Path, monkeypatch: Any, capfilt: Any
) -> None:
    class Terminal:
        @staticmethod
        def isatty() -> bool:
            return True

    asked = []

    def prompt(question: str, **_: Any) -> str:
        asked.append(question)
        return "0.25" if "share" in question else ""

    monkeypatch.setattr(first_hour.typer, "prompt", prompt)
    monkeypatch.setattr(first_hour, "sys", type("sys", (), {"stdin": Terminal, "stdout": Terminal}))
    path = tmp_path / "a.yaml"
    done = capfilt("init", finished_run / "data/web", "--captioner", "c", "--out", path)
    assert done.code == 0, done.err
    assert len(asked) == 3, "all but the captioner"
    assert read(path)[1].keep_rate == 0.25
    assert capfilt("init", finished_run / "data/web", "--yes", "--force", "--out", path).code == 0
    assert len(asked) == 3
