"""Recipes of strangers: small files that want to become large, deep or endless."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from textwrap import indent

import pytest
from typer.testing import CliRunner

from capfilt import config, yaml_loader
from capfilt.cli import app
from capfilt.data.policy import PolicyConfig
from capfilt.errors import RecipeError
from capfilt.models import read_architecture
from capfilt.printable import MAX_MESSAGE
from capfilt.yaml_loader import load_yaml


def laughs(levels: int = 9) -> str:
    """The billion laughs: each level is a list of nine of the level below."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int = 9) -> str:
    """The same with merge keys, which PyYAML writes out when it makes mappings."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


LARGE = "with its aliases written out it is larger than 2 MiB"
DEEP = "nested more than 50 deep"

BOMBS = {
    "billion laughs": (laughs(), LARGE),
    "billion laughs in a known key": (f"threshold:\n{indent(laughs(), '  ')}", LARGE),
    "merge keys": (merges(), LARGE),
    "one long text, often": (f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]", LARGE),
    "an alias in what it names": ("a: &a [*a]", "alias 'a' is inside the node that it names"),
    "an alias in what it names, by a merge": ("a: &a {<<: *a}", "alias 'a' is inside the node that it names"),
    "deep lists": ("a: " + "[" * 600, DEEP),
    "deep mappings": ("a: " + "{a: " * 600, DEEP),
    "deep blocks": ("\n".join(" " * n + "a:" for n in range(400)), DEEP),
    "many values": (f"a: [{'1,' * 10_000}]", LARGE),
    "many bytes": (f"# {'x' * (2**18)}", "larger than 2 MiB"),
    "6,000 digits": (f"threshold: {'9' * 6000}", "is no int"),
    "more than a machine holds": (f"threshold: {'9' * 30}", "is no int"),
    "more than a float holds": ("threshold: 1e999", "is no float"),
    "a tag and no such value": ("threshold: !!int cat", "is no int"),
    "no truth value": ("threshold: !!bool 7", "is no bool"),
    "a key that is a list": ("? [a, b]\n: 1", "unhashable key"),
    "a long key": (f"? {'k' * 100_000}\n: 1", "unknown key 'kkk"),
    "a long value": (f"threshold: {'v' * 100_000}", "'threshold' is 'vvv"),
    "many unknown keys": ("\n".join(f"k{n}: 1" for n in range(1000)), "(and 997 more)"),
    "escapes": ('"\\e]0;title\\a\\nerror: forged": 1', "unknown key '\\x1b]0;title\\x07\\nerror: forged'"),
}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What reading says, which must be one short line, come at once, and take no memory to speak of.

    The bound on sizes is a sixteenth of the real one, since PyYAML and the tracing of memory are slow.
    """
    monkeypatch.setattr(yaml_loader, "MAX_BYTES", yaml_loader.MAX_BYTES // 16)

    def read(text: str, *sets: str) -> str:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        tracemalloc.start()
        begun = time.perf_counter()
        try:
            with pytest.raises(RecipeError) as caught:
                config.read(path, PolicyConfig, sets)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert time.perf_counter() - begun < 20, "less than a second on an idle machine, tracing included"
        assert peak < 20e6
        message = str(caught.value)
        assert message.isprintable()
        assert len(message) <= MAX_MESSAGE
        return message

    return read


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_one_line(refused: Callable[..., str], bomb: str) -> None:
    text, said = BOMBS[bomb]
    assert said in refused(text)


def test_a_bomb_in_a_preset_that_is_extended_is_one_line(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(laughs())
    assert LARGE in refused("extends: base.yaml")


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        (f"threshold={'9' * 6000}", "is no int"),
        (f"threshold={'[' * 600}", DEEP),
        (f"threshold=[&a [1, 2], {', '.join(['*a'] * 5000)}]", LARGE),
        (f"{'a.' * 3000}a=1", "is no assignment"),
        (f"threshold={'x' * 100_000}", "'threshold' is 'xxx"),
        (f"{'x' * 100_000}", "is no assignment"),
        ("threshold=\x1b[2J", "the value is no YAML"),
    ],
)
def test_a_bomb_in_an_assignment_is_one_line(refused: Callable[..., str], assignment: str, said: str) -> None:
    assert said in refused("threshold: 0.5", assignment)


def test_aliases_as_people_use_them_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n")
    assert load_yaml(path) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": [{"x": 1, "y": 2}, {"x": 1, "y": 2}],
    }


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("r.yaml", "which itself extends"),  # itself
        ("other.yaml", "which itself extends"),  # which extends it
        ("x" * 5000 + ".yaml", "give a readable YAML file"),
        ('"a\\0.yaml"', "cannot be read"),
        ("\n" + indent(laughs(), "  "), LARGE),
    ],
)
def test_extends_leads_nowhere_in_one_line(tmp_path: Path, extends: str, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"extends: {extends}\nthreshold: 0.5\n")
    (tmp_path / "other.yaml").write_text("extends: r.yaml\n")
    done = CliRunner().invoke(app, ["show", str(path)])
    assert isinstance(done.exception, SystemExit), done.exception
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert said in line
    with pytest.raises(RecipeError, match=said):
        read_architecture(path)


def test_a_name_that_no_file_system_takes_is_one_line() -> None:
    for name in ("x" * 5000 + ".yaml", "a\0.yaml"):
        done = CliRunner().invoke(app, ["show", name])
        assert done.exit_code == 2
        assert len(done.stderr.splitlines()) == 1
