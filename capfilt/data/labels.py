"""Labels: people's verdicts on texts, right or wrong, kept as lines in the run folder; and the precision they imply.

A label belongs to a picture and a text, not to a round or a score, so it holds wherever the same text comes with the
same picture again. The file is only appended to; of several lines about a text the newest counts.
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
"""none withdraws a label."""


@dataclass(frozen=True)
class Label:
    """One verdict of a person."""

    uid: str
    """of the picture"""
    text: str
    source: str
    """web | synthetic | human"""
    verdict: str
    """right | wrong | none"""
    at_random: bool
    """whether the text was shown in random order and unfiltered: only such labels are a sample of all texts"""


def run_folder_of(folder: StoragePath) -> StoragePath:
    """The run folder that annotations belong to: `folder` itself, or the bootstrap whose round it is."""
    inside = not (folder / "plan.json").is_file() and (folder.parent / "plan.json").is_file()
    return folder.parent if inside else folder


def append(folder: StoragePath, label: Label) -> None:
    """Add a label to the run folder, whole or not at all: one write, then an fsync.

    A line that a kill cut short is ended first, so that the new one stays readable. On a store the file is written anew
    with each label, so that only one `capfilt review` may run at a time there.

    Raises:
        RunError: a verdict that is none of VERDICTS.
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
    """The labels of a run folder by (uid, text), without those that were withdrawn; {} where there are none. RunError
    for a whole line that is no label; one that a kill cut short is skipped."""
    path = folder / FILE
    labels: dict[tuple[str, str], Label] = {}
    for number, line in enumerate(documents.newest_lines(path, documents.LOG_BYTES), 1):
        label = _parse(line)
        if label is not None:
            labels[label.uid, label.text] = label
        elif line.endswith(b"}"):
            raise RunError(f"{path}, line {number} is no label: {line[:80]!r}; take the line out.")
    return {key: label for key, label in labels.items() if label.verdict != "none"}


def _parse(line: bytes) -> Label | None:
    """A line as a label; None for one that was cut short, or is none."""
    try:
        tree: dict[str, Any] = documents.parse(line)
        label = Label(**{name: tree[name] for name in Label.__dataclass_fields__})
    except (ValueError, KeyError, TypeError):
        return None
    typed = all(isinstance(value, bool if name == "at_random" else str) for name, value in asdict(label).items())
    return label if typed and label.verdict in VERDICTS else None


def wilson_interval(hits: float, total: float, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927), good for few samples and near 0 and 1; (0, 1) for none."""
    if not total:
        return 0.0, 1.0
    share, square = hits / total, z * z
    middle = share + square / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    scale = 1 + square / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def precision_and_recall(labelled: Iterable[tuple[float, bool]], threshold: float) -> dict[str, Any]:
    """Precision and recall of a threshold with 95 % intervals; absent where undefined.

    `labelled`: the score of each labelled text, and whether it is right.
    """
    pairs = list(labelled)
    kept = [right for score, right in pairs if score >= threshold]
    num_right = sum(right for _, right in pairs)
    measured: dict[str, Any] = {"labels": len(pairs), "right": num_right}
    for name, hits, total in (("precision", sum(kept), len(kept)), ("recall", sum(kept), num_right)):
        if total:
            measured[name] = hits / total
            measured[f"{name}_interval"] = list(wilson_interval(hits, total))
    return measured
