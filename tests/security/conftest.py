"""A run folder that has something for every verb, a folder that is nobody's business, and every verb within bounds."""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import select
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.data import labels, shards
from capfilt.data.sample import Sample
from capfilt.data.text.tokenizer import Tokenizer
from capfilt.errors import CapfiltError
from capfilt.models.checkpoints import store
from capfilt.reporting import review
from capfilt.runs.ledger import Ledger
from capfilt.runs.locking import lock
from capfilt.runs.run import Run
from capfilt.runs.tally import Tally
from capfilt.storage import write_guard

SECRET = "the-victim-s-own-words"
THEIRS = json.dumps({"secret": SECRET, "step": 1}).encode() + b"\n"
ROOM = 2**30
"""Bytes that a verb may add to the memory of this process."""
SECONDS = 60  # of a busy machine; alone none takes one


@dataclass(frozen=True)
class Outcome:
    """What a verb answered."""

    code: int
    out: str
    err: str


@contextmanager
def bounded() -> Iterator[None]:
    """A gigabyte of memory more than there is now, and some seconds."""
    (size,) = (int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (size * 1024 + ROOM, before[1]))
    previous = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _too_long(*_: object) -> None:
    raise AssertionError(f"a verb worked for more than {SECONDS} s")


def call(*words: object) -> Outcome:
    """Run `capfilt` in this process, within bounds; whatever is no line for a person is raised."""
    with bounded():
        done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Outcome(done.exit_code, done.stdout, done.stderr)


# ---- a run that has something for every verb ----


@dataclass(frozen=True)
class Home:
    """A folder with shards, a model and a run."""

    folder: Path
    call = staticmethod(call)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def annotate(self) -> tuple[object, ...]:
        """The command that made the run, but for its --out."""
        model, quick = self.folder / "model", ("--set", "decode.max_length=6", "--set", "decode.min_length=1")
        where = ("--captioner", model, "--filter", model, "--address", "local")
        return ("annotate", self.folder / "shards/00000.tar", *where, *quick)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_blip: Any) -> Home:
    """The run as its own user made it: annotated, selected from, with a log, labels, a model and a training."""
    home = Home(tmp_path_factory.mktemp("hostile"))
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(picture, "PNG")
    pairs = [Sample(f"{i:05d}", picture.getvalue() + bytes([i]), "png", f"a red thing {i}", {}) for i in range(2)]
    (home.folder / "shards").mkdir()
    shards.write(home.folder / "shards/00000.tar", pairs)
    store.save(small_blip(), home.folder / "model")
    Tokenizer.load("world").save(home.folder / "model")
    done = call(*home.annotate, "--out", home.run)
    assert done.code == 0, done.err
    run = Run.load(home.run)
    shutil.copytree(home.folder / "model", home.run / "pretrain/checkpoint")
    outputs = sorted((home.run / "pretrain/checkpoint").iterdir())
    Ledger(home.run, "pretrain").commit("model", "f", outputs, Tally.zero())
    run.log("worked", round=0, seconds=1)
    (home.run / "pretrain/log.jsonl").write_text('{"step": 1, "steps": 2, "itc": 1.5}\n')
    (home.run / "calibration.json").write_text('{"threshold": 0.5}')
    labels.append(home.run, labels.Label("0" * 32, "a text", "web", "right", True))
    return home


@pytest.fixture
def home(made: Home, tmp_path: Path) -> Home:
    """A copy, for one hostile thing; the shards and the model that the plan names stay where they are."""
    shutil.copytree(made.run, tmp_path / "run")
    for name in ("shards", "model"):
        (tmp_path / name).symlink_to(made.folder / name)
    text = (tmp_path / "run/plan.json").read_text()
    (tmp_path / "run/plan.json").write_text(text.replace(str(made.folder), str(tmp_path)))
    return Home(tmp_path)


