from __future__ import annotations

import re

import pytest

from capfilt import errors
from capfilt.errors import CapfiltError, DataError, RecipeError, RunError, UsageError, did_you_mean


def classes() -> list[type[CapfiltError]]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, CapfiltError)]


def test_the_docstring_draws_every_class_with_its_exit_code() -> None:
    drawn = re.findall(r"(?:^ {4}|─ )(\w+Error)(?: +exit code (\d))?", errors.__doc__ or "", re.MULTILINE)
    codes = {name: int(code or 1) for name, code in drawn}
    assert codes == {c.__name__: c.exit_code for c in classes()}


def test_usage_and_recipe_exit_with_2_and_runs_with_1() -> None:
    assert (UsageError.exit_code, RecipeError.exit_code, RunError.exit_code) == (2, 2, 1)


@pytest.mark.parametrize("name", ["ShardError", "ImageError", "TextError"])
def test_faults_of_data_are_data_errors(name: str) -> None:
    assert issubclass(getattr(errors, name), DataError)


@pytest.mark.parametrize(
    ("found", "allowed", "said"),
    [
        ("lrr", ["lr", "steps"], " Did you mean 'lr'?"),
        ("Blip/Base", ["blip/base", "clip/base"], " Did you mean 'blip/base'?"),
        ("demo", ["bootstrap/demo", "memo"], " Did you mean 'bootstrap/demo'?"),
        ("lr", ["optimizer.lr"], " Did you mean 'optimizer.lr'?"),
        ("zzz", ["lr", "steps"], ""),
        ("lr", [], ""),
        ("", ["lr"], ""),
    ],
)
def test_did_you_mean(found: str, allowed: list[str], said: str) -> None:
    assert did_you_mean(found, allowed) == said
