"""The records of a run, read as what they are: files that somebody else may have written.

A record is read whole and is bounded in three ways: its bytes by its kind, its depth and its number of values by what
reading it may cost, 1 GB of memory at the most. On a store there are no links and no devices, and the same bounds.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capfilt.errors import RunError
from capfilt.storage import safe_paths
from capfilt.storage.paths import RemotePath, StoragePath

RECORD_BYTES = 16 * 2**20
"""Of a completion, fork.json, a list of left-out samples, the marker of a state, a recipe, figures."""
PLAN_BYTES = 64 * 2**20
"""Of plan.json and STAGE.plan.jsonl, which have a line or so a shard: some 500,000 shards."""
LOG_BYTES = 64 * 2**20
"""Of labels.jsonl and STAGE.failed.jsonl, and of the newest lines of a log.jsonl."""

MAX_DEPTH = 64
MAX_VALUES = 4_000_000
_LONG = re.compile(rb"\d{20}")


def parse(data: bytes) -> Any:
    """JSON as a tree. ValueError for what is none, is nested too deeply or has too many values."""
    containers = data.count(b"[") + data.count(b"{")
    if containers + data.count(b",") > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} values")
    try:
        tree = json.loads(data.decode(), parse_int=_integer if _LONG.search(data) else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if containers > MAX_DEPTH and _deeper_than(tree, MAX_DEPTH):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return tree


def _integer(digits: str) -> int:
    if len(digits) > 19:
        raise ValueError(f"an integer has {len(digits)} digits")
    return int(digits)


def read_bytes(path: StoragePath, limit: int = RECORD_BYTES) -> bytes:
    """A record as it is. FileNotFoundError where there is none, RunError for what may not be read."""
    if isinstance(path, Path):
        return safe_paths.read_bytes(path, limit)
    data = path.read_bytes()
    if len(data) > limit:
        raise safe_paths.too_large(path, limit)
    return data


def read_json(path: StoragePath, limit: int = RECORD_BYTES) -> Any:
    """A record of JSON. FileNotFoundError where there is none, RunError for what may not or cannot be read."""
    data = read_bytes(path, limit)
    try:
        return parse(data)
    except ValueError as error:
        raise RunError(f"{path} cannot be read ({error}); use another --out, or put the file right.") from error


def read_object(path: StoragePath, limit: int = RECORD_BYTES) -> dict[str, Any]:
    """A record of JSON that is an object."""
    tree = read_json(path, limit)
    if not isinstance(tree, dict):
        raise RunError(f"{path} cannot be read (it holds a {type(tree).__name__}, and must hold an object).")
    return tree


def objects(path: StoragePath, limit: int = LOG_BYTES) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, the newest `limit` bytes of it; none where there is no file.

    A line that a kill cut short is left out. RunError for another line that is no object.
    """
    for line in newest_lines(path, limit):
        if not line.endswith(b"}"):
            continue
        try:
            tree = parse(line)
        except ValueError as error:
            raise RunError(f"{path} has a line that cannot be read ({error}): {line[:80]!r}") from error
        if isinstance(tree, dict):
            yield tree


def newest_lines(path: StoragePath, limit: int) -> Iterator[bytes]:
    """The lines of a file without their ends, from the first that begins in its last `limit` bytes."""
    try:
        if isinstance(path, RemotePath):
            data = path.read_bytes()[-limit - 1 :]
        else:
            with safe_paths.open_file(path) as file:
                size = file.seek(0, io.SEEK_END)
                start = file.seek(max(0, size - limit - 1))
                data = file.read(size - start)
    except FileNotFoundError:
        return
    lines = io.BytesIO(data)
    if len(data) > limit:
        lines.readline()  # its beginning is not here
    yield from (line.rstrip(b"\r\n") for line in lines)


def checked(path: StoragePath, limit: int = RECORD_BYTES) -> StoragePath:
    """The path of a record for those who read it themselves. RunError for what may not be read."""
    if isinstance(path, Path) and path.exists():
        with safe_paths.open_file(path) as file:
            if file.seek(0, io.SEEK_END) > limit:
                raise safe_paths.too_large(path, limit)
    return path


def unlink(where: StoragePath) -> None:
    """Remove a file, where there is one."""
    if isinstance(where, RemotePath):
        where.unlink(missing_ok=True)
    else:
        safe_paths.unlink(where, missing_ok=True)


def make_folder(where: StoragePath) -> None:
    """Create a folder and what is missing above it; on a store a folder is there when something is in it."""
    if isinstance(where, Path):
        safe_paths.make_folder(where)


def _deeper_than(tree: Any, limit: int) -> bool:
    level = [tree]  # containers of one depth
    for _ in range(limit):
        inner = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in inner if isinstance(value, dict | list)]
    return bool(level)
