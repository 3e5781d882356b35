from __future__ import annotations

import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from capfilt.cli import data, models, near, pipelines, run_folder
from capfilt.cli import execute as executing
from capfilt.cli.execute import execute
from capfilt.errors import ClusterError, RecipeError, RunError, ShortfallError
from capfilt.runs import progress
from capfilt.runs.locking import lock


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RecipeError("no such key"), 2, "error: no such key\n"),
        (ClusterError("no such node"), 1, "error: no such node\n"),
        (
            OSError(28, "No space left"),
            1,
            "error: [Errno 28] No space left; nothing that was committed is lost, run the same command again\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted: run the same command again to go on\n"),
    ],
)  # fmt: skip
def test_every_end_has_its_code_and_its_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_: object) -> None:
        raise error

    with pytest.raises(typer.Exit) as left:
        execute(work, as_json=False, debug=False)
    assert left.value.exit_code == code
    assert capsys.readouterr() == ("", said)


def test_a_verb_that_says_nothing_itself_is_said_to_be_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_AFTER", 0.01)
    said = io.StringIO()  # of its own: what another thread writes while capsys is emptied is lost
    monkeypatch.setattr(sys, "stderr", said)

    def silent_data() -> Any:
        give_up = time.monotonic() + 60
        while "\n" not in said.getvalue() and time.monotonic() < give_up:
            time.sleep(0.005)
        return SimpleNamespace(record={})

    executing.call(silent_data, {"as_json": False, "debug": False})
    assert said.getvalue() == "silent is at work ...\n"


CALLED = (
    *(pipelines.bootstrap, pipelines.pretrain, pipelines.finetune, pipelines.annotate, pipelines.select),
    *(near.embed, near.dedup, near.index, near.retrieve, near.decontaminate),
    *(data.convert, models.evaluate, models.export, run_folder.explain),
)


@pytest.mark.parametrize("verb", CALLED, ids=lambda verb: verb.__name__)
def test_options_are_parameters_of_the_public_function(verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[set[str]] = []

    def call(function: Any, given: dict[str, Any], *_: object, **__: object) -> None:
        names = {executing._NAMES.get(name, name) for name in given}
        called.append(names - {"as_json", "debug"} - set(inspect.signature(function).parameters))

    monkeypatch.setattr(inspect.getmodule(verb), "call", call)
    verb(**{name: data.Task.vqa if name == "task" else None for name in inspect.signature(verb).parameters})
    assert called == [set()]


def test_our_own_bugs_keep_their_traceback() -> None:
    def work(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        execute(work, as_json=False, debug=False)


def test_a_result_is_lines_for_people_and_json_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"model": "a/b", "figures": {"auc": 0.123456, "texts": {"web": 3}}}
    execute(lambda _: result, as_json=False, debug=False)
    assert capsys.readouterr().out.split() == ["model", "a/b", "figures.auc", "0.1235", "figures.texts.web", "3"]
    execute(lambda _: result, as_json=True, debug=False)
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize(("as_json", "said"), [(True, '{\n "kept": 0\n}\n'), (False, f"{'kept':<28} 0\n")])
def test_a_command_that_falls_short_prints_its_result_and_leaves_with_1(
    as_json: bool, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_: object) -> None:
        raise ShortfallError("none of 3 samples", {"kept": 0})

    with pytest.raises(typer.Exit) as left:
        execute(work, as_json=as_json, debug=False)
    assert left.value.exit_code == 1
    assert capsys.readouterr() == (said, "error: none of 3 samples\n")


def test_a_preemption_leaves_as_ctrl_c_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def work(_: object) -> None:
        lock.acquire_once(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as left:
        execute(work, as_json=False, debug=False)
    assert left.value.exit_code == 143
    assert capsys.readouterr().err == "interrupted: run the same command again to go on\n"
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


WAITS = (
    "import sys, time, typer; from capfilt.cli.execute import execute\n"
    "def work(_):\n print('at work', flush=True); time.sleep(60)\n"
    "try: execute(work, as_json=False, debug=False)\n"
    "except typer.Exit as end: sys.exit(end.exit_code)"
)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_whatever_it_was_started_to_ignore(
    ignore_signals: Any, sent: signal.Signals, code: int
) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "preexec_fn": ignore_signals}
    with subprocess.Popen([sys.executable, "-c", WAITS], **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == "at work\n"
        child.send_signal(sent)
        _, err = child.communicate(timeout=100)
    assert (child.returncode, err) == (code, "interrupted: run the same command again to go on\n")


def test_a_second_sigterm_disturbs_nobody_who_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    left = []

    def work(_: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            left.append("in order")

    with pytest.raises(typer.Exit):
        execute(work, as_json=False, debug=False)
    assert left == ["in order"]


def test_what_others_do_on_signals_is_theirs_again_afterwards() -> None:
    mine = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        execute(lambda _: {}, as_json=False, debug=False)
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == mine


def test_a_run_that_lost_its_lock_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = lock.acquire
    monkeypatch.setattr(lock, "acquire", lambda folder: acquire(folder, interval=0.05))

    def work(_: object) -> None:
        lock.acquire_once(tmp_path).path.unlink()
        time.sleep(30)

    with pytest.raises(typer.Exit) as left:
        execute(work, as_json=False, debug=False)
    assert left.value.exit_code == 1
    assert "was removed while the run was working; this command stops" in capsys.readouterr().err


def test_what_is_done_does_not_fail_by_what_may_come_next(capsys: pytest.CaptureFixture[str]) -> None:
    def then(_result: object) -> list[tuple[str, str]]:
        raise RunError("the run folder is gone")

    execute(lambda _show: {"kept": 3}, as_json=False, debug=False, then=then)
    assert capsys.readouterr().out.split() == ["kept", "3"]
