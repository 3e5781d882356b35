"""Reads a YAML into a frozen, checked Config: one-level `extends:`, `--set a.b=c`, errors to act on.

PyYAML follows YAML 1.1, where `no` is false, 1:30 is 90, 010 is 8, 1e-4 is a text and 2026-11-24 a date. Here plain
words mean what they mean in YAML 1.2: null, true and false, numbers, and everything else is text. Of a key that is
written twice PyYAML takes the last one silently, which is refused here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import IO, Annotated, Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin

import pydantic
import yaml

from capfilt import presets
from capfilt.errors import RecipeError, did_you_mean
from capfilt.printable import printable, short_repr
from capfilt.redact import redact_tree

MAX_BYTES = 2 * 2**20
"""Bytes of a YAML, and of the tree in it when every alias is written out (NODE for each value besides its text)."""
NODE = 32
MAX_DEPTH = 50
"""Sections within sections."""

_SHOWN = 3  # faults of one file told at once; the rest is counted
_PLAIN = {
    # YAML 1.2's core schema, and "_" between digits as in Python: tag -> what is written so, and how that may begin.
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?\d[\d_]*|0o[0-7_]+|0x[\da-fA-F_]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class Config(pydantic.BaseModel):
    """What every part's config is made from: frozen, and a key it does not know is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    shelf: ClassVar[presets.Shelf] = "pipelines"
    """Where the names of `extends:` are looked up."""

    folder: ClassVar[str] = ""
    """The folder there whose presets may go by their short names; by default that of the file's own name."""

    alternatives: ClassVar[frozenset[str]] = frozenset()
    """Keys that make a section one of another kind: it replaces what it extends instead of being merged with it."""


C = TypeVar("C", bound=Config)


class OpenSection:
    """How a section of several possible classes is read: a key of it says which one it is, as in `family: blip`.

    For pydantic's BeforeValidator. Unlike a union, the classes are asked for at each reading: tables can be added to.
    """

    def __init__(self, key: str, classes: Callable[[], Mapping[str, type[Config]]], default: str):
        """`default` is what a section means that does not have the key."""
        self.key, self.classes, self.default = key, classes, default

    def __call__(self, value: Any) -> Any:
        """A mapping read as the class that it names; anything else as it is."""
        if not isinstance(value, Mapping):
            return value
        classes, named = self.classes(), value.get(self.key, self.default)
        if named not in classes:
            known = ", ".join(name for name in classes if name)
            raise ValueError(f"there is no {self.key} {short_repr(named)}; there are: {known or 'none'}")
        return classes[named].model_validate(value)


def read(path: str | Path, kind: type[C], sets: Sequence[str] = ()) -> C:
    """Read `path` as a `kind`: its `extends:` below it, each "a.b=c" of `sets` above it.

    Raises RecipeError, one line, with the dotted key, what is allowed there and the nearest name.
    """
    file = Path(path)
    tree = load(file)
    if "extends" in tree:
        tree = _merge(_parent(file, tree.pop("extends"), kind), tree, kind.alternatives)
    for assignment in sets:
        _set(tree, assignment, kind.alternatives)
    return validated(kind, tree, file)


def build(kind: type[C], sets: Sequence[str] = ()) -> C:
    """Make a `kind` from its defaults and "a.b=c" assignments alone. Raises RecipeError as `read` does."""
    tree: dict[str, Any] = {}
    for assignment in sets:
        _set(tree, assignment, kind.alternatives)
    return validated(kind, tree, "--set")


def named(kind: type[C], name: str | None, sets: Sequence[str] = ()) -> C:
    """The preset of this name, or the YAML at this path, as `read` reads it; without a name as `build` makes it."""
    return build(kind, sets) if name is None else read(presets.find(kind.shelf, name, kind.folder), kind, sets)


def check_syntax(
    name: str | Path | None, sets: Sequence[str] = (), folder: str = "", shelf: presets.Shelf = "pipelines"
) -> None:
    """Raise RecipeError for a preset that does not exist, a file that is no YAML, or a text of `sets` that is no
    assignment: what can be said of a recipe before its class is imported, which may take seconds.
    """
    if name is not None:
        load(presets.find(shelf, name, folder))
    for assignment in sets:
        _parsed(assignment)


def to_yaml(config: Config) -> str:
    """Write every field, defaults too, so that `read` gives an equal config back; but for secrets of its addresses."""
    tree = redact_tree(config.model_dump(mode="json"))
    # Escapes, not raw Unicode: PyYAML writes U+0085 as it is and reads it back as the end of a line.
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, width=110)


