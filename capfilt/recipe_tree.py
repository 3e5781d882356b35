"""The tree of a recipe before it is validated: a YAML file over what it `extends:`, with `--set a.b=c` over both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from capfilt import presets
from capfilt.errors import RecipeError
from capfilt.printable import short_repr
from capfilt.yaml_loader import MAX_DEPTH, load_yaml, one_line, parse_value


class MergeRules(Protocol):
    """What a class of configs says of how its trees are merged; see `config.Config`."""

    @property
    def shelf(self) -> presets.Shelf: ...

    @property
    def folder(self) -> str: ...

    @property
    def extends_levels(self) -> int: ...

    @property
    def alternatives(self) -> frozenset[str]: ...

    @property
    def named_sections(self) -> frozenset[str]: ...


def read_tree(path: str | Path, kind: MergeRules, sets: Sequence[str] = ()) -> dict[str, Any]:
    """The tree of `read` before it is validated. RecipeError for what cannot be read or merged."""
    file = Path(path)
    tree = load_yaml(file)
    if "extends" in tree:
        tree = _merge(_parent(file, tree.pop("extends"), kind, kind.extends_levels), tree, kind)
    return assign(tree, sets, kind)


def read_section(section: Mapping[str, Any], kind: MergeRules) -> dict[str, Any]:
    """The tree of a section with the key `extends`: over the preset of `kind`, or the YAML file, that it names."""
    above = dict(section)
    name = _preset_name(above.pop("extends"), "the section")
    return _merge(read_tree(presets.find(kind.shelf, name, kind.folder), kind), above, kind)


def _parent(file: Path, name: object, kind: MergeRules, levels: int) -> dict[str, Any]:
    name = _preset_name(name, file)
    relative = name.endswith((".yaml", ".yml"))
    parent = file.parent / name if relative else presets.find(kind.shelf, name, within=kind.folder or file.parent.name)
    tree = load_yaml(parent)
    if "extends" not in tree:
        return tree
    if levels == 1:
        allowed = "one level is allowed" if kind.extends_levels == 1 else f"{kind.extends_levels} levels are allowed"
        raise RecipeError(
            f"{file} extends {name!r}, which itself extends {short_repr(tree['extends'])}; {allowed}."
            f" Extend {short_repr(tree['extends'])}, or write the keys of {name!r} out."
        )
    return _merge(_parent(parent, tree.pop("extends"), kind, levels - 1), tree, kind)


def _preset_name(name: object, where: object) -> str:
    if not isinstance(name, str):
        raise RecipeError(
            f"{where}: 'extends' is {short_repr(name)}; it takes one preset name or the path of one .yaml file."
        )
    return name


def _merge(below: dict[str, Any], above: dict[str, Any], kind: MergeRules) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = below.get(key)
        if key in kind.named_sections and isinstance(value, dict):
            inner = {} if "extends" in value else _as_section(inner)
        if isinstance(value, dict) and isinstance(inner, dict) and _same_kind(inner, value, kind.alternatives):
            value = _merge(inner, value, kind)
        merged[key] = value
    return merged


def _as_section(value: Any) -> Any:
    """A section that may be given as a name, as a mapping."""
    return {"extends": value} if isinstance(value, str) else value


def _same_kind(below: dict[str, Any], above: dict[str, Any], alternatives: frozenset[str]) -> bool:
    return not above or below.keys() & alternatives == above.keys() & alternatives


def parse_assignment(assignment: str) -> tuple[list[str], str, Any]:
    """Parents, key and value of "a.b=c"."""
    dotted, equals, text = assignment.partition("=")
    *parents, last = dotted.strip().split(".")
    shown = short_repr(assignment, 200)
    if not equals or not all([*parents, last]) or len(parents) >= MAX_DEPTH:
        raise RecipeError(f"--set {shown} is no assignment; write it as --set a.b=c.")
    try:
        return parents, last, parse_value(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"--set {shown}: the value is no YAML: {one_line(error)}.") from None


def assign(tree: dict[str, Any], sets: Sequence[str], kind: MergeRules) -> dict[str, Any]:
    """`tree` with the "a.b=c" assignments of `sets`. RecipeError for one that is malformed or does not fit."""
    for assignment in sets:
        _set(tree, assignment, kind)
    return tree


def _set(tree: dict[str, Any], assignment: str, kind: MergeRules) -> None:
    parents, last, value = parse_assignment(assignment)
    node = tree
    for depth, key in enumerate(parents):
        inner = {} if node.get(key) is None else node[key]
        if key in kind.named_sections:
            inner = _as_section(inner)
        if not isinstance(inner, dict):
            dotted, shown = ".".join(parents[: depth + 1]), short_repr(assignment, 200)
            raise RecipeError(
                f"--set {shown}: {dotted!r} is {short_repr(inner)} and has no keys; set {dotted!r} itself."
            )
        replaced = depth == len(parents) - 1 and last in kind.alternatives and last not in inner
        node[key] = {} if replaced else dict(inner)  # a copy: an alias in the YAML is the same dict
        node = node[key]
    node[last] = value
