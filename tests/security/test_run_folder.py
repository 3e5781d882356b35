"""A run folder that somebody else made: no verb reads, writes or deletes outside it, hangs on it or fills the memory.

One folder has what every verb wants; each hostile thing is done to a copy of it, and every verb is run on that.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import resource
import select
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from capfilt.cli import app
from capfilt.data import shards
from capfilt.data.sample import Sample
from capfilt.data.tokens import Tokenizer
from capfilt.errors import CapfiltError
from capfilt.models import weights
from capfilt.pipelines import review
from capfilt.reports import fence, labels, lock
from capfilt.reports.ledger import Ledger
from capfilt.reports.run import Run
from capfilt.reports.tally import Tally

Attack = Callable[[Path, Path], None]
"""What is done to a run folder, given a folder of its victim."""

SECRET = "the-victim-s-own-words"
THEIRS = json.dumps({"secret": SECRET, "step": 1}).encode() + b"\n"
FOREIGN = 65534
ROOM = 2**30
"""Bytes that a verb may add to the memory of this process."""
SECONDS = 60  # of a busy machine; alone none takes one
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make the file of another user")


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
    weights.save(small_blip(), home.folder / "model")
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
        found = {str(p.relative_to(self.folder)): p.lstat() for p in sorted(self.folder.rglob("*"))}
        return {name: (s.st_ino, s.st_mode, s.st_nlink, s.st_size, s.st_mtime_ns) for name, s in found.items()}

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
    found = Victim(tmp_path / "victim", made)
    yield found
    found.close()


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
            server.desk.page()
            server.desk.give({"look": 0, "row": 0, "verdict": "right", "at_random": True})
    except CapfiltError as error:
        return Outcome(1, "", f"error: {error}\n")
    return Outcome(0, "", "")


MODELS = ("export", "evaluate")
"""The verbs that take a model in a run; the rest of the run is nothing to them."""


def all_verbs(home: Home, victim: Victim, without: tuple[str, ...] = ()) -> dict[str, Outcome]:
    """Run every verb; each answers in a line, and the victim is neither read nor touched."""
    answers = {}
    for name, verb in verbs(home).items():
        if name in without:
            continue
        try:
            answers[name] = done = verb()
        finally:
            lock.release_all()
        assert fence.raised() == (), name
        assert done.code in (0, 1, 2), (name, done)
        told = [line for line in done.err.splitlines() if line.startswith("error:")]
        broken = name == "verify" and not told  # it then lists what does not hold
        assert (len(told) == 1) == (done.code != 0) or broken, (name, done)
        assert all(len(line) < 2000 for line in told), (name, "a line for a person")
        assert SECRET not in done.out + done.err, name
        assert victim.opened() == [], name
        assert victim.state() == victim.before, name
    return answers


def test_nothing_is_refused_of_an_honest_run(home: Home, victim: Victim) -> None:
    assert {name: done.code for name, done in all_verbs(home, victim).items()} == dict.fromkeys(verbs(home), 0)


# ---- links ----


def link(name: str, to: str) -> Attack:
    def attack(run: Path, victim: Path) -> None:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(victim / to)

    return attack


LINKS = {
    "annotations": "annotations", "annotations/00000.parquet": "a.parquet", "dataset": "annotations",
    "ledger": "ledger", "ledger/annotate": "ledger/annotate", "ledger/annotate/00000.json": "00000.json",
    "ledger/annotate.plan.jsonl": "log.jsonl", "ledger/select": ".", "ledger/annotate.failed.jsonl": "log.jsonl",
    "log.jsonl": "log.jsonl", "labels.jsonl": "labels.jsonl", "labels.jsonl ": "nothing", "plan.json": "plan.json",
    "recipe.yaml": "plan.json", "round-1": ".", "round-1/": "pretrain", "poison": ".", "calibration.json": "00000.json",
    "pretrain": "pretrain", "pretrain/checkpoint": "pretrain/checkpoint", "summary.json": "00000.json",
    "pretrain/checkpoint/model.safetensors": "pretrain/checkpoint/model.safetensors", "data": ".",
    "fork.json": "plan.json",
}  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_folder_is_refused_before_anything_is_written(name: str, home: Home, victim: Victim) -> None:
    link(name.strip(" /"), LINKS[name])(home.run, victim.folder)
    before = {p: p.lstat().st_mtime_ns for p in home.run.rglob("*")}
    for verb, done in all_verbs(home, victim, () if name.startswith("pretrain") else MODELS).items():
        assert done.code == 1, verb
        assert "is a link" in done.err, (verb, done.err)
    assert {p: p.lstat().st_mtime_ns for p in home.run.rglob("*")} == before


# ---- what is no regular file ----

SPECIAL = (
    "plan.json", "recipe.yaml", "log.jsonl", "labels.jsonl", "fork.json", "ledger/annotate.plan.jsonl", "summary.json",
    "ledger/annotate/00000.json", "annotations/00000.parquet", "poison/annotate/00000.json", "pretrain/log.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_a_pipe_is_refused_and_waited_for_by_nobody(name: str, home: Home, victim: Victim) -> None:
    path = home.run / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    # A folder without a plan is no run, and may have annotations none the less.
    for verb, done in all_verbs(home, victim, (*MODELS, *(["select"] if name == "plan.json" else []))).items():
        assert done.code == 1, verb
        assert "no run folder" in done.err or "a device, a pipe or a socket" in done.err, (verb, done.err)


@as_root
def test_an_endless_output_does_not_make_verify_endless(home: Home, victim: Victim) -> None:
    done = json.loads((home.run / "ledger/annotate/00000.json").read_text())
    done["outputs"][0]["bytes"] = 0  # as a device has
    (home.run / "ledger/annotate/00000.json").write_text(json.dumps(done))
    (home.run / "annotations/00000.parquet").unlink()
    os.mknod(home.run / "annotations/00000.parquet", 0o20600, os.makedev(1, 5))  # /dev/zero
    for verb, answer in all_verbs(home, victim, MODELS).items():
        assert answer.code == 1, verb
        assert "a device, a pipe or a socket" in answer.err


# ---- records ----


def change(name: str, **fields: Any) -> Attack:
    """Other values in a record."""

    def attack(run: Path, victim: Path) -> None:
        tree = json.loads((run / name).read_text())
        tree.update(
            {key: json.loads(json.dumps(value).replace("VICTIM", str(victim))) for key, value in fields.items()}
        )
        (run / name).write_text(json.dumps(tree))

    return attack


def write(name: str, text: str) -> Attack:
    def attack(run: Path, victim: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text.replace("VICTIM", str(victim)))

    return attack


def grow(name: str, size: int = 3 * 2**30) -> Attack:
    """A file with a hole, which takes no room on the disk."""

    def attack(run: Path, victim: Path) -> None:
        with (run / name).open("ab") as file:
            file.truncate(size)

    return attack


DONE, HEAD = "ledger/annotate/00000.json", "ledger/annotate.plan.jsonl"
OUTPUT = {"bytes": len(THEIRS), "sha256": hashlib.sha256(THEIRS).hexdigest()}
DEEP, MANY = "[" * 100_000 + "]" * 100_000, "[" + "[]," * 8_000_000 + "[]]"
RECORDS: dict[str, tuple[Attack, tuple[str, ...], str]] = {
    "an output by its full path": (change(DONE, outputs=[{"path": "VICTIM/a.parquet", **OUTPUT}]), ("verify",), ""),
    "an output above": (change(DONE, outputs=[{"path": "../victim/a.parquet", **OUTPUT}]), ("verify",), ""),
    "a shard above": (change(DONE, shard="../../victim/00000"), ("verify",), ""),
    "a log above": (
        write(HEAD, '{"label": "x", "total": 9, "unit": "steps", "log": "../victim/log.jsonl"}\n'),
        ("status", "verify", "mend"),
        "leads out of the folder",
    ),
    "a part of no writer": (write(".capfilt-part-foo", ""), (), ""),
    "a part of a large number": (write(f".capfilt-part-{os.uname().nodename}-9999999999-0", ""), (), ""),
    "a deep plan": (write("plan.json", DEEP), ("status", "report", "resume", "mend", "fork"), "nested too deeply"),
    "a plan of many values": (write("plan.json", MANY), ("status", "report", "resume"), "more than 4000000 values"),
    "a deep plan of a stage": (write(HEAD, DEEP), ("status", "verify", "mend"), "nested too deeply"),
    "a deep completion": (write(DONE, DEEP), ("verify",), ""),
    "a completion of another type": (write(DONE, "[]"), ("verify",), ""),
    "a round of no number": (write("round-x/annotations/00000.parquet", ""), (), ""),
    "deep labels": (write("labels.jsonl", "{" + DEEP + "}"), ("report", "review"), "no label"),
    "deep figures": (write("summary.json", DEEP), ("report", "review"), "nested too deeply"),
    "a deep calibration": (write("calibration.json", f'{{"threshold": {DEEP}}}'), ("report",), "nested too deeply"),
    "a deep log": (write("log.jsonl", '{"event": ' + DEEP + "}"), ("report", "review"), "nested too deeply"),
    "a deep fork": (write("fork.json", DEEP), ("resume",), "nested too deeply"),
    "a fork of nothing": (write("fork.json", "{}"), ("resume",), "does not say"),
    "a fork above": (write("fork.json", '{"from": "../victim"}'), ("resume",), "no run folder in full"),
    "a giant plan": (grow("plan.json"), ("status", "report", "resume", "mend", "fork", "select"), "larger than 64 MiB"),
    "a giant completion": (grow(DONE), ("verify",), ""),
    "a giant plan of a stage": (grow(HEAD), ("status", "verify", "mend"), "larger than 64 MiB"),
    "giant labels": (grow("labels.jsonl"), (), ""),
    "a giant recipe": (grow("recipe.yaml"), ("report", "review", "resume"), "larger than 16 MiB"),
    "a giant log": (grow("log.jsonl"), (), ""),
    "a giant table": (grow("annotations/00000.parquet", 2**28), ("verify", "explain", "report", "select"), ""),
}  # fmt: skip


@pytest.mark.parametrize("what", RECORDS)
def test_a_hostile_record_leads_nowhere_and_costs_little(what: str, home: Home, victim: Victim) -> None:
    attack, refusing, said = RECORDS[what]
    attack(home.run, victim.folder)
    run = {"status", "verify", "report", "mend", "resume", *refusing}
    answers = all_verbs(home, victim, tuple(verbs(home).keys() - run))
    for verb in refusing:
        assert answers[verb].code == 1, (verb, answers[verb])
        assert said in answers[verb].err, (verb, answers[verb].err)
    if not refusing:
        assert {name: done.code for name, done in answers.items()} == dict.fromkeys(answers, 0)


WRONG = ("[]", "null", "3", '"x"', "{}", '{"a": [1]}', '[[], {"a": 1}]', "1e999", '{"step": "x"}', "{", "9" * 5000)
LOOKING = ("status", "verify", "explain", "report", "review", "select")
READERS: dict[str, tuple[str, ...]] = {
    "plan.json": (*LOOKING, "resume"), "recipe.yaml": ("report", "select"), "log.jsonl": ("report",),
    "labels.jsonl": ("report", "review"), "fork.json": ("resume",), HEAD: ("status", "verify"),
    "summary.json": ("report",), "calibration.json": ("report",), "pretrain/log.jsonl": ("report",),
    DONE: ("status", "verify", "explain"), "ledger/annotate.failed.jsonl": ("status",),
    "poison/annotate/00000.json": ("resume",),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_record_of_other_types_is_one_line(name: str, home: Home, victim: Victim) -> None:
    for text in WRONG:
        write(name, f"{text}\n{text}\n" if name.endswith("jsonl") else text)(home.run, victim.folder)
        all_verbs(home, victim, tuple(verbs(home).keys() - set(READERS[name])))


@pytest.mark.parametrize(
    "name", ["data: 3", "data: {web: [[]]}", "select: [1]", "select: {threshold: x}", "[]", "data: {web: 1}"]
)
def test_a_recipe_of_other_types_is_one_line(name: str, home: Home, victim: Victim) -> None:
    """A bootstrap's recipe says where its shards are; a select's plan, where its annotations."""
    chosen: dict[str, Any] = {"verb": "select", "shards": []}
    for plan in ({"captioner": {}}, {**chosen, "shards": [3]}, {**chosen, "annotations": []}):
        write("plan.json", json.dumps(plan))(home.run, victim.folder)
        write("recipe.yaml", name)(home.run, victim.folder)
        answers = all_verbs(home, victim, tuple(verbs(home).keys() - {"report"}))
        assert answers["report"].code in (1, 2) or plan.keys() == {"captioner"}, answers


# ---- fork.json ----


def adopted(home: Home, forked: Path) -> bool:
    """Whether a plain `annotate --out` takes over what a fork.json names, where all of its own work is withdrawn."""
    for path in (home.run / "ledger").rglob("0*.json"):
        path.unlink()
    shutil.rmtree(home.run / "annotations")
    done = call(*home.annotate, "--out", home.run)
    lock.release_all()
    assert done.code == 0, done.err
    return (home.run / "annotations/00000.parquet").stat().st_mtime_ns == 10**18


@pytest.fixture
def foreign(home: Home) -> Path:
    """Another run with the same annotations, where every user may read."""
    copy = Path(shutil.copytree(home.run, home.folder / "foreign/run"))
    os.utime(copy / "annotations/00000.parquet", ns=(10**18, 10**18))
    return copy


def test_a_fork_is_honoured_at_the_root_of_its_run_alone(home: Home, foreign: Path) -> None:
    for place, origin in ((home.folder, foreign.parent), (home.run / "ledger", foreign / "ledger")):
        (place / "fork.json").write_text(json.dumps({"from": str(origin)}))
        assert not adopted(home, foreign), place
        (place / "fork.json").unlink()
    (home.run / "fork.json").write_text(json.dumps({"from": str(foreign)}))
    assert adopted(home, foreign)


@as_root
def test_a_fork_of_another_user_is_refused(home: Home, foreign: Path) -> None:
    (home.run / "fork.json").write_text(json.dumps({"from": str(foreign)}))
    os.chown(home.run / "fork.json", FOREIGN, FOREIGN)
    (home.run / DONE).unlink()
    done = call(*home.annotate, "--out", home.run)
    lock.release_all()
    assert done.code == 1
    assert f"was written by user {FOREIGN}" in done.err
    assert not (home.run / DONE).exists()


@as_root
@pytest.mark.parametrize("owner", [0, FOREIGN])
def test_what_a_fork_takes_from_another_user_is_a_copy(owner: int, home: Home, foreign: Path) -> None:
    theirs = foreign / "annotations/00000.parquet"
    os.chown(theirs, owner, owner)
    (home.run / "fork.json").write_text(json.dumps({"from": str(foreign)}))
    assert adopted(home, foreign)
    ours = home.run / "annotations/00000.parquet"
    assert (ours.stat().st_ino == theirs.stat().st_ino) == (owner == 0)
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.stat().st_uid == 0
