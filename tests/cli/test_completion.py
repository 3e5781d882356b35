"""Completion in bash, zsh and fish: verbs, options and presets, asked as each shell asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CAPFILT = str(Path(sys.executable).with_name("capfilt"))


def ask(shell: str, line: str) -> str:
    """What `capfilt` answers when a shell asks how a line goes on."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)} if shell == "bash" else {
        "_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    environment = {**os.environ, **words, "_CAPFILT_COMPLETE": f"complete_{shell}"}
    done = subprocess.run([CAPFILT], env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "known", "other"),
    [
        ("capfilt boo", "bootstrap", "decontaminate"),
        ("capfilt estimate --pri", "--price", "--policy"),
        ("capfilt bootstrap blip-", "blip-cpu", "demo"),
        ("capfilt select --recipe lai", "laion-coco", "sieve"),
    ],
)
def test_verbs_options_and_presets(shell: str, line: str, known: str, other: str) -> None:
    answer = ask(shell, line)
    assert known in answer
    assert other not in answer


@pytest.mark.parametrize(("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", ".config/fish")])
def test_it_is_installed_where_the_shell_looks(shell: str, file: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    words = [CAPFILT, "--install-completion", shell]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / file).exists()
    scripts = [path for path in tmp_path.rglob("*capfilt*") if path.is_file()]
    assert len(scripts) == 1
    assert f"complete_{shell}" in scripts[0].read_text()


def test_bash_itself_completes(tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    environment = {**os.environ, "_CAPFILT_COMPLETE": "source_bash"}
    script = subprocess.run([CAPFILT], env=environment, capture_output=True, text=True, check=True).stdout
    (tmp_path / "completion.sh").write_text(script)
    typed = 'COMP_WORDS=(capfilt retr); COMP_CWORD=1; _capfilt_completion capfilt; printf "%s\\n" "${COMPREPLY[@]}"'
    path = f"{Path(CAPFILT).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f". {tmp_path}/completion.sh; {typed}"],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["retrieve"], done.stderr
