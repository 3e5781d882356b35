"""A tiny model, a tiny world, and one finished bootstrap of them that many tests look at, copy and go on from."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.tokens import Tokenizer

WIDTH = {"width": 16, "depth": 1, "heads": 2, "hidden": 32, "init_std": 0.25}
LOSSES = {"captioner": {"lm": 1.0}, "filter": {"itc": 1.0, "itm": 1.0}}


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The last line for a person: the error, where there was one."""
        return self.err.strip().splitlines()[-1]


Capfilt = Callable[..., Outcome]
Recipe = Callable[..., Path]
Snapshot = dict[str, tuple[int, int, int]]


def call(*arguments: object, address: str | None = "local") -> Outcome:
    """Run `capfilt` in this process."""
    words = [str(argument) for argument in arguments]
    nowhere = words[0] in ("show", "export", "status", "verify", "explain", "report") or address is None
    where = [] if nowhere else ["--address", str(address)]
    done = CliRunner().invoke(app, [*words, *where])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Outcome(done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def capfilt() -> Capfilt:
    return call


@pytest.fixture(scope="session")
def model_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest BLIP there can be, with the embedded world's vocabulary."""
    text = {**WIDTH, "vocab_size": len(Tokenizer.load("world")), "max_positions": 64, "dropout": 0.0}
    vision = {**WIDTH, "image_size": 32, "patch_size": 16}
    path = tmp_path_factory.mktemp("model") / "mite.yaml"
    path.write_text(yaml.safe_dump({"family": "blip", "vision": vision, "text": text, "projection": 16}))
    return path


def training(**losses: float) -> dict[str, Any]:
    return {
        "steps": 4,
        "loader": {"batch_size": 16, "max_length": 24, "shuffle": 64},
        "objectives": {"queue": 0, "momentum": 0.9, **({"losses": losses} if losses else {})},
        "optimizer": {"lr": 1e-3, "warmup": 0.1},
        "precision": "fp32",
        "log_every": 1,
    }


@pytest.fixture(scope="session")
def recipe(model_yaml: Path) -> Recipe:
    """Write a bootstrap of one round into a folder; keywords replace whole sections of it."""

    def write(folder: Path, **sections: Any) -> Path:
        decode = {"max_length": 12, "min_length": 3}
        tree: dict[str, Any] = {
            "rounds": 1,
            "data": {"world": {"web": 60, "human": 24, "val": 16, "test": 12, "shard_size": 20}},
            "model": str(model_yaml),
            "pretrain": training(),
            **{role: training(**losses) for role, losses in LOSSES.items()},
            "annotate": {"decode": decode, "max_length": 35, "precision": "fp32"},
            "select": {"threshold": "keep-rate", "keep_rate": 0.5},
            "evaluate": {"decode": {**decode, "method": "greedy"}},
        }
        path = folder / "mine.yaml"
        path.write_text(yaml.safe_dump({**tree, **sections}))
        return path

    return write


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    """The run folder of a finished bootstrap, its recipe beside it. To be looked at only; `moved` gives a copy."""
    home = tmp_path_factory.mktemp("story")
    done = call("bootstrap", recipe(home), "--out", home / "run")
    assert done.code == 0, done.err
    return home / "run"


@pytest.fixture
def moved(story: Path, tmp_path: Path) -> Path:
    """A copy of the finished run in another place, times of writing kept as `cp -a` keeps them."""
    return Path(shutil.copytree(story, tmp_path / "run"))


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], Snapshot]:
    """What tells whether a file was written again: inode, time and size of every file but the run's log and plans."""

    def take(folder: Path) -> Snapshot:
        told = ("log.jsonl", "plan.jsonl", "pace.json")  # what happened, what was begun, and how fast it went
        files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(told))
        stats = {str(path.relative_to(folder)): path.stat() for path in files}
        return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}

    return take


# ---- pictures and texts of the tests' own ----

PAINT = {"red": (220, 20, 30), "green": (20, 160, 50), "blue": (40, 70, 240), "white": (250, 250, 250)}


def paint(form: str, size: int = 32, mode: str = "RGB", colour: str = "red", seed: int = 0) -> bytes:
    noise = np.random.default_rng(seed).normal(0, 8, (size, size, 3))
    pixels = np.clip(np.array(PAINT[colour]) + noise, 0, 255)
    deep = Image.fromarray((pixels[..., 0] * 257).astype(np.uint16))
    image = deep if mode == "I;16" else Image.fromarray(pixels.astype(np.uint8)).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """A picture of one colour as encoded bytes."""
    return paint


def write_colours(folder: Path) -> dict[str, str]:
    """The simplest web there is: pictures of one colour and its name, every other name in the web wrong."""
    names, splits = list(PAINT), {"web": 64, "human": 48, "val": 32, "test": 8}
    for number, (split, count) in enumerate(splits.items()):
        made = []
        for i in range(count):
            right = names[i % 4]
            text = names[(i + 1 + i // 4 % 3) % 4] if split == "web" and i % 2 else right
            truth = {"matches": text == right, "kind": "right" if text == right else "other"}
            meta = {"truth": truth} if split == "web" else {"captions": [{"text": text, "source": "human"}]}
            image = paint("PNG", colour=right, seed=1000 * number + i)
            made.append(Sample(f"{i:05d}", image, "png", text, meta))
        shards.write(folder / split / "00000.tar", made)
    return {split: str(folder / split) for split in splits}


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> Path:
    """A finished bootstrap on pictures of four colours: so little that its filter learns it in two seconds."""
    home = tmp_path_factory.mktemp("colours")
    mine = recipe(home, data=write_colours(home), select={"threshold": "calibrated", "recall": 0.7})
    longer = ("--set", "filter.steps=120", "--set", "filter.optimizer.lr=1e-2", "--set", "filter.log_every=40")
    done = call("bootstrap", mine, "--out", home / "run", *longer)
    assert done.code == 0, done.err
    return home / "run"


# ---- downloads from a server on loopback ----

AT_HOME = ("--allow-private", "127.0.0.0/8", "--host-rate", "0", "--thread-count", "8")


def write_list(folder: Path, urls: list[str]) -> Path:
    path = folder / "list.jsonl"
    rows = [{"url": url, "text": f"text {i}", "n": i} for i, url in enumerate(urls)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def url_list() -> Callable[[Path, list[str]], Path]:
    """Write a list of URLs with texts and numbers."""
    return write_list


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[..., Outcome]:
    """Run `capfilt download` on URLs, or on a list, into `out`."""

    def run(urls: list[str] | Path, *words: object, out: str = "out", address: str = "local") -> Outcome:
        path = urls if isinstance(urls, Path) else write_list(tmp_path, urls)
        text = () if "--caption-col" in words else ("--caption-col", "text")
        given = ("download", path, "--out", tmp_path / out, *text, *AT_HOME, *words, "--json")
        return call(*given, address=address)

    return run
