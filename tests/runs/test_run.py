from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from capfilt.errors import RunError, UsageError
from capfilt.runs import run as module
from capfilt.runs.ledger import FORMAT
from capfilt.runs.locking import lock
from capfilt.runs.locking.lock_file import LOCK_FOLDER, driver_of
from capfilt.runs.run import Run
from capfilt.storage.atomic import PART
from capfilt.storage.paths import listing, storage_path
from capfilt.storage.remote_path import RemotePath

PLAN: dict[str, Any] = {"recipe": {"lr": 0.1, "rounds": 2}, "inputs": ["00000", "00001"], "fingerprint": "f"}


@pytest.fixture(autouse=True)
def release_locks() -> Iterator[None]:
    yield
    lock.release_all()


def opened(out: Path, plan: dict[str, Any] | None = None, recipe: str = "rounds: 2\n") -> Run:
    return Run.open(out, recipe, PLAN if plan is None else plan)


def test_open_creates_the_folder_with_plan_and_recipe(tmp_path: Path) -> None:
    run = opened(tmp_path / "deep/run")
    assert not run.resumed
    assert sorted(os.listdir(run.folder)) == ["lock-1.json", "plan.json", "recipe.yaml"]
    lock.release_all()
    assert sorted(os.listdir(run.folder)) == ["plan.json", "recipe.yaml"]
    assert json.loads(run.path("plan.json").read_text()) == {**PLAN, "format": FORMAT}
    assert run.path("recipe.yaml").read_text() == "rounds: 2\n"


def test_an_equal_plan_resumes_and_touches_nothing(tmp_path: Path) -> None:
    opened(tmp_path / "run").round(1).joinpath("x").touch()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    again = opened(tmp_path / "run", {**PLAN, "inputs": ("00000", "00001")})
    assert again.resumed
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_another_plan_is_refused_naming_what_changed(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    other = {"recipe": {"lr": 0.2}, "inputs": ["00000", "00002"], "fingerprint": "f", "seed": 1}
    with pytest.raises(RunError) as caught:
        opened(tmp_path / "run", other)
    said = str(caught.value)
    assert (
        'inputs[1]: "00001" -> "00002"; recipe.lr: 0.1 -> 0.2; recipe.rounds: 2 -> absent; seed: absent -> 1.' in said
    )
    assert "fingerprint" not in said
    assert "Use another --out" in said
    assert json.loads((tmp_path / "run/plan.json").read_text()) == {**PLAN, "format": FORMAT}


@pytest.mark.parametrize(("found", "said"), [(None, "an earlier capfilt (format 1"), (FORMAT + 1, "a later capfilt")])
def test_a_run_of_another_format_is_refused_in_one_line_and_stays_as_it_is(
    tmp_path: Path, found: int | None, said: str
) -> None:
    opened(tmp_path / "run")
    lock.release_all()
    plan = PLAN if found is None else {**PLAN, "format": found}
    (tmp_path / "run/plan.json").write_text(json.dumps(plan))
    for attempt in (lambda: opened(tmp_path / "run"), lambda: module.fork(tmp_path / "run", tmp_path / "new")):
        with pytest.raises(RunError) as caught:
            attempt()
        assert said in str(caught.value)
        assert "begin anew in another --out" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "run/plan.json").read_text()) == plan
    assert sorted(os.listdir(tmp_path)) == ["run"]
    assert sorted(os.listdir(tmp_path / "run")) == ["plan.json", "recipe.yaml"]
    assert Run.load(tmp_path / "run").plan == plan, "it may be looked at"


def test_only_the_first_five_changes_are_named(tmp_path: Path) -> None:
    opened(tmp_path / "run", {f"k{i}": 0 for i in range(9)})
    with pytest.raises(RunError, match=r"k4: 0 -> 1 \(and 4 more\)\."):
        opened(tmp_path / "run", {f"k{i}": 1 for i in range(9)})


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ([1, 2], [1, 2, 3], "k: 2 items -> 3 items"),
        (1, True, "k: 1 -> true"),
        ("a" * 99, {}, 'k: "' + "a" * 56 + "... -> {}"),
        (None, 0, "k: null -> 0"),
    ],
)
def test_changes_are_reported_briefly(tmp_path: Path, old: Any, new: Any, said: str) -> None:
    opened(tmp_path / "run", {"k": old})
    with pytest.raises(RunError) as caught:
        opened(tmp_path / "run", {"k": new})
    assert f"otherwise: {said}. Use" in str(caught.value)


