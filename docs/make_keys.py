"""Writes docs/keys/: a page a kind of recipe that says of each key what it may be, its default and what it means.

    python docs/make_keys.py

The pages are made from the config classes and the docstrings beside their fields; tests/project/test_key_pages.py
compares them with the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from capfilt.config import Config
from capfilt.evaluation.config import EvaluateConfig
from capfilt.evaluation.tasks import TASKS
from capfilt.models import FAMILIES
from capfilt.pipelines.inspect import show
from capfilt.pipelines.inspect.keys import Key, keys_of

FOLDER = Path(__file__).with_name("keys")

TITLES = {
    "bootstrap": "Keys of a recipe of `capfilt bootstrap`",
    "pretrain": "Keys of a recipe of `capfilt pretrain`",
    "finetune": "Keys of a recipe of `capfilt finetune`",
    "annotate": "Keys of a recipe of `capfilt annotate`",
    "select": "Keys of a policy, the recipe of `capfilt select`",
    "evaluate": "Keys of `capfilt evaluate --set`",
}


def pages() -> dict[str, str]:
    """The text of every page, by the name of its file."""
    kinds = {name: kinds[0] for name, kinds in show.KINDS.items() if name != "models"}
    architectures = {family.config: f"[`{name}`]({name}.md)" for name, family in FAMILIES.items()}
    texts = {f"{name}.md": "\n".join(_page(TITLES[name], kind, architectures)) for name, kind in kinds.items()}
    texts["evaluate.md"] = "\n".join(_evaluate_page())
    for name, family in FAMILIES.items():
        texts[f"{name}.md"] = "\n".join(_page(f"Keys of an architecture of the family `{name}`", family.config, {}))
    return texts


def _page(title: str, kind: type[Config], elsewhere: Mapping[type[Config], str]) -> Iterator[str]:
    """A table for the recipe itself, and one for each section where its class comes first; `elsewhere`: links to the
    pages of classes that have one."""
    yield from _head(title)
    yield from _table(kind, "", {**elsewhere, kind: "the recipe"})
    yield ""


def _evaluate_page() -> Iterator[str]:
    """The keys of an evaluation without a task, and then of each task."""
    yield from _head(TITLES["evaluate"])
    links: dict[type[Config], str] = {EvaluateConfig: "the recipe"}
    yield from _table(EvaluateConfig, "", links)
    for name, task in TASKS.items():
        yield from ("", f"## `--task {name}`")
        yield from _table(task, "", links)
    yield ""


def _head(title: str) -> Iterator[str]:
    yield f"# {title}"
    yield ""
    yield "Made from the code by `python docs/make_keys.py`. `capfilt show RECIPE --explain` says the same beside a"
    yield "recipe's own values."


def _table(kind: type[Config], path: str, links: dict[type[Config], str]) -> Iterator[str]:
    yield from ("", "| key | values | default | meaning |", "|---|---|---|---|")
    first: list[tuple[type[Config], str]] = []
    for key in keys_of(kind):
        for section in key.sections:
            if section not in links:
                several = len([one for one in key.sections if one not in links]) > 1
                title = f"`{path}{key.name}`" + (f", {_plain_name(section)}" if several else "")
                anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                links[section] = f"[{title}](#{anchor})"
                first.append((section, title))
        default = "must be given" if key.default is None else f"`{key.default}`" if key.default else ""
        cells = (f"`{key.name}`", _values(key, links), default, key.meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    for section, title in first:
        yield from ("", f"## {title}")
        yield from _table(section, f"{title.partition(',')[0].strip('`')}.", links)


def _values(key: Key, links: Mapping[type[Config], str]) -> str:
    keys = " or ".join(links[section] for section in key.sections)
    return "; ".join(part for part in (key.allowed, f"keys: {keys}" if keys else "") if part)


def _plain_name(section: type[Config]) -> str:
    """`PretrainedConfig` as "pretrained"."""
    return section.__name__.removesuffix("Config").lower()


def write() -> None:
    """Write every page anew, and remove those of kinds that are no more."""
    FOLDER.mkdir(exist_ok=True)
    texts = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    write()