def digest(config: Config) -> str:
    """Return the sha256 of the canonical JSON: equal for equal configs, whatever their YAML looked like."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def validated(kind: type[C], tree: Any, where: object) -> C:
    """A config from a tree; `where` it came from. RecipeError for what does not fit."""
    try:
        return kind.model_validate(tree)
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)
        faults = [_explain(kind, tree, fault) for fault in found[:_SHOWN]]
        more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
        raise RecipeError(f"{where}: {' '.join(faults)}{more}") from None


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """Safe YAML in which plain words mean what YAML 1.2 says, and a key may be written once."""

    yaml_implicit_resolvers = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth, self._size = 0, 0
        self._sizes: dict[int, int] = {}
        """Of the nodes that are complete, by their ids: what an alias of one adds to the tree."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Bounds the tree while it is built: nine lists of nine aliases each are half a kilobyte of YAML, and a
        billion values for whoever writes them out.
        """
        event = self.peek_event()
        self._depth += 1
        self._check(self._depth <= MAX_DEPTH, f"it is nested more than {MAX_DEPTH} deep", event)
        before = self._size
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            self._check(id(node) in self._sizes, f"alias {event.anchor!r} stands in what it names", event)
            self._size += self._sizes[id(node)]
        else:
            self._size += NODE + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
            self._sizes[id(node)] = self._size - before
        self._check(self._size <= MAX_BYTES, f"with its aliases written out it is larger than {_MIB}", event)
        self._depth -= 1
        return node

    def _check(self, holds: bool, problem: str, event: Any) -> None:
        if not holds:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue  # a key that is a list is refused by PyYAML, since nothing can be found by it
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:  # `!!int cat`, or more digits than Python reads
            why = f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, why, node.start_mark) from error

    def number(self, node: yaml.ScalarNode) -> int | float:
        """What is tagged as a number, by its form or by hand."""
        text = str(self.construct_scalar(node)).replace("_", "").lower()
        if node.tag.endswith(":float"):
            value = float(text.replace(".inf", "inf").replace(".nan", "nan"))
            if math.isinf(value) and "inf" not in text:
                raise ValueError("more than a float holds")
            return value
        number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if not -(2**63) <= number < 2**63:
            raise ValueError("more than 64 bits hold")
        return number


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or _Loader would take for something else."""


for _tag, (_form, _first) in _PLAIN.items():
    for _resolver in (_Loader, _Dumper):
        _resolver.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_form})$"), _first)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.number)


_MIB = f"{MAX_BYTES // 2**20} MiB"


class Readable(Protocol):
    """A file, wherever it lies."""

    def open(self, mode: Literal["rb"]) -> IO[bytes]: ...


@lru_cache(maxsize=8)
def _parse_yaml(text: str) -> Any:
    """The tree of a YAML; kept, since a run reads the architecture of each model a hundred times, 1 ms each."""
    return yaml.load(text, _Loader)