class Victim:
    """A folder outside the run that looks like parts of one, and a watch over it: what is opened, and what changes."""

    def __init__(self, folder: Path, made: Home):
        self.folder = folder
        for name in ("annotations", "ledger", "pretrain"):
            shutil.copytree(made.run / name, folder / name)
        for name in (
            "00000.json",
            "plan.json",
            "labels.jsonl",
            "log.jsonl",
            ".capfilt-part-elsewhere-1-0",
            "a.parquet",
        ):
            (folder / name).write_bytes(THEIRS)
        os.utime(folder / ".capfilt-part-elsewhere-1-0", (0, 0))
        self.before = self.state()
        self._libc = ctypes.CDLL(None)
        self._watch = self._libc.inotify_init1(os.O_NONBLOCK)
        for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
            assert (
                self._libc.inotify_add_watch(self._watch, os.fsencode(path), 0x1 | 0x2 | 0x20) > 0
            )  # read, write, open

    def state(self) -> dict[str, tuple[object, ...]]:
        """Everything about every file."""
        result = {str(p.relative_to(self.folder)): p.lstat() for p in sorted(self.folder.rglob("*"))}
        return {name: (s.st_ino, s.st_mode, s.st_nlink, s.st_size, s.st_mtime_ns) for name, s in result.items()}

    def opened(self) -> list[str]:
        """The names of files that were opened since the last question; opening a folder reads nothing in it."""
        names, at = [], 0
        if not select.select([self._watch], [], [], 0)[0]:
            return []
        data = os.read(self._watch, 1 << 16)
        while at < len(data):
            mask, length = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (4, 12))
            name = data[at + 16 : at + 16 + length].rstrip(b"\0").decode()
            names += [name] if name and not mask & 0x40000000 else []  # of a file in it, and no folder
            at += 16 + length
        return names

    def close(self) -> None:
        os.close(self._watch)


@pytest.fixture
def victim(tmp_path: Path, made: Home) -> Iterator[Victim]:
    result = Victim(tmp_path / "victim", made)
    yield result
    result.close()


def verbs(home: Home) -> dict[str, Callable[[], Outcome]]:
    """Every verb that takes a run folder, those that only look first."""
    run, model = home.run, home.run / "pretrain/checkpoint"
    tar = home.folder / "shards/00000.tar"
    chosen = ("select", tar, "--annotations", run, "--out", home.folder / "selected", "--address", "local")
    examined = (tar, "--address", "local", "--set", "decode.max_length=6", "--set", "decode.min_length=1")
    return {
        "status": lambda: call("status", run),
        "verify": lambda: call("verify", run),
        "explain": lambda: call("explain", run, "00000"),
        "report": lambda: call("report", run, "--out", home.folder / "page.html"),
        "review": lambda: reviewed(run),
        "select": lambda: call(*chosen, "--set", "threshold=0.0"),
        "export": lambda: call("export", model, "--as", "capfilt", "--out", home.folder / "exported"),
        "evaluate": lambda: call("evaluate", model, *examined),
        "fork": lambda: call(*home.annotate, "--out", run, "--fork", home.folder / "forked"),
        "mend": lambda: call("verify", run, "--mend"),
        "resume": lambda: call(*home.annotate, "--out", run),
    }


def reviewed(run: Path) -> Outcome:
    """`capfilt review` without a browser: the page is made, and a text labelled."""
    try:
        with bounded(), review.open_server(run) as server:
            server.session.page()
            server.session.add_label({"look": 0, "row": 0, "verdict": "right", "at_random": True})
    except CapfiltError as error:
        return Outcome(error.exit_code, "", f"error: {error}\n")
    return Outcome(0, "", "")


def all_verbs(home: Home, victim: Victim, without: tuple[str, ...] = ()) -> dict[str, Outcome]:
    """Run every verb; each answers in a line, and the victim is neither read nor touched."""
    lock.release_all()  # those of tests that called a pipeline without a command around it
    answers, raised = {}, write_guard.active_guards()  # of locks that other tests left as those of the dead
    for name, verb in verbs(home).items():
        if name in without:
            continue
        try:
            answers[name] = done = verb()
        finally:
            lock.release_all()
        assert write_guard.active_guards() == raised, name
        assert done.code in (0, 1, 2), (name, done)
        answer = [line for line in done.err.splitlines() if line.startswith("error:")]
        broken = name == "verify" and not answer  # it then lists what does not hold
        assert (len(answer) == 1) == (done.code != 0) or broken, (name, done)
        assert all(len(line) < 2000 for line in answer), (name, "a line for a person")
        assert SECRET not in done.out + done.err, name
        assert victim.opened() == [], name
        assert victim.state() == victim.before, name
    return answers


@pytest.fixture
def run_verbs(home: Home, victim: Victim) -> Callable[..., dict[str, Outcome]]:
    """Run every verb, or `only` some, or all `without` some, on the home's run; what held for each is checked."""

    def run(only: Iterable[str] | None = None, without: Iterable[str] = ()) -> dict[str, Outcome]:
        every = verbs(home).keys()
        victim.opened()  # what the attacker looked at
        return all_verbs(home, victim, tuple(every - set(every if only is None else only) | set(without)))

    return run
