"""Classes of pictures and the prompts that name them: files beside the tars, a class in each json (docs/tasks.md).

clip_benchmark's layout is read too: `KEY.cls` has the number of the class in `classnames.txt`, and both text files lie
in the folder of the tars or in the one above it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capfilt.data.shards.members import MAX_TEXT
from capfilt.errors import DataError, did_you_mean
from capfilt.storage.paths import StoragePath, storage_path

CLASSES = ("classes.txt", "classnames.txt")
TEMPLATES = ("templates.txt", "zeroshot_classification_templates.txt")
DEFAULT_TEMPLATES = ("a photo of a {}.",)


@dataclass(frozen=True)
class ClassList:
    """The names of the classes, as prompts spell them, and the templates of prompts, each with one `{}`."""

    names: tuple[str, ...]
    templates: tuple[str, ...] = DEFAULT_TEMPLATES

    def prompts(self, number: int) -> list[str]:
        """The prompts of a class, one a template."""
        return [template.replace("{}", self.names[number]) for template in self.templates]


def read_classes(shard: str, names: Sequence[str] = (), templates: Sequence[str] = ()) -> ClassList:
    """The classes and templates beside a shard, or in the folder above; without templates there is a usual one.

    Args:
        names: the classes, where they are known and need not lie there.
        templates: the templates, as well.

    Raises:
        DataError: there is no list of classes, or a line of it or of the templates cannot be used.
    """
    folder = storage_path(shard).parent
    if not names:
        path = _first(folder, CLASSES)
        if path is None:
            raise DataError(
                f"there is no {' or '.join(CLASSES)} beside {shard} or in the folder above: write one, a class a line,"
                " or give it with --classes FILE."
            )
        names = read_names(path)
    if not templates:
        path = _first(folder, TEMPLATES)
        templates = DEFAULT_TEMPLATES if path is None else read_templates(path)
    return ClassList(tuple(names), tuple(templates))


def read_names(path: StoragePath) -> tuple[str, ...]:
    """The classes of a text file, one a line. DataError for fewer than two, or a file that cannot be read."""
    names = _lines(path)
    if len(names) < 2:
        raise DataError(f"{path} has {len(names)} classes; two or more are needed, one a line.")
    return names


def read_templates(path: StoragePath) -> tuple[str, ...]:
    """The templates of a text file, one a line, with {} or clip_benchmark's {c}. DataError: none, or one without it."""
    templates = tuple(line.replace("{c}", "{}") for line in _lines(path))
    for number, template in enumerate(templates, 1):
        if template.count("{}") != 1:
            raise DataError(f"{path}, line {number}: {template!r} has not one {{}} for the class.")
    if not templates:
        raise DataError(f"{path} is empty; write one template a line, such as 'a photo of a {{}}.'")
    return templates


def class_of(meta: Mapping[str, Any], extras: Mapping[str, bytes], classes: ClassList) -> int | None:
    """The number of a sample's class: that of the name in its json, else what its `cls` says; None where both lack.
    DataError for a name or number that is not in the list, or a name that stands in it twice."""
    name = meta.get("class")
    if name is None:
        return _number(extras["cls"], len(classes.names)) if "cls" in extras else None
    count = classes.names.count(name) if isinstance(name, str) else 0
    if count > 1:
        raise DataError(f"class {name!r} stands {count} times in the list of classes; make its lines different.")
    if not count:
        hint = did_you_mean(name, classes.names) if isinstance(name, str) else ""
        raise DataError(f"class {name!r} is none of the {len(classes.names)} classes.{hint}")
    return classes.names.index(name)


def _number(data: bytes, count: int) -> int:
    digits = data[:20].strip()
    number = int(digits) if digits.isdigit() else -1
    if not 0 <= number < count:
        raise DataError(f"cls is {data[:20]!r}; it is the number of one of the {count} classes, from 0.")
    return number


def _first(folder: StoragePath, names: tuple[str, ...]) -> StoragePath | None:
    """The first of these files that there is in a folder, else in the one above it."""
    paths = (place / name for place in (folder, folder.parent) for name in names)
    return next((path for path in paths if path.is_file()), None)


def _lines(path: StoragePath) -> tuple[str, ...]:
    """The lines of a text file, stripped; the last may be empty, any other gives DataError: numbers count lines."""
    if not path.is_file():
        raise DataError(f"there is no file {path}; check the path.")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise DataError(f"{path} is larger than {MAX_TEXT // 2**20} MiB.")
        lines = [line.strip() for line in data.decode("utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as lines of UTF-8: {error}") from error
    if "" in lines:
        raise DataError(f"{path}, line {lines.index('') + 1} is empty; there is one entry a line.")
    return tuple(lines)
