"""A run folder that somebody else made: no verb reads, writes or deletes outside it, hangs on it or fills the memory.

Each hostile thing is done to a copy of a run that has something for every verb, and the verbs are run on that.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capfilt.runs.locking import lock

Attack = Callable[[Path, Path], None]
"""What is done to a run folder, given a folder of its victim."""

FOREIGN = 65534
MODELS = ("export", "evaluate")
"""The verbs that take a model in a run; the rest of the run is nothing to them."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make the file of another user")


def test_nothing_is_refused_of_an_honest_run(run_verbs: Any) -> None:
    answers = run_verbs()
    assert len(answers) == 11
    assert {name: done.code for name, done in answers.items()} == dict.fromkeys(answers, 0)


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
def test_a_link_out_of_the_folder_is_refused_before_anything_is_written(
    name: str, home: Any, victim: Any, run_verbs: Any
) -> None:
    link(name.strip(" /"), LINKS[name])(home.run, victim.folder)
    before = {p: p.lstat().st_mtime_ns for p in home.run.rglob("*")}
    for verb, done in run_verbs(without=() if name.startswith("pretrain") else MODELS).items():
        assert done.code == 1, verb
        assert "is a link" in done.err, (verb, done.err)
    assert {p: p.lstat().st_mtime_ns for p in home.run.rglob("*")} == before


# ---- what is no regular file ----

