from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capfilt.errors import LockLostError
from capfilt.inference.captioners.endpoint.cache import FOLDER, AnswerCache, forget_failures
from capfilt.inference.captioners.endpoint.client import Answer
from capfilt.runs.locking import lock
from capfilt.storage.append_log import RemoteLog


def test_answers_are_there_again_at_once(tmp_path: Path) -> None:
    """Without leaving the block: a worker that is killed leaves none."""
    path = tmp_path / FOLDER / "00000.jsonl"
    said, failed = Answer("ein Café\n\u2028\0", ""), Answer("", "refused")
    with AnswerCache(path) as cache:
        assert cache.get("a") is None
        cache.add({"a": said, "b": failed})
        with AnswerCache(path) as other:
            assert (other.get("a"), other.get("b"), other.get("c")) == (said, failed, None)


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    with AnswerCache(path) as cache:
        cache.add({"a": Answer("one")})
        cache.add({"b": Answer("two")})
    path.write_bytes(path.read_bytes()[:-9])
    for _ in range(2):
        with AnswerCache(path) as cache:
            assert (cache.get("a"), cache.get("b")) == (Answer("one"), None)
            cache.add({"c": Answer("three")})
    with AnswerCache(path) as cache:
        assert cache.get("c") == Answer("three")


@pytest.mark.parametrize(
    "line", ["5", "[]", '{"key": "a"}', '{"key": 5, "text": "x", "failure": ""}', "x\0", "[" * 9999]
)
def test_lines_of_others_are_no_answers(tmp_path: Path, line: str) -> None:
    path = tmp_path / "00000.jsonl"
    path.write_text(f"{line}\n" + json.dumps({"key": "b", "text": "two", "failure": ""}) + "\n")
    with AnswerCache(path) as cache:
        assert (cache.get("a"), cache.get("b")) == (None, Answer("two"))


def test_failures_are_forgotten_and_texts_are_not(tmp_path: Path) -> None:
    with AnswerCache(tmp_path / FOLDER / "00000.jsonl") as cache:
        cache.add({"a": Answer("one")})
        cache.add({"b": Answer("", "refused")})
    forget_failures(tmp_path, "00000")
    forget_failures(tmp_path, "00001")
    with AnswerCache(tmp_path / FOLDER / "00000.jsonl") as cache:
        assert (cache.get("a"), cache.get("b")) == (Answer("one"), None)
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["00000.jsonl"]


def test_on_a_store_they_are_there_when_the_shard_ends_or_ten_seconds_later(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store / FOLDER / "00000.jsonl"
    with pytest.raises(KeyboardInterrupt), AnswerCache(path) as cache:
        cache.add({"a": Answer("one")})
        raise KeyboardInterrupt
    with AnswerCache(path) as cache:
        cache.add({"b": Answer("", "refused")})
    forget_failures(store, "00000")
    with AnswerCache(path) as cache:
        assert (cache.get("a"), cache.get("b")) == (Answer("one"), None)
    monkeypatch.setattr(RemoteLog, "PAUSE", 0.0)
    with AnswerCache(path) as cache:
        for number in range(50):
            cache.add({str(number): Answer("x")})
        cache._remote._writing.result()  # type: ignore[union-attr]
        assert path.read_bytes().count(b"\n") >= 2


def test_a_worker_whose_run_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    lock.acquire_once(tmp_path)
    with AnswerCache(tmp_path / FOLDER / "00000.jsonl") as cache:
        cache.add({"a": Answer("one")})
        for file in tmp_path.glob("lock*"):
            file.unlink()
        with pytest.raises(LockLostError):
            cache.add({"b": Answer("two")})
    lock.release_all()
    assert (tmp_path / FOLDER / "00000.jsonl").read_bytes().count(b"\n") == 1