def test_a_folder_with_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match=r"holds 'thesis\.tex' but no plan\.json.*another --out"):
        opened(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_what_a_kill_leaves_before_the_plan_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("stale: true\n")
    (tmp_path / f"{PART}elsewhere-1-0").write_text("{")
    run = opened(tmp_path)
    assert not run.resumed
    assert run.path("recipe.yaml").read_text() == "rounds: 2\n"


@pytest.mark.parametrize("step", range(1, 8))
def test_a_kill_at_any_write_leaves_a_folder_that_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Die at the step-th system call that matters, without any clean-up, as a SIGKILL would."""
    left = [step]

    class Killed(BaseException):
        pass

    def mortal(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", mortal(Path.mkdir))
        patch.setattr(os, "replace", mortal(os.replace))
        patch.setattr(os, "fsync", mortal(os.fsync))
        patch.setattr(Path, "unlink", mortal(Path.unlink))
        try:
            opened(tmp_path / "run")
        except Killed:
            died = True
        else:
            died = False
    assert died
    run = opened(tmp_path / "run")
    assert json.loads(run.path("plan.json").read_text()) == {**PLAN, "format": FORMAT}
    assert run.path("recipe.yaml").read_text() == "rounds: 2\n"


def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]"):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(RunError, match=r"plan\.json"):
            opened(tmp_path)


def test_an_out_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="choose another --out"):
        opened(tmp_path / "file")
    with pytest.raises(RunError, match="choose another --out"):
        opened(tmp_path / "file" / "run")


def test_low_disk_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 5, 99_000_000))
    with pytest.raises(RunError, match=r"99 MB are free .* needs at least 100 MB"):
        opened(tmp_path / "deep/run")
    assert os.listdir(tmp_path) == []
    assert Run.open(tmp_path / "deep/run", "", PLAN, min_free_bytes=1_000_000).folder.is_dir()


def test_log_appends_lines_even_after_a_torn_one(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    run.log("started", shards=2, folder=Path("x"), loss=float("nan"), nested={"a": [float("inf")]})
    with run.path("log.jsonl").open("a") as file:
        file.write('{"ts": "cut by a k')
    opened(tmp_path / "run").log("resumed")
    first, torn, last = run.path("log.jsonl").read_text().splitlines()
    record = json.loads(first)
    assert record.pop("ts").endswith("+00:00")
    assert record == {"event": "started", "shards": 2, "folder": "x", "loss": "nan", "nested": {"a": ["inf"]}}
    assert torn.endswith("cut by a k")
    assert json.loads(last)["event"] == "resumed"


def test_a_second_driver_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from capfilt.runs.run import Run\n"
        "Run.open(Path(sys.argv[1]), 'rounds: 2\\n', {'rounds': 2}); print(1, flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir() if "lock" not in p.name}
        with pytest.raises(RunError, match=rf"is in use by process {child.pid} on"):
            opened(tmp_path, {"rounds": 2})
        assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir() if "lock" not in p.name} == before
        child.kill()
    assert opened(tmp_path, {"rounds": 2}).resumed


def test_rounds_and_summary(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    assert run.round(0) == run.round(0) == tmp_path / "run/round-0"
    assert run.round(0).is_dir()
    run.write_summary({"command": "bootstrap", "rounds": []})
    assert json.loads(run.path("summary.json").read_text()) == {"command": "bootstrap", "rounds": []}


def test_load_reads_and_writes_nothing(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    assert Run.load(tmp_path / "run").plan == {**PLAN, "format": FORMAT}
    with pytest.raises(RunError, match=r"no run folder: it holds no plan\.json"):
        Run.load(tmp_path)


def test_a_resume_sweeps_what_killed_writers_left(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    part = run.round(1) / f"{PART}elsewhere-1-0"
    part.touch()
    os.utime(part, (0, 0))
    opened(tmp_path / "run")
    assert not part.exists()
    assert module.MIN_FREE_BYTES == 100_000_000


def test_a_run_folder_on_a_store(store: RemotePath) -> None:
    out = store / "run"
    run = Run.open(out, "a: 1\n", {"verb": "toy"})
    assert not run.resumed
    assert driver_of(out).startswith(f"process {os.getpid()}")
    run.log("begin", loss=float("nan"))
    run.log("end")
    assert len((out / "log.jsonl").read_bytes().splitlines()) == 2
    lock.release_all()
    assert listing(out / LOCK_FOLDER) == {}
    assert Run.open(out, "a: 1\n", {"verb": "toy"}).resumed
    with pytest.raises(RunError, match="is the run folder of a `capfilt toy`"):
        Run.open(out, "a: 1\n", {"verb": "other"})
    (store / "else/a").write_bytes(b"abc")
    with pytest.raises(RunError, match="holds 'a' but no plan"):
        Run.open(store / "else", "", {})
    with pytest.raises(RunError, match="is no run folder"):
        Run.load(store / "else")


def test_a_store_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    fsspec.get_filesystem_class("zip")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises((RunError, UsageError)) as caught:
        Run.open(storage_path(f"zip://{tmp_path}/a.zip"), "", {})
    assert "\n" not in str(caught.value)
