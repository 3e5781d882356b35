"""Reads YAML into frozen, validated configs: `extends:`, `--set a.b=c`, and errors that name the key.

An error has one line: the dotted key as written, the value, what is allowed and the nearest name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import pydantic
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from capfilt import presets
from capfilt.errors import RecipeError, did_you_mean
from capfilt.printable import printable, short_repr
from capfilt.recipe_tree import assign, parse_assignment, read_section, read_tree
from capfilt.redact import redact_tree
from capfilt.yaml_loader import Dumper, load_yaml

_SHOWN = 3  # errors of one file in the message; the others are counted


class Config(pydantic.BaseModel):
    """The base of all configs: frozen, and an unknown key is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    shelf: ClassVar[presets.Shelf] = "pipelines"
    """The shelf of the presets that `extends:` names."""

    folder: ClassVar[str] = ""
    """The folder of that shelf whose presets may be named without it; "" = the name of the folder of the file."""

    extends_levels: ClassVar[int] = 1
    """How many files may extend each other in a row."""

    alternatives: ClassVar[frozenset[str]] = frozenset()
    """Keys that change the kind of a section: one that has it replaces what it extends and is not merged with it."""

    named_sections: ClassVar[frozenset[str]] = frozenset()
    """Keys of which `key: NAME` is short for `key: {extends: NAME}`, so that a part of the section can be set alone."""

    def check_input(self, layers: Sequence[Layer]) -> None:
        """Refuse what fits its type and makes no sense from a user, such as a key without effect. Raises RecipeError.

        `layers` are what this config was read from, the first one below. A config is not checked so when it is read
        back from a run folder, which may be older than a check and holds every default.
        """
        for name in type(self).model_fields:
            if isinstance(section := getattr(self, name), Config):
                section.check_input([layer.section(name) for layer in layers])


@dataclass(frozen=True)
class Layer:
    """One source of the keys of a config: a YAML file without what it extends, or the words of --set."""

    where: str
    """The file; "" for the words of --set."""
    given: Mapping[str, Any]
    """What it gives."""
    merged: Mapping[str, Any]
    """This over the sources below it, not validated."""
    prefix: str = ""
    """The dotted key of the section, with a dot at its end; "" for a whole recipe."""

    def section(self, name: str) -> Layer:
        """The same source of one section."""
        given, merged = (tree.get(name) for tree in (self.given, self.merged))
        given, merged = (tree if isinstance(tree, Mapping) else {} for tree in (given, merged))
        return Layer(self.where, given, merged, f"{self.prefix}{name}.")

    def error(self, key: str, reason: str) -> RecipeError:
        """The error of a value that this source gives."""
        where = f"{self.where}: " if self.where else ""
        return RecipeError(f"{where}{self.prefix + key!r} is {short_repr(self.given[key])}: {reason}.")


def added(default: Any, **constraints: Any) -> Any:
    """A field that is newer than runs on users' disks; pydantic's Field with a default.

    At its default it is left out of dumps, so that a run that never heard of it keeps its fingerprint.
    """
    return pydantic.Field(default=default, exclude_if=lambda value: value == default, **constraints)


C = TypeVar("C", bound=Config)


class OpenSection:
    """Reads a section of several possible classes, of which one of its keys names one, as in `family: blip`.

    For pydantic's BeforeValidator. Unlike a union, the classes are looked up at each reading, so their table may grow.
    """

    def __init__(
        self,
        key: str,
        classes: Callable[[], Mapping[str, type[Config]]],
        default: str,
        base: type[Config] | None = None,
    ):
        """`default`: the name for a section without the key; `base`: whose presets it may extend, None for none."""
        self.key, self.classes, self.default, self.base = key, classes, default, base

    def __call__(self, value: Any) -> Any:
        """Read a mapping as the class that it names; return any other value as it is.

        Raises:
            RecipeError: what it extends cannot be read.
        """
        if not isinstance(value, Mapping):
            if self.base is not None and not isinstance(value, str | Config):
                raise ValueError("give the name of a preset, a .yaml file, or a section")
            return value
        value, classes = self._whole(value), self.classes()
        named = value.get(self.key, self.default)
        if named not in classes:
            known = ", ".join(name for name in classes if name) or "none"
            near = did_you_mean(str(named), classes)
            listed = f".{near} There are" if near else "; there are"
            raise ValueError(f"there is no {self.key} {short_repr(named)}{listed}: {known}")
        return classes[named].model_validate(value)

    def classes_of(self, value: Any) -> list[type[Config]]:
        """The classes that the section may be of: the one that it names, or all."""
        classes = self.classes()
        named = self._whole(value).get(self.key, self.default) if isinstance(value, Mapping) else ""
        return [classes[named]] if isinstance(value, Mapping) and named in classes else [*classes.values()]

    def _whole(self, value: Mapping[str, Any]) -> Mapping[str, Any]:
        return value if self.base is None or "extends" not in value else read_section(value, self.base)


