from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import capfilt
from capfilt import cli
from capfilt.errors import ClusterError, RecipeError

VERBS = ("bootstrap", "pretrain", "annotate", "select", "evaluate", "export", "show")


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
    assert all((folder / f"{verb}.py").is_file() for verb in VERBS)


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
        example, options = out.split("Example:")[1].split("╭")[0], out
        assert all(f"{option} " in options for option in re.findall(r"--\w+", example))


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
    found, out, err = run(*words)
    assert found == code
    assert said in " ".join((out + err).split())


def test_a_process_leaves_with_the_code_and_one_line() -> None:
    done = real("show", "demo", "--set", "rounds=many")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"error: .*demo\.yaml: 'rounds' is 'many': [^\n]*\n", done.stderr)
    done = real("pretrain", "--no-such-option")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: No such option: --no-such-option")


def test_debug_shows_the_traceback() -> None:
    done = real("show", "nowhere", "--debug")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Traceback (most recent call last):"
    assert "RecipeError: there is no preset 'nowhere'" in done.stderr


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

    with pytest.raises(cli.typer.Exit) as left:
        cli.execute(work, as_json=False, debug=False)
    assert left.value.exit_code == code
    assert capsys.readouterr() == ("", said)


def test_our_own_bugs_are_not_dressed_up() -> None:
    def work(_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.execute(work, as_json=False, debug=False)


def test_a_result_is_lines_for_people_and_json_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"model": "a/b", "figures": {"auc": 0.123456, "texts": {"web": 3}}}
    cli.execute(lambda _: result, as_json=False, debug=False)
    assert capsys.readouterr().out.split() == ["model", "a/b", "figures.auc", "0.1235", "figures.texts.web", "3"]
    cli.execute(lambda _: result, as_json=True, debug=False)
    assert cli.json.loads(capsys.readouterr().out) == result


def test_the_table_has_a_dash_for_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {
        "round": 1,
        "seconds": 61.7,
        "kept": {"web": 30, "synthetic": 0},
        "noise_ratio": {"web": 0.25, "synthetic": 1.0},
        "filter": {"auc": 0.98765, "precision": 0.9},
        "retrieval": {"tr@1": 12.34, "ir@1": 5.0},
        "captioning": {"cider": 40.06},
    }
    cli.print_rounds({"rounds": [{"round": 0, "seconds": 9.0}, measured]})
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    assert cells == [
        ["0", *"--------", "9"],
        ["1", "30 (75%)", "0 (0%)", "0.988", "0.900", "-", "12.3", "5.0", "40.1", "62"],
    ]
