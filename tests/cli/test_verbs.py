from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import capfilt
from capfilt import cli

VERBS = (
    *("init", "estimate", "doctor"),
    *("bootstrap", "download", "pretrain", "finetune", "annotate", "select"),
    *("evaluate", "export", "show", "bench", "convert", "pack", "world"),
    *("embed", "dedup", "decontaminate", "index", "retrieve"),
    *("jobs", "status", "verify", "explain", "report", "review"),
)


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, list(words), terminal_width=200)
    return done.exit_code, done.stdout, done.stderr


def real(*words: str) -> subprocess.CompletedProcess[str]:
    """`python -m capfilt` in a process of its own, as a person starts it."""
    return subprocess.run([sys.executable, "-m", "capfilt", *words], capture_output=True, text=True, check=False)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, capfilt.cli; print([m for m in ('torch', 'ray', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_verbs_are_the_modules_of_pipelines() -> None:
    code, out, _ = run("--help")
    assert code == 0
    listed = re.findall(r"^│ (\w+) ", out, re.MULTILINE)
    assert set(listed) == set(VERBS)
    folder = Path(capfilt.__file__).parent / "pipelines"
    for verb in VERBS:
        assert any(
            (folder / home).exists() for home in (f"{verb}.py", verb, f"inspect/{verb}.py", f"near/{verb}.py")
        ), verb


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_s_help_has_an_example(verb: str) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    assert re.search(rf"Example: capfilt {verb} \S+", out)
    assert "--debug" in out
    assert "--json" in out


def test_the_examples_name_options_that_exist() -> None:
    for verb in VERBS:
        out = run(verb, "--help")[1]
        example, options = out.split("Example:", 1)[1].split("╭", 1)
        example = example.partition(", then")[0]  # another verb
        assert all(re.search(rf"{option}[ ,]", options) for option in re.findall(r"--[\w-]+", example))


def test_the_version() -> None:
    assert run("--version") == (0, f"{capfilt.__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["bootstrap", "demi"], 2, "error: there is no preset 'demi' in pipelines/. Did you mean 'demo'?"),
        (["bootstrap", "--rounds", "-1"], 2, "should be greater than or equal to 0"),
        (["bootstrap", "demo", "--set", "sede=1"], 2, "unknown key 'sede'. Did you mean 'seed'?"),
        (["bootstrap", "demo", "--set", "seed"], 2, "is no assignment; write it as --set a.b=c"),
        (["bootstrap", "--ruonds", "1"], 2, "No such option: --ruonds"),
        (["pretrain", "blip-tiny"], 2, "Missing option '--out'"),
        (["annotat"], 2, "No such command 'annotat'"),
        ([], 2, "Usage: "),
    ],
)
def test_usage_errors_leave_with_two(words: list[str], code: int, said: str) -> None:
    result, out, err = run(*words)
    assert result == code
    assert said in " ".join((out + err).split())


def test_a_process_leaves_with_the_code_and_one_line() -> None:
    done = real("show", "demo", "--set", "rounds=many")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: --set rounds=many: 'rounds' is 'many': [^\n]*\n", done.stderr)
    done = real("pretrain", "--no-such-option")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    said = "error: there is no option --no-such-option. `python -m capfilt pretrain --help` lists what is allowed.\n"
    assert done.stderr == said


SPREAD = {
    "annotate": ("s", "--captioner", "c", "--filter", "f"),
    "select": ("s", "--annotations", "a"),
    "evaluate": ("m", "s"),
    "download": ("l",),
}


@pytest.mark.parametrize(
    ("verb", "option", "value"),
    [
        *((verb, "--workers", "-2") for verb in SPREAD),
        *((verb, "--cpus", "0") for verb in SPREAD if verb != "download"),
    ],
)
def test_workers_that_cannot_be_are_one_line(
    verb: str, option: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["capfilt", verb, *SPREAD[verb], "--out", "o", option, value])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: {option} is {value}: [^\n]*capfilt {verb} --help` lists [^\n]*\n", said)


def test_debug_shows_the_traceback() -> None:
    done = real("show", "nowhere", "--debug")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Traceback (most recent call last):"
    assert "RecipeError: there is no preset 'nowhere'" in done.stderr


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("capfilt boot", ["bootstrap"]),
        ("capfilt bootstrap de", ["demo"]),
        ("capfilt show blip/b", ["blip/base", "blip/base-answers", "blip/base-captioner", "blip/base-filter"]),
        ("capfilt select shards --recipe blip2", ["blip2-two"]),
    ],
)
def test_a_shell_completes_verbs_and_presets(line: str, completed: list[str]) -> None:
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_CAPFILT_COMPLETE": "complete_bash"}
    program = Path(sys.executable).with_name("capfilt")
    done = subprocess.run([program], env={**os.environ, **words}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == completed, done.stderr


@pytest.mark.parametrize("words", [(), *((verb,) for verb in VERBS)])
def test_h_is_help(words: tuple[str, ...]) -> None:
    assert run(*words, "-h") == run(*words, "--help")