def read(path: str | Path, kind: type[C], sets: Sequence[str] = ()) -> C:
    """Read the YAML file `path` as a `kind`: over what it `extends:`, and with each "a.b=c" of `sets` over it.

    Raises:
        RecipeError: the file cannot be read, or a key or value does not fit.
    """
    below = Layer(str(path), load_yaml(Path(path)), read_tree(path, kind))
    above = Layer("", assign({}, sets, kind), read_tree(path, kind, sets))
    config = validate(kind, above.merged, Path(path), sets)
    config.check_input([below, above])
    return config


def build(kind: type[C], sets: Sequence[str] = ()) -> C:
    """A `kind` with its defaults and the "a.b=c" assignments of `sets`. Raises RecipeError as `read` does."""
    tree = assign({}, sets, kind)
    config = validate(kind, tree, "--set", sets)
    config.check_input([Layer("", tree, tree)])
    return config


def changed(config: C, sets: Sequence[str], where: object) -> C:
    """A config with the "a.b=c" assignments of `sets`, validated anew; `where` they come from, for the message.

    Raises:
        RecipeError: as `read`.
    """
    return validate(type(config), assign(config.model_dump(mode="json"), sets, type(config)), where)


def read_named(kind: type[C], name: str | None, sets: Sequence[str] = ()) -> C:
    """`read` of the preset of this name or the YAML file at this path; `build` without a name."""
    return build(kind, sets) if name is None else read(presets.find(kind.shelf, name, kind.folder), kind, sets)


def check_syntax(
    name: str | Path | None, sets: Sequence[str] = (), folder: str = "", shelf: presets.Shelf = "pipelines"
) -> None:
    """Raise RecipeError for a preset that does not exist, a file that is not YAML, or a malformed assignment in `sets`.

    These are the checks that do not need the recipe's class, whose import may take seconds.
    """
    if name is not None:
        load_yaml(presets.find(shelf, name, folder))
    for assignment in sets:
        parse_assignment(assignment)


def to_yaml(config: Config) -> str:
    """YAML from which `read` gives an equal config, except for secrets in URLs: the tree of `model_dump`."""
    return tree_to_yaml(redact_tree(config.model_dump(mode="json")))


def tree_to_yaml(tree: Any) -> str:
    """YAML of a JSON tree, a key a line."""
    # Escaped and not raw Unicode: PyYAML writes U+0085 as it is and reads it back as the end of a line.
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, width=110)


def value_to_yaml(value: Any) -> str:
    """YAML of a JSON value on one line."""
    return yaml.dump([value], Dumper=Dumper, sort_keys=False, width=float("inf"), default_flow_style=True).strip()[1:-1]


def full_tree(config: Config) -> dict[str, Any]:
    """The JSON tree of a config with every field, those too that dumps leave out at their defaults (`added`)."""
    return {name: plain(value) for name, value in config}


