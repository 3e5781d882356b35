"""JSON of model folders, which others wrote: a file of any size, depth or kind costs a message, not the machine.

Other bounds than those of documents.py: vocabularies are large, and transformers writes integers of 31 digits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20
"""No description, index or vocabulary of a model comes near; the largest public `tokenizer.json` has 35 MB."""


def read_json(path: Path, limit: int = MAX_BYTES) -> Any:
    """The content of a JSON file of at most `limit` bytes.

    Raises:
        OSError: no such file, or one that cannot be read.
        ValueError: not JSON, too large, or nested too deeply.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a file")
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {limit} bytes")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_table(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The same where a JSON object must be. Raises as `read_json`, and ValueError for anything else."""
    table = read_json(path, limit)
    if not isinstance(table, dict):
        raise ValueError(f"it holds a {type(table).__name__}, not an object")
    return table
