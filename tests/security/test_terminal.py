"""What reaches a terminal or a log from labels, names, captions and errors that somebody else chose."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import capfilt.data.annotations as tables
from capfilt.cli import app, main, terminal
from capfilt.cli import tables as printed
from capfilt.data.annotations import Annotation
from capfilt.data.policy import failure_class
from capfilt.pipelines.inspect import explain
from capfilt.printable import MAX_MESSAGE, MAX_NAME
from capfilt.runs import stage_status
from capfilt.runs.ledger import Ledger
from capfilt.runs.progress import Progress
from capfilt.runs.run import Run
from capfilt.runs.tally import MAX_REASONS, Tally
from capfilt.storage.atomic import write_json

# A title, the clipboard, a cleared screen in two spellings, a turned direction, a forged line, rich's markup, DEL.
EVIL = "\x1b]0;owned\x07\x1b]52;c;aGk=\x07\x1b[2J\x9b2J\u202e\r\nerror: forged [x] [bold]b\x7f"
NAMED = EVIL.replace("/", "")
TAIL = "error: forged [x] [bold]b\\x7f"
RAW = ("\x1b]", "\x1b[2J", "\x9b", "\u202e", "\x7f", "\x07", "\r")


def row(key: str, text: str, **more: Any) -> Annotation:
    own: dict[str, Any] = {"uid": "a" * 32, "sha256": "b" * 64, "captioner": EVIL, "filter": EVIL, "reason": ""}
    known: dict[str, Any] = {"source": "web", "candidate": 0, "itm": 0.5, "itc": 0.1, "seed": 0, "round": 0}
    return Annotation(key=key, text=text, **{**known, **own, **more})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that somebody else made."""
    folder = tmp_path / "run"
    ledger = Ledger(folder, "annotate")
    write_json(folder / "plan.json", {"verb": "annotate", "shards": [NAMED]})
    (folder / "recipe.yaml").write_text("{}")
    table = folder / "annotations" / f"{NAMED}.parquet"
    tables.write(table, [row("k", EVIL), row(EVIL, "", status="failed", reason=EVIL, itm=None, itc=None)])
    tally = Tally(Counter({"in": 2, "kept": 1, "failed": 1}), failed=Counter({EVIL: 1}))
    tally.texts["in"]["web"] = tally.texts["kept"]["web"] = 1
    stage_status.write_plan(ledger, stage_status.StagePlan(f"[/x] {EVIL}", 3, unit=EVIL), {NAMED: "f"})
    ledger.commit(NAMED, "f", [table], tally)
    stage_status.record_failure(ledger, EVIL, f"{EVIL} {'x' * 10**6}")
    owner = {"token": "t", "host": EVIL, "pid": 1, "machine": "elsewhere", "born": "1", "job": EVIL}
    (folder / "lock-1.json").write_text(json.dumps(owner) + "\n0\n")
    return folder