def plain(value: Any) -> Any:
    """A value of a config as JSON has it."""
    if isinstance(value, Config):
        return full_tree(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return to_jsonable_python(value, fallback=str)


def digest(config: Config) -> str:
    """The sha256 of the canonical JSON: equal for equal configs, whatever their YAML looks like."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def validate(kind: type[C], tree: Any, where: object, sets: Sequence[str] = ()) -> C:
    """A config from a tree; `where` the tree comes from, for the message, and the assignments that are in it already.

    Raises:
        RecipeError: what does not fit.
    """
    try:
        return kind.model_validate(tree)
    except pydantic.ValidationError as error:
        details = error.errors(include_url=False)
        more = f" (and {len(details) - _SHOWN} more)" if len(details) > _SHOWN else ""
        messages: list[str] = []
        before = ""
        for detail in details[:_SHOWN]:
            if (origin := _origin(tree, detail, sets, where)) != before:
                messages.append(f"{origin}:")
            messages.append(_explain(kind, tree, detail))
            before = origin
        raise RecipeError(" ".join(messages) + more) from None


# ---- errors ----


def _origin(tree: Any, detail: Any, sets: Sequence[str], where: object) -> str:
    """Where one of pydantic's errors comes from: the last assignment that sets its key, or the file.

    A section that an assignment has changed in part does not fit as a whole, so the file is named with it.
    """
    key = _dotted(tree, detail["loc"])
    for assignment in reversed(sets):
        dotted, shown = assignment.partition("=")[0].strip(), f"--set {printable(assignment, 100)}"
        if f"{key}.".startswith(f"{dotted}."):
            return shown
        if f"{dotted}.".startswith(f"{key}.") or not key:
            alone = detail["type"] == "extra_forbidden" or str(where) == "--set"
            return shown if alone else f"{where} with {shown}"
    return str(where)


def _explain(kind: type[Config], tree: Any, detail: Any) -> str:
    """One of pydantic's error details as a sentence: the dotted key, its value, what is allowed."""
    location, value = detail["loc"], detail["input"]
    key = _dotted(tree, location)
    context = detail.get("ctx", {})
    if detail["type"] == "extra_forbidden":
        allowed = _allowed(kind, tree, location[:-1])
        return f"unknown key {key!r}.{did_you_mean(str(location[-1]), allowed)} Allowed here: {', '.join(allowed)}."
    if detail["type"] == "missing":
        return f"key {key!r} is missing; add it."
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    expected = str(context.get("expected") or context.get("expected_tags") or "")
    name = context.get("tag", value)
    near = did_you_mean(name, re.findall(r"'([^']*)'", expected)) if isinstance(name, str) else ""
    # The message of a validator of a whole section says what is wrong with it: leave the section itself out.
    subject = f"{key!r}" if key else "the recipe"
    subject += "" if isinstance(value, dict | pydantic.BaseModel) else f" is {short_repr(value)}"
    return f"{subject}: {message.rstrip('.')}.{near}"


def _dotted(tree: Any, location: Sequence[str | int]) -> str:
    """The dotted key of an error's location, without the names that pydantic inserts for members of a union."""
    *parents, last = location or ("",)
    written = []
    for part in parents:
        # A part that is neither a key of a dict nor an index of a list is a name that pydantic inserted.
        inner = tree if isinstance(tree, dict) else dict(enumerate(tree)) if isinstance(tree, list) else {}
        if part in inner:
            tree = inner[part]
            written.append(str(part))
    # So is the last part for a value that fits no member of a union; for a missing key it is the key.
    named = isinstance(tree, dict | list) or not written
    return ".".join([*written, str(last)] if named else written)


def _allowed(kind: type[pydantic.BaseModel], tree: Any, location: Iterable[str | int]) -> list[str]:
    """The keys of the section of `tree` at `location`, through nested models, lists, dicts and unions."""
    types: list[Any] = [kind]
    for part in location:
        try:
            inner_tree = tree[part]
        except (KeyError, IndexError, TypeError):
            inner_tree = tree
        # A part that leads nowhere is a name that pydantic inserted for a member of a union.
        types = [inner for type_ in types for inner in _types_below(type_, part, inner_tree)] or types
        tree = inner_tree
    return sorted({name for type_ in types if _is_model(type_) for name in type_.model_fields})


def _types_below(type_: Any, part: str | int, tree: Any) -> list[Any]:
    if _is_model(type_):
        if part in type_.model_fields:
            return field_types(type_.model_fields[part], tree)
        return [type_] if part in _tags(type_) else []
    if get_origin(type_) in (list, tuple, dict, Sequence):
        return [inner for argument in get_args(type_) for inner in members(argument)]
    return []


def field_types(field: FieldInfo, value: Any = None) -> list[Any]:
    """The types that a field may have: the members of a union, the classes of an open section, of which `value` may
    name one."""
    types = list(members(field.annotation))
    validators = [m.func for m in field.metadata if isinstance(m, pydantic.BeforeValidator)]
    sections = [section for section in validators if isinstance(section, OpenSection)]
    if not sections:
        return types
    return [*(type_ for type_ in types if not _is_model(type_)), *sections[0].classes_of(value)]


def members(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        yield from members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for argument in get_args(annotation):
            yield from members(argument)
    else:
        yield annotation


def _is_model(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, pydantic.BaseModel)


def _tags(model: type[pydantic.BaseModel]) -> set[Any]:
    literals = [get_args(f.annotation) for f in model.model_fields.values() if get_origin(f.annotation) is Literal]
    return {model.__name__, *(value for values in literals for value in values)}
