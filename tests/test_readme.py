"""The README's tree names every module, no other, each once."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def tree_of_readme() -> list[str]:
    """The paths that the tree names, by its indentation."""
    block = re.search(r"## The house\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "the README has no tree under 'The house'"
    paths, folders = [], {}
    for line in block[1].splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth] = name
        if not name.endswith("/"):
            paths.append("".join(folders[i] for i in range(depth)) + name)
    return paths


def test_the_tree_names_every_module_once() -> None:
    named = tree_of_readme()
    there = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "capfilt").rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "capfilt"
    }
    assert len(named) == len(set(named))
    assert set(named) == there


def test_every_verb_is_in_the_table() -> None:
    from capfilt.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    told = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert told == verbs
