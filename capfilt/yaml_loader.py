"""Reads YAML by the rules of YAML 1.2, and within limits; PyYAML follows YAML 1.1.

In YAML 1.1 `no` is false, 1:30 is 90, 010 is 8, 1e-4 is a text and 2026-11-24 a date. Here plain words mean what they
mean in YAML 1.2: null, true and false, numbers, and everything else is text. Of a key that is written twice PyYAML
silently takes the last one; here that is an error.
"""

from __future__ import annotations

import copy
import math
import re
from functools import lru_cache
from typing import IO, Any, Literal, Protocol

import yaml

from capfilt.errors import RecipeError
from capfilt.printable import printable

MAX_BYTES = 2 * 2**20
"""Bytes of a YAML file, and of its tree with every alias expanded, where a value has NODE_BYTES besides its text."""
NODE_BYTES = 32
MAX_DEPTH = 50
"""Sections within sections."""


_PLAIN = {
    # The core schema of YAML 1.2, with "_" between digits as in Python: tag -> form, possible first characters.
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?\d[\d_]*|0o[0-7_]+|0x[\da-fA-F_]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\d[\d_]*(?:\.[\d_]*)?|\.\d[\d_]*)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules above."""

    yaml_implicit_resolvers = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth, self._size = 0, 0
        self._sizes: dict[int, int] = {}
        """The size of each complete node by its id: what an alias of it adds to the tree."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Bound the tree while it is built: nine lists of nine aliases each are half a kilobyte of YAML, and a billion
        values when expanded.
        """
        event = self.peek_event()
        self._depth += 1
        self._check(self._depth <= MAX_DEPTH, f"it is nested more than {MAX_DEPTH} deep", event)
        before = self._size
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            self._check(id(node) in self._sizes, f"alias {event.anchor!r} is inside the node that it names", event)
            self._size += self._sizes[id(node)]
        else:
            self._size += NODE_BYTES + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
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
                continue  # PyYAML itself refuses a key that is a list, which is not hashable
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
        """Construct a number, tagged by its form or explicitly."""
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


class Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or `_Loader` would read as something else."""


for _tag, (_form, _first) in _PLAIN.items():
    for _resolver in (_Loader, Dumper):
        _resolver.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_form})$"), _first)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.number)


_MIB = f"{MAX_BYTES // 2**20} MiB"


class Readable(Protocol):
    """A path, local or on a store."""

    def open(self, mode: Literal["rb"]) -> IO[bytes]: ...


def parse_value(text: str) -> Any:
    """The value of a short YAML text. Raises yaml.YAMLError or ValueError."""
    return yaml.load(text, _Loader)


@lru_cache(maxsize=8)
def _parse_yaml(text: str) -> Any:
    """The tree of a YAML; cached, since a run reads the architecture of each model a hundred times, 1 ms each."""
    return yaml.load(text, _Loader)


def load_yaml(file: Readable) -> dict[str, Any]:
    """The mapping in a YAML file, unchecked. RecipeError for a file that is not a YAML mapping."""
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError(f"{file} is larger than {_MIB}; name shards by folders, globs or braces, not one by one.")
        tree = copy.deepcopy(_parse_yaml(data.decode()))
    except FileNotFoundError:
        raise RecipeError(f"there is no file {file}; give a YAML file that exists or a preset name.") from None
    except (OSError, ValueError) as error:  # ValueError: the encoding, or a NUL in the path
        raise RecipeError(f"{file} cannot be read: {error}; give a readable YAML file in UTF-8.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file} is no YAML: {one_line(error)}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise RecipeError(f"{file} holds a {type(tree).__name__}; a recipe is a mapping, `key: value` line by line.")
    return tree


def one_line(error: Exception) -> str:
    """An error of PyYAML on one line, with its position."""
    mark = getattr(error, "problem_mark", None)
    where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{printable(getattr(error, 'problem', None) or error)}{where}"
