"""What the keys of a recipe mean: the docstrings beside the fields of its config classes, read from their source.

The source is parsed when somebody asks, so that no command pays for it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from capfilt import config as configs
from capfilt.config import Config
from capfilt.redact import redact_tree

WIDTH = 110
"""Columns of a comment."""

_PLAIN: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
}
"""One and several."""
_BOUNDS = {"min_length": "{:,} or more of them", "max_length": "at most {:,} of them", "ge": "{:,} or more"}
_BOUNDS |= {"gt": "above {:,}", "le": "at most {:,}", "lt": "below {:,}"}


@dataclass(frozen=True)
class Key:
    """What is to be known of a key, whatever its value."""

    name: str
    """Without the sections that it is in."""
    allowed: str
    """Its possible values in words: "a whole number, 1 or more"."""
    default: str | None
    """As YAML; None for a key that must be given, "" for a section with its own defaults."""
    meaning: str
    sections: tuple[type[Config], ...]
    """The classes of the section, or of the sections, that it holds."""


def keys_of(kind: type[Config]) -> list[Key]:
    """Every key of a section, in order."""
    docs = _docs(kind)
    return [_key(name, field, docs.get(name, "")) for name, field in kind.model_fields.items()]


def explained(config: Config) -> str:
    """The YAML of a config with every field, each with a comment: what it means, what it may be, its default.

    A class that stands in several places is commented where it comes first.
    """
    return "\n".join(_lines(config, redact_tree(configs.full_tree(config)), "", {}, "")) + "\n"


def key_tree(config: Config) -> dict[str, Any]:
    """The same for machines: the dotted name of a key -> its value, meaning, what is allowed, and its default unless
    it must be given."""
    return dict(_entries(config, redact_tree(configs.full_tree(config)), ""))


# ---- one key ----


def _key(name: str, field: FieldInfo, doc: str) -> Key:
    types = configs.field_types(field)
    sections = tuple(dict.fromkeys(section for type_ in types for section in _sections(type_)))
    described = f"{field.description[:1].upper()}{field.description[1:]}." if field.description else ""
    meaning = doc or described or (_one_line(sections[0].__doc__ or "") if sections else "")
    return Key(name, _allowed(types, field.metadata), _default(field), meaning, sections)


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config) and not value.model_fields_set:
        return ""
    return configs.value_to_yaml(configs.plain(value))


def _sections(type_: Any) -> Iterator[type[Config]]:
    if _is_section(type_):
        yield type_
    for argument in get_args(type_):
        yield from _sections(argument)


def _allowed(types: Sequence[Any], metadata: Sequence[Any] = (), several: bool = False) -> str:
    """The values of a union in words; "" for a section and nothing else."""
    if not several and all(_is_section(type_) for type_ in types):
        return ""
    literals = [configs.value_to_yaml(value) for type_ in types for value in _literals(type_)]
    words = list(dict.fromkeys(word for type_ in types if (word := _words(type_, several))))
    optional = ["null"] if type(None) in types else []
    return " or ".join([*([", ".join(literals)] if literals else []), *words, *optional]) + _bounds(metadata)


def _literals(type_: Any) -> tuple[Any, ...]:
    return get_args(type_) if get_origin(type_) is Literal else ()


def _words(type_: Any, several: bool) -> str:
    origin, arguments = get_origin(type_), get_args(type_)
    if type_ is type(None) or origin is Literal:
        return ""
    if type_ in _PLAIN:
        return _PLAIN[type_][several]
    if _is_section(type_):
        return "sections" if several else "a section"
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} {_allowed(arguments[:1], several=True)}"
    if origin in (tuple, list):
        return f"a list of {_allowed([*configs.members(arguments[0])], several=True)}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"names with {_allowed([*configs.members(arguments[1])], several=True)}"
    return "a path"


def _is_section(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, Config)


def _bounds(metadata: Sequence[Any]) -> str:
    """The least and the greatest value that are allowed, as the end of a sentence."""
    limits = {
        name: getattr(bound, name)
        for name in _BOUNDS
        for bound in metadata
        if isinstance(bound, annotated_types.BaseMetadata) and getattr(bound, name, None) is not None
    }
    if {"ge", "le"} <= limits.keys():
        return f", {limits['ge']:,} to {limits['le']:,}"
    return "".join(f", {_BOUNDS[name].format(limits[name])}" for name in _BOUNDS if name in limits)


# ---- docstrings ----


@functools.cache
def _docs(kind: type[Config]) -> dict[str, str]:
    """The docstring behind each field of a class and of what it inherits from, by the field's name."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if isinstance(base, type) and issubclass(base, Config) and base is not Config:
            docs |= _own_docs(base)
    return docs


def _own_docs(kind: type[Config]) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for statement, behind in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = behind.value.value if isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant) else ""
            if isinstance(text, str) and text:
                docs[statement.target.id] = _one_line(text)
    return docs


def _one_line(doc: str) -> str:
    """The first paragraph of a docstring."""
    return " ".join(inspect.cleandoc(doc).partition("\n\n")[0].split())


# ---- a config with comments ----


def _lines(config: Config, tree: Mapping[str, Any], indent: str, seen: dict[type, str], path: str) -> Iterator[str]:
    first = type(config) not in seen
    seen.setdefault(type(config), path)
    for key in keys_of(type(config)):
        value, dotted = getattr(config, key.name), f"{path}.{key.name}".removeprefix(".")
        if first:
            yield from _comment(key, indent)
        sections = _sections_in(value, tree[key.name], dotted)
        yield f"{indent}{key.name}:" if sections else f"{indent}{key.name}: {configs.value_to_yaml(tree[key.name])}"
        for place, section, inner in sections:
            if section is not value:
                yield f"{indent}-"
            if (before := seen.get(type(section))) is not None:
                yield f"{indent}  # Keys as in {before or 'the recipe'}."
            yield from _lines(section, inner, f"{indent}  ", seen, place)


def _sections_in(value: Any, tree: Any, place: str) -> list[tuple[str, Config, Any]]:
    """The sections that a key holds, alone or in a list: the dotted name and the tree of each."""
    if isinstance(value, Config):
        return [(place, value, tree)]
    items = enumerate(value) if isinstance(value, tuple | list) else ()
    return [(f"{place}.{i}", item, tree[i]) for i, item in items if isinstance(item, Config)]


def _comment(key: Key, indent: str) -> Iterator[str]:
    said = remark(key)
    text = f"{key.meaning} [{said}]" if said else key.meaning
    yield from textwrap.wrap(text.strip(), WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def remark(key: Key) -> str:
    """What a key may be, and its default; "" for a section with its own defaults."""
    default = "must be given" if key.default is None else f"default {key.default}" if key.default else ""
    return "; ".join(part for part in (key.allowed, default) if part)


def _entries(config: Config, tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in keys_of(type(config)):
        value, dotted = getattr(config, key.name), f"{path}.{key.name}".removeprefix(".")
        entry = {"value": tree[key.name], "meaning": key.meaning, "allowed": key.allowed}
        yield dotted, entry | ({"default": key.default} if key.default else {})
        for place, section, inner in _sections_in(value, tree[key.name], dotted):
            yield from _entries(section, inner, place)
