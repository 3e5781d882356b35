"""The table of docs/mistakes.md is what `capfilt` answers, and nothing heavy is imported before it answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

import mistakes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes").resolve()
    mistakes.make_folder(folder)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[str, Any]]:
    words = [sys.executable, str(Path(mistakes.__file__)), "run", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_each_answer_is_one_line_with_its_code(outcomes: list[dict[str, Any]]) -> None:
    assert len(outcomes) == len(mistakes.MISTAKES) >= 30
    for (what, command, code), outcome in zip(mistakes.MISTAKES, outcomes, strict=True):
        assert outcome["code"] == code, f"{what}: capfilt {command}: {outcome['answer']}"
        lines = [line for line in outcome["answer"].splitlines() if line != "importing libraries ..."]
        assert [line[:7] for line in lines] == ["error: "], f"{what}: capfilt {command}: {outcome['answer']}"
        assert len(outcome["answer"]) < 800


def test_nothing_heavy_is_imported_first(outcomes: list[dict[str, Any]]) -> None:
    assert {tuple(outcome["heavy"]) for outcome in outcomes} == {()}


def test_nothing_is_written(folder: Path, outcomes: list[dict[str, Any]]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        *("broken.yaml", "mine.yaml", "runs", "shards", "urls.csv", "urls.list"),
    ]
    assert [path.name for path in (folder / "runs").iterdir()] == ["demo"]


def test_the_page_has_these_answers(folder: Path, outcomes: list[dict[str, Any]]) -> None:
    """`python tests/cli/mistakes.py` writes it anew."""
    written = [line for line in mistakes.PAGE.read_text().splitlines() if re.match(r"\| \d", line)]
    expected = [
        mistakes.row(number, what, command, mistakes.answer(outcome["answer"], folder), outcome["code"], "")
        for number, ((what, command, _), outcome) in enumerate(zip(mistakes.MISTAKES, outcomes, strict=True), 1)
    ]
    seconds = [re.fullmatch(r"(.*) (\d+\.\d\d) \|", line) for line in written]
    assert all(seconds), "each row ends with CPU seconds"
    assert [f"{match[1]}  |" for match in seconds if match] == expected