def load(file: Readable) -> dict[str, Any]:
    """Read a YAML as it is written, unchecked. Raises RecipeError for what is no YAML mapping."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError(f"{file} is larger than {_MIB}; name shards by folders, globs or braces, not one by one.")
        tree = copy.deepcopy(_parse_yaml(data.decode()))
    except FileNotFoundError:
        raise RecipeError(f"there is no file {file}; give a YAML file that exists or a preset name.") from None
    except (OSError, ValueError) as error:  # a ValueError is of the encoding, or of a NUL in the path
        raise RecipeError(f"{file} cannot be read: {error}; give a readable YAML file in UTF-8.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is no YAML: {_one_line(error)}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{file} holds a {type(tree).__name__}; a recipe is a mapping, `key: value` line by line.")
    return tree


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{printable(getattr(error, 'problem', None) or error)}{where}"


# ---- extends and --set ----


def _parent(file: Path, name: object, kind: type[Config]) -> dict[str, Any]:
    if not isinstance(name, str):
        raise RecipeError(
            f"{file}: 'extends' is {short_repr(name)}; it takes one preset name or the path of one .yaml file."
        )
    relative = name.endswith((".yaml", ".yml"))
    parent = file.parent / name if relative else presets.find(kind.shelf, name, within=kind.folder or file.parent.name)
    tree = load(parent)
    if "extends" in tree:
        raise RecipeError(
            f"{file} extends {name!r}, which itself extends {short_repr(tree['extends'])}; one level is allowed."
            f" Extend {short_repr(tree['extends'])}, or write the keys of {name!r} out."
        )
    return tree


def _merge(below: dict[str, Any], above: dict[str, Any], alternatives: frozenset[str]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = below.get(key)
        deeper = isinstance(value, dict) and isinstance(inner, dict) and _same_kind(inner, value, alternatives)
        merged[key] = _merge(below[key], value, alternatives) if deeper else value
    return merged


def _same_kind(below: dict[str, Any], above: dict[str, Any], alternatives: frozenset[str]) -> bool:
    return not above or below.keys() & alternatives == above.keys() & alternatives


def _parsed(assignment: str) -> tuple[list[str], str, Any]:
    """Parents, key and value of "a.b=c"."""
    dotted, equals, text = assignment.partition("=")
    *parents, last = dotted.strip().split(".")
    shown = short_repr(assignment, 200)
    if not equals or not all([*parents, last]) or len(parents) >= MAX_DEPTH:
        raise RecipeError(f"--set {shown} is no assignment; write it as --set a.b=c.")
    try:
        return parents, last, yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"--set {shown}: the value is no YAML: {_one_line(error)}.") from None


def _set(tree: dict[str, Any], assignment: str, alternatives: frozenset[str]) -> None:
    parents, last, value = _parsed(assignment)
    node = tree
    for depth, key in enumerate(parents):
        inner = {} if node.get(key) is None else node[key]
        if not isinstance(inner, dict):
            dotted, shown = ".".join(parents[: depth + 1]), short_repr(assignment, 200)
            raise RecipeError(
                f"--set {shown}: {dotted!r} is {short_repr(inner)} and has no keys; set {dotted!r} itself."
            )
        replaced = depth == len(parents) - 1 and last in alternatives and last not in inner
        node[key] = {} if replaced else dict(inner)  # a copy: an alias in the YAML is the same dict
        node = node[key]
    node[last] = value


# ---- errors ----


def _explain(kind: type[Config], tree: Any, fault: Any) -> str:
    """Say one pydantic fault as a sentence: the dotted key, what was found, what is allowed."""
    place, found = fault["loc"], fault["input"]
    key = _dotted(tree, place)
    context = fault.get("ctx", {})
    if fault["type"] == "extra_forbidden":
        allowed = _allowed(kind, place[:-1])
        return f"unknown key {key!r}.{did_you_mean(str(place[-1]), allowed)} Allowed here: {', '.join(allowed)}."
    if fault["type"] == "missing":
        return f"key {key!r} is missing; write it down."
    message = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    expected = str(context.get("expected") or context.get("expected_tags") or "")
    said = context.get("tag", found)
    near = did_you_mean(said, re.findall(r"'([^']*)'", expected)) if isinstance(said, str) else ""
    # A validator of a whole section has its own sentence; repeating the section to it helps nobody.
    subject = f"{key!r}" if key else "the recipe"
    subject += "" if isinstance(found, dict | pydantic.BaseModel) else f" is {short_repr(found)}"
    return f"{subject}: {message.rstrip('.')}.{near}"


def _dotted(tree: Any, place: Sequence[str | int]) -> str:
    """Join a fault's place to a key as written, without the names pydantic puts in for members of a union."""
    *parents, last = place or ("",)
    written = []
    for part in parents:
        # A dict is asked for its key, a list for its index; pydantic's own names are neither.
        inner = tree if isinstance(tree, dict) else dict(enumerate(tree)) if isinstance(tree, list) else {}
        if part in inner:
            tree = inner[part]
            written.append(str(part))
    # Neither is the last part of a value that fits no member of a union, while a missing key is named by it.
    named = isinstance(tree, dict | list) or not written
    return ".".join([*written, str(last)] if named else written)


def _allowed(kind: type[pydantic.BaseModel], place: Iterable[str | int]) -> list[str]:
    """List the keys of the section at `place`, following nested models, lists, dicts and unions."""
    spots: list[Any] = [kind]
    for part in place:
        # A part that leads nowhere is the name pydantic gives to a union's member: stay where we are.
        spots = [inner for spot in spots for inner in _step(spot, part)] or spots
    return sorted({name for spot in spots if _is_model(spot) for name in spot.model_fields})


def _step(spot: Any, part: str | int) -> list[Any]:
    if _is_model(spot):
        if part in spot.model_fields:
            field = spot.model_fields[part]
            opened = [m.func for m in field.metadata if isinstance(m, pydantic.BeforeValidator)]
            sections = [section for section in opened if isinstance(section, OpenSection)]
            return [*(sections[0].classes().values() if sections else _members(field.annotation))]
        return [spot] if part in _tags(spot) else []
    if get_origin(spot) in (list, tuple, dict, Sequence):
        return [inner for argument in get_args(spot) for inner in _members(argument)]
    return []


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, or the annotation itself."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for argument in get_args(annotation):
            yield from _members(argument)
    else:
        yield annotation


def _is_model(spot: Any) -> bool:
    return isinstance(spot, type) and issubclass(spot, pydantic.BaseModel)


def _tags(model: type[pydantic.BaseModel]) -> set[Any]:
    literals = [get_args(f.annotation) for f in model.model_fields.values() if get_origin(f.annotation) is Literal]
    return {model.__name__, *(value for values in literals for value in values)}
