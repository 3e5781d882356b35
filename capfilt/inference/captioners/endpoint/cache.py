"""What an endpoint has answered, kept beside a run: a shard that is done again asks only for what was not answered.

One file of JSON lines a shard, `cache/SHARD.jsonl`: read when a worker begins the shard, appended with each answer
before anybody sees it. On a store, where objects cannot grow, the file is written every ten seconds, so that a kill
costs the answers of as long.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from capfilt.inference.captioners.endpoint.client import Answer
from capfilt.storage import documents
from capfilt.storage.append_log import RemoteLog, append_line
from capfilt.storage.atomic import atomic
from capfilt.storage.paths import StoragePath, make_folder
from capfilt.storage.remote_path import RemotePath

FOLDER = "cache"
"""Beside `annotations`, in the folder of a run or a round."""


class AnswerCache(AbstractContextManager["AnswerCache"]):
    """The answers of one shard, by the key of their request; without a path in memory alone."""

    def __init__(self, path: StoragePath | None):
        self._path = path
        lines = [] if path is None else list(documents.newest_lines(path, documents.LOG_BYTES))
        self._answers = dict(entry for line in lines if (entry := _entry(line)) is not None)
        self._log: AbstractContextManager[RemoteLog | None] = nullcontext()
        self._remote: RemoteLog | None = None
        if isinstance(path, RemotePath):
            self._log = RemoteLog(path, b"".join(line + b"\n" for line in lines))
        elif path is not None:
            make_folder(path.parent)
            if lines:
                append_line(path, b"\n")  # ends a line that a kill cut short

    def __enter__(self) -> AnswerCache:
        self._remote = self._log.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._log.__exit__(*raised)

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers, in one write. LockLostError where another driver has taken the run over."""
        lines = b"".join(
            json.dumps({"key": key, "text": answer.text, "failure": answer.failure}).encode() + b"\n"
            for key, answer in answers.items()
        )
        if self._remote is not None:
            self._remote.add(lines)
        elif isinstance(self._path, Path):
            append_line(self._path, lines)
        self._answers.update(answers)


def forget_failures(out: StoragePath, shard: str) -> None:
    """Have what an endpoint did not write for a shard be asked for again."""
    path = out / FOLDER / f"{shard}.jsonl"
    if not path.is_file():
        return
    kept = [
        line
        for line in documents.newest_lines(path, documents.LOG_BYTES)
        if (entry := _entry(line)) is not None and not entry[1].failure
    ]
    with atomic(path) as file:
        file.write(b"".join(line + b"\n" for line in kept))


def _entry(line: bytes) -> tuple[str, Answer] | None:
    """Key and answer of a line; None for one that was cut short, or is none of ours."""
    try:
        tree = documents.parse(line)
        key, text, failure = tree["key"], tree["text"], tree["failure"]
    except (ValueError, LookupError, TypeError):
        return None
    return (key, Answer(text, failure)) if all(isinstance(x, str) for x in (key, text, failure)) else None
