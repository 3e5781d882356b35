"""docs/quickstart.md is a transcript: each of its commands is run here, and answers as the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
from transcript import HOME, PAGE, Run, exchanges, in_a_shell, in_this_process, lasting, replay, steady


def run_all(folder: Path, run: Run) -> None:
    """Fails at the first command whose answer is another one."""
    for expected, now in replay(PAGE.read_text(), folder, run):
        line = f"$ {expected.command}\n"
        assert line + steady(now.answer) == line + steady(expected.answer), "python tests/fixtures/transcript.py"


@pytest.mark.slow
def test_each_command_answers_as_the_page_says(tmp_path: Path) -> None:
    run_all(tmp_path, in_this_process)


@pytest.mark.slow
def test_each_command_in_a_shell_of_its_own(tmp_path: Path) -> None:
    run_all(tmp_path, in_a_shell)


# ---- what is compared ----

BLOCK = """\
$ cat > a.py <<'EOF'
$ not a command
EOF
$ capfilt select a \\
    --out b
kept 3
$ python a.py
"""


def test_a_block_is_commands_with_their_answers() -> None:
    assert [(one.command, one.answer) for one in exchanges(BLOCK)] == [
        ("cat > a.py <<'EOF'\n$ not a command\nEOF", ""),
        ("capfilt select a \\\n    --out b", "kept 3\n"),
        ("python a.py", ""),
    ]


def test_a_changed_answer_is_seen() -> None:
    page = "```console\n$ echo one\none\n$ echo two\n2\n```\n"
    changed = [before.command for before, now in replay(page, Path("/"), in_a_shell) if before != now]
    assert changed == ["echo two"]


def test_exit_codes_and_paths_are_those_of_the_command(tmp_path: Path) -> None:
    page = "```console\n$ pwd\n$ capfilt show nowhere\n$ echo $?\n```\n"
    where, refused, code = (now.answer for _, now in replay(page, tmp_path, in_this_process))
    assert where == f"{HOME}\n"
    assert refused.startswith("error: there is no preset 'nowhere'")
    assert code == "2\n"


def test_what_passes_is_left_out() -> None:
    answer = (
        "importing torch ...\n"
        "annotate                 0/3 shards  1 s  waiting for the models\n"
        "annotate                 3/3 shards  9 s  120 images  13 images/s\n"
    )
    assert lasting(answer) == answer.splitlines(keepends=True)[2]


def test_numbers_of_a_machine_are_not_compared_and_others_are() -> None:
    line = "annotate                 3/3 shards  9 s  120 images  13 images/s"
    assert steady(line) == steady(line.replace("9 s", "1 s").replace("13 images", "1,300.5 images"))
    assert steady(line) != steady(line.replace("120 images", "121 images"))
    assert steady(line) != steady(line.replace("3/3", "4/4"))
    assert steady("samples.in 120") != steady("samples.in 12")
    assert steady("samples.kept       117") == steady("samples.kept   98")
    assert steady("error: no such file") != steady("error: no such folder")
