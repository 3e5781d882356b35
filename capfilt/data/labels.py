"""Labels: what people said of texts, right or wrong, kept as lines in the run folder, and what they say of a threshold.

A label belongs to a picture and a text, not to a round or a score, so it holds wherever the same text meets the same
picture again. The file is only ever appended to; the newest line about a text is the one that counts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from capfilt.errors import RunError
from capfilt.storage import documents, safe_paths
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath

FILE = "labels.jsonl"
VERDICTS = ("right", "wrong", "none")
"""none takes a label back."""


@dataclass(frozen=True)
class Label:
    """One click."""

    uid: str
    """of the picture"""
    text: str
    source: str
    """web | synthetic | human"""
    verdict: str
    """right | wrong | none"""
    at_random: bool
    """whether the text was met in random order with no filter: only such labels stand for all texts"""


def home(folder: StoragePath) -> StoragePath:
    """The run folder that annotations belong to: their own, or that of the bootstrap whose round they are."""
    inside = not (folder / "plan.json").is_file() and (folder.parent / "plan.json").is_file()
    return folder.parent if inside else folder


def append(folder: StoragePath, label: Label) -> None:
    """Add a label to the run folder, whole or not at all: one write, then an fsync.

    A line that a kill cut short is ended first, so that it takes no other with it. On a store the file is written anew
    with each label: there, one `capfilt review` at a time.
    """
    if label.verdict not in VERDICTS:
        raise RunError(f"a label is {', '.join(VERDICTS)}, not {label.verdict!r}.")
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"at": stamp, **asdict(label)}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    if isinstance(folder, RemotePath):
        (folder / FILE).append(line)
        return
    file = safe_paths.open_log(folder / FILE)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        written = os.write(file, b"\n" + line if torn else line)
        if written != len(line) + torn:
            raise OSError(f"only {written} bytes of a label could be written to {folder / FILE}")
        os.fsync(file)
    finally:
        os.close(file)


def read(folder: StoragePath) -> dict[tuple[str, str], Label]:
    """The labels of a run folder by (uid, text), those taken back left out; {} where there are none."""
    path = folder / FILE
    found: dict[tuple[str, str], Label] = {}
    for number, line in enumerate(documents.newest_lines(path, documents.LOG_BYTES), 1):
        label = _parsed(line)
        if label is not None:
            found[label.uid, label.text] = label
        elif line.endswith(b"}"):
            raise RunError(f"{path}, line {number} is no label: {line[:80]!r}; take the line out.")
    return {key: label for key, label in found.items() if label.verdict != "none"}


def _parsed(line: bytes) -> Label | None:
    """A line as a label; None for what a kill cut short, or for what is none."""
    try:
        tree: dict[str, Any] = documents.parse(line)
        label = Label(**{name: tree[name] for name in Label.__dataclass_fields__})
    except (ValueError, KeyError, TypeError):
        return None
    typed = all(isinstance(value, bool if name == "at_random" else str) for name, value in asdict(label).items())
    return label if typed and label.verdict in VERDICTS else None


def wilson(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which holds for few samples and near 0 and 1; (0, 1) for none."""
    if not total:
        return 0.0, 1.0
    share, square = hits / total, z * z
    middle = share + square / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    scale = 1 + square / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def figures(judged: Iterable[tuple[float, bool]], threshold: float) -> dict[str, Any]:
    """Precision and recall with 95 % intervals, from (score, is right) of labelled texts; absent where undefined."""
    pairs = list(judged)
    kept = [right for score, right in pairs if score >= threshold]
    num_right = sum(right for _, right in pairs)
    found: dict[str, Any] = {"labels": len(pairs), "right": num_right}
    for name, hits, total in (("precision", sum(kept), len(kept)), ("recall", sum(kept), num_right)):
        if total:
            found[name] = hits / total
            found[f"{name}_interval"] = list(wilson(hits, total))
    return found
