"""JSON that somebody else may have written, the records of a run and the files of a model folder, read within limits.

A file costs a message and not the machine: its bytes are bounded by its kind, its depth and number of values by what
parsing may cost, 1 GB of memory at most. In a run folder links and devices are refused too (`safe_paths`).
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
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath

RECORD_BYTES = 16 * 2**20
"""Limit of a completion, fork.json, a list of quarantined samples, the marker of a state, a recipe, figures."""
PLAN_BYTES = 192 * 2**20
"""Limit of plan.json, STAGE.plan.jsonl and sizes.json, which have about a line a shard: a million shards whose URLs
have up to 180 bytes."""
LOG_BYTES = 64 * 2**20
"""Limit of labels.jsonl and STAGE.failed.jsonl, and of the newest lines of a log.jsonl."""
MODEL_BYTES = 64 * 2**20
"""Limit of a description, index or vocabulary of a model; the largest public `tokenizer.json` has 35 MB."""

MAX_DEPTH = 64
MAX_VALUES = 4_000_000
MAX_DIGITS = 19
"""Digits of an integer: as many as 64 bits hold."""
MODEL_DIGITS = 64
"""The same in a model folder: transformers writes "no limit" as an integer of 31 digits."""
_LONG = re.compile(rb"\d{20}")


def parse(data: bytes, max_digits: int = MAX_DIGITS) -> Any:
    """Parse JSON, with or without a byte order mark. ValueError for what is not JSON in UTF-8, is nested too deeply,
    has too many values or too long an integer."""
    containers = data.count(b"[") + data.count(b"{")
    if containers + data.count(b",") > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} values")

    def integer(digits: str) -> int:
        if len(digits) > max_digits:
            raise ValueError(f"an integer has {len(digits)} digits")
        return int(digits)

    try:
        tree = json.loads(data.decode("utf-8-sig"), parse_int=integer if _LONG.search(data) else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if containers > MAX_DEPTH and _deeper_than(tree, MAX_DEPTH):
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return tree


def _deeper_than(tree: Any, limit: int) -> bool:
    level = [tree]  # containers of one depth
    for _ in range(limit):
        inner = (value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer))
        level = [value for value in inner if isinstance(value, dict | list)]
    return bool(level)


# ---- records of a run ----


def read_bytes(path: StoragePath, limit: int = RECORD_BYTES) -> bytes:
    """The bytes of a record. FileNotFoundError where there is none, RunError for a link, a device or a larger file."""
    if isinstance(path, Path):
        return safe_paths.read_bytes(path, limit)
    data = path.read_bytes()
    if len(data) > limit:
        raise safe_paths.too_large(path, limit)
    return data


def read_json(path: StoragePath, limit: int = RECORD_BYTES) -> Any:
    """A record of JSON. Raises as `read_bytes`, and RunError for what `parse` refuses."""
    data = read_bytes(path, limit)
    try:
        return parse(data)
    except ValueError as error:
        raise RunError(f"{path} cannot be read ({error}); use another --out, or put the file right.") from error


def read_object(path: StoragePath, limit: int = RECORD_BYTES) -> dict[str, Any]:
    """A record of JSON that is an object. Raises as `read_json`, and RunError for any other value."""
    tree = read_json(path, limit)
    if not isinstance(tree, dict):
        raise RunError(f"{path} cannot be read (it holds a {type(tree).__name__}, and must hold an object).")
    return tree


def read_json_lines(path: StoragePath, limit: int = LOG_BYTES) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, of its newest `limit` bytes; none where there is no file.

    A line that a kill cut short is left out. RunError for any other line that is not JSON.
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
        lines.readline()  # the rest of a line that begins before the limit
    yield from (line.rstrip(b"\r\n") for line in lines)


def check_record(path: StoragePath, limit: int = RECORD_BYTES) -> StoragePath:
    """Return the path of a record that another reader opens. RunError for what `read_bytes` would refuse."""
    if isinstance(path, Path) and path.exists():
        with safe_paths.open_file(path) as file:
            if file.seek(0, io.SEEK_END) > limit:
                raise safe_paths.too_large(path, limit)
    return path


# ---- files of a model folder ----


def read_model_bytes(path: Path, limit: int = MODEL_BYTES) -> bytes:
    """The bytes of a file of a model folder, which may be a link: the Hugging Face cache is made of links.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: not a file, or too large.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {limit} bytes")
    return data


def read_model_object(path: Path, limit: int = MODEL_BYTES) -> dict[str, Any]:
    """The JSON object in such a file. Raises as `read_model_bytes`, and ValueError for what `parse` refuses."""
    tree = parse(read_model_bytes(path, limit), MODEL_DIGITS)
    if not isinstance(tree, dict):
        raise ValueError(f"it holds a {type(tree).__name__}, not an object")
    return tree