SPECIAL = (
    "plan.json", "recipe.yaml", "log.jsonl", "labels.jsonl", "fork.json", "ledger/annotate.plan.jsonl", "summary.json",
    "ledger/annotate/00000.json", "annotations/00000.parquet", "poison/annotate/00000.json", "pretrain/log.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_a_pipe_is_refused_and_waited_for_by_nobody(name: str, home: Any, victim: Any, run_verbs: Any) -> None:
    path = home.run / name
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    # A folder without a plan is no run, and may have annotations none the less.
    for verb, done in run_verbs(without=(*MODELS, *(["select"] if name == "plan.json" else []))).items():
        assert done.code == (2 if name == "plan.json" else 1), verb
        assert "no run folder" in done.err or "a device, a pipe or a socket" in done.err, (verb, done.err)


@as_root
def test_an_endless_output_does_not_make_verify_endless(home: Any, victim: Any, run_verbs: Any) -> None:
    done = json.loads((home.run / "ledger/annotate/00000.json").read_text())
    done["outputs"][0]["bytes"] = 0  # as a device has
    (home.run / "ledger/annotate/00000.json").write_text(json.dumps(done))
    (home.run / "annotations/00000.parquet").unlink()
    os.mknod(home.run / "annotations/00000.parquet", 0o20600, os.makedev(1, 5))  # /dev/zero
    for verb, answer in run_verbs(without=MODELS).items():
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


def output(path: str) -> Attack:
    """An output that lies elsewhere, as it is there."""

    def attack(run: Path, victim: Path) -> None:
        theirs = hashlib.sha256((victim / "a.parquet").read_bytes())
        size = (victim / "a.parquet").stat().st_size
        change(DONE, outputs=[{"path": path, "bytes": size, "sha256": theirs.hexdigest()}])(run, victim)

    return attack


def grow(name: str, size: int = 3 * 2**30) -> Attack:
    """A file with a hole, which takes no room on the disk."""

    def attack(run: Path, victim: Path) -> None:
        with (run / name).open("ab") as file:
            file.truncate(size)

    return attack


DONE, HEAD = "ledger/annotate/00000.json", "ledger/annotate.plan.jsonl"
DEEP, MANY = "[" * 100_000 + "]" * 100_000, "[" + "[]," * 8_000_000 + "[]]"
RECORDS: dict[str, tuple[Attack, tuple[str, ...], str]] = {
    "an output by its full path": (output("VICTIM/a.parquet"), ("verify",), ""),
    "an output above": (output("../victim/a.parquet"), ("verify",), ""),
    "a shard above": (change(DONE, shard="../../victim/00000"), ("verify",), ""),
    "a log above": (
        write(HEAD, '{"label": "x", "total": 9, "unit": "steps", "log": "../victim/log.jsonl"}\n'),
        ("status", "verify", "mend"),
        "leads out of the folder",
    ),
    "an output of half a character": (output("a\ud800"), ("verify",), ""),
    "a record of no device": (
        change("plan.json", decided={"annotate": {"precision": "x"}}),
        ("resume", "fork"),
        "does not say what annotate computes with",
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
    "a giant plan": (
        grow("plan.json"), ("status", "report", "resume", "mend", "fork", "select"), "larger than 192 MiB"
    ),
    "a giant completion": (grow(DONE), ("verify",), ""),
    "a giant plan of a stage": (grow(HEAD), ("status", "verify", "mend"), "larger than 192 MiB"),
    "giant labels": (grow("labels.jsonl"), (), ""),
    "a giant recipe": (grow("recipe.yaml"), ("report", "review", "resume"), "larger than 16 MiB"),
    "a giant log": (grow("log.jsonl"), (), ""),
    "a giant table": (grow("annotations/00000.parquet", 2**28), ("verify", "explain", "report", "select"), ""),
}  # fmt: skip


@pytest.mark.parametrize("what", RECORDS)
def test_a_hostile_record_leads_nowhere_and_costs_little(what: str, home: Any, victim: Any, run_verbs: Any) -> None:
    attack, refusing, said = RECORDS[what]
    attack(home.run, victim.folder)
    answers = run_verbs({"status", "verify", "report", "mend", "resume", *refusing})
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
def test_a_record_of_other_types_is_one_line(name: str, home: Any, victim: Any, run_verbs: Any) -> None:
    for text in WRONG:
        write(name, f"{text}\n{text}\n" if name.endswith("jsonl") else text)(home.run, victim.folder)
        assert run_verbs(READERS[name]).keys() == set(READERS[name])


@pytest.mark.parametrize(
    "name", ["data: 3", "data: {web: [[]]}", "select: [1]", "select: {threshold: x}", "[]", "data: {web: 1}"]
)
def test_a_recipe_of_other_types_is_one_line(name: str, home: Any, victim: Any, run_verbs: Any) -> None:
    """A bootstrap's recipe says where its shards are; a select's plan, where its annotations."""
    chosen: dict[str, Any] = {"verb": "select", "shards": []}
    for plan in ({"captioner": {}}, {**chosen, "shards": [3]}, {**chosen, "annotations": []}):
        write("plan.json", json.dumps(plan))(home.run, victim.folder)
        write("recipe.yaml", name)(home.run, victim.folder)
        answers = run_verbs(["report"])
        assert answers["report"].code in (1, 2) or plan.keys() == {"captioner"}, answers


# ---- fork.json ----


def adopted(home: Any, forked: Path) -> bool:
    """Whether a plain `annotate --out` takes over what a fork.json names, where all of its own work is withdrawn."""
    for path in (home.run / "ledger").rglob("0*.json"):
        path.unlink()
    shutil.rmtree(home.run / "annotations")
    done = home.call(*home.annotate, "--out", home.run)
    lock.release_all()
    assert done.code == 0, done.err
    return (home.run / "annotations/00000.parquet").stat().st_mtime_ns == 10**18


@pytest.fixture
def foreign(home: Any) -> Path:
    """Another run with the same annotations, where every user may read."""
    copy = Path(shutil.copytree(home.run, home.folder / "foreign/run"))
    os.utime(copy / "annotations/00000.parquet", ns=(10**18, 10**18))
    return copy


def test_a_fork_is_honoured_at_the_root_of_its_run_alone(home: Any, foreign: Path) -> None:
    for place, origin in ((home.folder, foreign.parent), (home.run / "ledger", foreign / "ledger")):
        (place / "fork.json").write_text(json.dumps({"from": str(origin)}))
        assert not adopted(home, foreign), place
        (place / "fork.json").unlink()
    (home.run / "fork.json").write_text(json.dumps({"from": str(foreign)}))
    assert adopted(home, foreign)


@as_root
def test_a_fork_of_another_user_is_refused(home: Any, foreign: Path) -> None:
    (home.run / "fork.json").write_text(json.dumps({"from": str(foreign)}))
    os.chown(home.run / "fork.json", FOREIGN, FOREIGN)
    (home.run / DONE).unlink()
    done = home.call(*home.annotate, "--out", home.run)
    lock.release_all()
    assert done.code == 1
    assert f"was written by user {FOREIGN}" in done.err
    assert not (home.run / DONE).exists()


@as_root
@pytest.mark.parametrize("owner", [0, FOREIGN])
def test_what_a_fork_takes_from_another_user_is_a_copy(owner: int, home: Any, foreign: Path) -> None:
    theirs = foreign / "annotations/00000.parquet"
    os.chown(theirs, owner, owner)
    (home.run / "fork.json").write_text(json.dumps({"from": str(foreign)}))
    assert adopted(home, foreign)
    ours = home.run / "annotations/00000.parquet"
    assert (ours.stat().st_ino == theirs.stat().st_ino) == (owner == 0)
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.stat().st_uid == 0
