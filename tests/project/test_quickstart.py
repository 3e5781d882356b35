"""docs/quickstart.md is a transcript: each of its commands is run here, and answers as the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
from transcript import HOME, PAGE, Run, exchanges, in_a_shell, in_this_process, lasting, replay, steady

from capfilt import config as configs
from capfilt import presets
from capfilt.data import shards
from capfilt.models import BlipConfig
from capfilt.pipelines.bench.made_up import make_models


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


@pytest.mark.slow
def test_your_own_photographs(shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the section, on 200 photographs, half with a text beside, and two random checkpoints."""
    pictures = sorted((shared_dir / "photos" / "images").glob("*.jpg"))
    if not pictures:
        pytest.skip("no photographs beside the checkout")
    (tmp_path / "photos").mkdir()
    for number, picture in enumerate(pictures):
        (tmp_path / "photos" / picture.name).symlink_to(picture)
        if number % 2:
            (tmp_path / "photos" / f"{picture.stem}.txt").write_text("a photograph of something")
    architecture = configs.read(presets.find("models", "blip/tiny"), BlipConfig)
    make_models(architecture, tmp_path / "models", shared=False)
    section = PAGE.read_text().split("## Your own photographs", 1)[1].split("```bash\n", 1)[1].split("```", 1)[0]
    commands = section.splitlines()
    assert [command.split()[1] for command in commands] == ["init", "annotate", "select", "report"], "and pip install"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    printed = ""
    for command in commands:
        where = " --address local" if " annotate " in command else ""
        answer, code = in_this_process(command + where, tmp_path)
        assert code == 0, answer
        printed += answer
    assert all(command in printed for command in commands[1:]), "init prints what comes next"
    kept = [item for tar in shards.expand(str(tmp_path / "runs/photos-clean/dataset")) for item in shards.read(tar)]
    assert 40 <= len(kept) <= 200
    assert (tmp_path / "runs/photos-clean/report.html").stat().st_size > 100_000


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
