"""README and docs: what they say of folders, verbs, files, links and commands is so."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from capfilt import cli

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted([README, *ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"])
HISTORY = [ROOT / "CHANGELOG.md", ROOT / "LOG.md", *sorted(ROOT.glob("benchmarks/*.md"))]
"""These say what was, under the names of their day; only their links are held."""


def tree_of_readme() -> tuple[list[str], list[str]]:
    """The folders that the tree of the README lists: those of the project, and those of the package, in its order."""
    block = re.search(r"## The code\n\n```\n(.*?)```", README.read_text(), re.DOTALL)
    assert block, "the README has no tree under 'The code'"
    lines = re.findall(r"^( *)([\w/]+)/ +\S", block[1], re.MULTILINE)
    assert len(lines) == len(block[1].splitlines()), "a line of the tree is not a folder with what it is for"
    return [name for indent, name in lines if not indent], [name for indent, name in lines if indent]


def layers() -> list[set[str]]:
    """The layers of the import contract, from the top; a layer may hold several folders or modules."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (rooms,) = [contract for contract in contracts if contract["id"] == "rooms"]
    return [{name.strip(" ()") for name in re.split(r"[|:]", layer)} for layer in rooms["layers"]]


def test_it_can_be_read_at_once() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_the_tree_lists_every_folder_once_and_no_other() -> None:
    project, package = tree_of_readme()
    ignored = re.findall(r"^/([\w.]+)/$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
    unversioned = {*ignored, "shared", "__pycache__"}
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert sorted(project) == sorted(name for name in folders - unversioned if not name.endswith(".egg-info"))
    rooms = {path.parent.name for path in (ROOT / "capfilt").glob("*/*.py")}
    assert sorted(package) == sorted(rooms)


def test_the_tree_has_the_order_of_the_imports() -> None:
    _, package = tree_of_readme()
    depth = {name: number for number, layer in enumerate(layers()) for name in layer}
    assert [depth[name] for name in package] == sorted(depth[name] for name in package)


def test_contributing_has_the_order_of_the_imports() -> None:
    (order,) = re.findall(r"^`cli` →.*?`redact`$", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    assert [set(re.findall(r"\w+", layer)) for layer in order.split("→")] == layers()[1:]


def test_every_verb_is_in_the_table() -> None:
    verbs = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    listed = re.findall(r"^\| `(\w+)` \|", README.read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(verbs)


def test_every_page_is_linked_from_the_readme() -> None:
    linked = re.findall(r"\]\((docs/\w+\.md)\)", README.read_text())
    assert set(linked) == {f"docs/{path.name}" for path in ROOT.glob("docs/*.md")}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *HISTORY], ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_of_the_project_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:capfilt|tests|deploy|benchmarks|models|pipelines)/[\w./-]+)(?:::\w+)?`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def commands(page: Path) -> Iterator[list[str]]:
    """Every command line of capfilt in the shell blocks of a page, and in its transcripts (`console`)."""
    for block in re.findall(r"^```(?:bash|console)[^\n]*\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ")
            if command.startswith("capfilt ") and not command.startswith("capfilt --"):
                yield shlex.split(command, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_are_ones_that_capfilt_takes(page: Path) -> None:
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for verb, *words in commands(page):
        assert verbs[verb].make_context(verb, words).command is verbs[verb]


def test_there_are_commands_to_hold() -> None:
    assert len(list(commands(README))) >= 5
    assert len(list(commands(ROOT / "docs/quickstart.md"))) >= 10