def call(*words: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a verb, of which every line is printable."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == code, done.stderr
    for stream in (done.stdout, done.stderr):
        assert all(line.isprintable() for line in stream.split("\n")), ascii(stream)
        assert not any(line.startswith("error: forged") for line in stream.split("\n"))
    return done.stdout, done.stderr


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner elsewhere is watched for a moment only."""
    monkeypatch.setattr("capfilt.runs.locking.lock_file.LockFile.is_alive", lambda *_: False)


def test_status_shows_a_label_as_it_is(run: Path) -> None:
    out, _ = call("status", run)
    assert "[/x]" in out
    assert "\\x1b]0;owned" in out
    assert f"1 samples failed: \\x1b]0;owned\\x07\\x1b]52;c;aGk=\\x07\\x1b[2J\\x9b2J\\u202e {TAIL}" in out
    assert max(map(len, out.split("\n"))) <= MAX_MESSAGE
    call("status", run, "--watch")


def test_json_is_exact_and_ascii(run: Path) -> None:
    out, _ = call("status", run, "--json")
    assert json.loads(out)["stages"][0]["label"] == f"[/x] {EVIL}"
    assert out.isascii()
    assert "\x7f" not in out
    out, _ = call("explain", run, "k", "--json")
    assert json.loads(out)["found"][0]["rows"][0]["text"] == EVIL


def test_verify_names_broken_shards(run: Path) -> None:
    (run / "annotations" / f"{NAMED}.parquet").write_bytes(b"torn")
    out, _ = call("verify", run, code=1)
    assert f"shard \\x1b]0;owned\\x07\\x1b]52;c;aGk=\\x07\\x1b[2J\\x9b2J\\u202e {TAIL}: " in out


def test_explain_shows_captions_keys_and_reasons(run: Path) -> None:
    out, _ = call("explain", run, "k")
    assert repr(EVIL) in out
    out, _ = call("explain", run, EVIL)
    assert f"failed: \\x1b]0;owned\\x07\\x1b]52;c;aGk=\\x07\\x1b[2J\\x9b2J\\u202e {TAIL}" in out
    _, err = call("explain", run, f"nobody {EVIL}", code=1)
    assert len(err.splitlines()) == 1


def test_a_long_caption_is_cut_for_people(run: Path) -> None:
    result = {
        "found": [{"folder": ".", "stage": "s", "shard": "1", "table": "t", "rows": [vars(row("k", "y" * 10**7))]}]
    }
    lines = list(explain.lines({**result, "models": {}}))
    assert sum(map(len, lines)) < 2000
    assert "… (10000000 characters)" in "".join(lines)


def test_jobs_of_other_people_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    job = {"id": f"[/x]{EVIL}", "verb": EVIL, "out": EVIL * 1000, "state": EVIL, "began": "2026-11-24T00:00:00+00:00"}
    printed.print_jobs({"address": EVIL, "jobs": [job]})
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert "[/x]" in out
    assert len(out) < 20_000


def test_a_job_s_log_keeps_its_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.pass_on(f"\x1b[36mone\x1b[0m\n{EVIL}\ntwo")
    out = capsys.readouterr().out
    assert out.startswith("one\n\\x1b]0;owned")
    assert out.endswith("\ntwo")
    assert not any(raw in out for raw in RAW)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_shows_labels_and_notes_as_they_are(is_terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    show, file = Progress(), io.StringIO()
    show.console = Console(file=file, force_terminal=is_terminal, width=400, highlight=False)
    with show.stage(f"[/x] {EVIL}", 2) as line:
        line.update(1, f"[/y] {EVIL}")
    show.say(f"[/z] {EVIL}")
    out = file.getvalue() + capsys.readouterr().err
    assert not any(raw in out.replace("\x1b[2K", "").replace("\r", "") for raw in RAW if raw != "\r")
    for shown in ("[/x]", "[/y]", "[/z]"):
        assert f"{shown} \\x1b]0;owned" in out


def test_a_usage_error_quotes_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["capfilt", "status", "run", f"more {EVIL}"])
    with pytest.raises(SystemExit, match="2"):
        main()
    err = capsys.readouterr().err
    assert "\\x1b]0;owned" in err
    assert not any(raw in err for raw in RAW)


def test_errors_of_the_machine_are_one_line(tmp_path: Path) -> None:
    def work(_show: object) -> None:
        raise OSError(EVIL)

    import typer

    from capfilt.cli.execute import execute

    own = typer.Typer()
    own.command()(lambda: execute(work, as_json=False, debug=False))
    done = CliRunner().invoke(own)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: \\x1b]0;owned")


# ---- what is written down ----


def test_a_log_s_texts_are_bounded(tmp_path: Path) -> None:
    Run(tmp_path, {}, False).log("failed", **{EVIL: EVIL * 10**5}, seconds=1.5)
    line = json.loads((tmp_path / "log.jsonl").read_bytes())
    assert line.pop("seconds") == 1.5
    assert max(map(len, [*line, *line.values()])) <= MAX_MESSAGE
    assert all(text.isprintable() for text in [*line, *line.values()])


def test_a_failed_shard_s_error_is_bounded(run: Path) -> None:
    ((shard, error),) = stage_status.read_failures(Ledger(run, "annotate")).items()
    assert shard == EVIL
    assert error.isprintable()
    assert len(error) <= MAX_MESSAGE
    assert len(stage_status.error_kind(EVIL * 10**5)) <= 120


def test_reasons_are_few_and_short_and_still_balance() -> None:
    failed = Counter({f"{failure_class(f'{EVIL * 1000}{i}')} {i}": 1 for i in range(5000)})
    tally = Tally(Counter({"in": 5000, "failed": 5000}), failed=failed)
    for i in range(5000):
        source = ("web", "synthetic")[i % 2]
        tally.texts["in"][source] += 2
        tally.texts["dropped"].update([f"{source}: {i}", f"{source}: often"])
    assert tally.imbalance() == ""
    written = tally.to_json()
    for counts in (written["failed"], written["texts"]["dropped"]):
        assert len(counts) <= MAX_REASONS
        assert all(name.isprintable() and len(name) <= MAX_NAME for name in counts)
    again = Tally.from_json(written)
    assert again.imbalance() == ""
    assert again.texts["dropped"]["web: often"] == 2500
    assert (again + again).imbalance() == ""
    assert len((again + Tally(failed=Counter({str(i): 1 for i in range(5000)}))).failed) <= MAX_REASONS
