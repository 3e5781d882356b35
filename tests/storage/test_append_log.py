from __future__ import annotations

import time
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from capfilt.storage.append_log import RemoteLog
from capfilt.storage.remote_path import RemotePath


def test_a_journal_has_every_line_in_the_end(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    for pause in (0.0, 1000.0):
        monkeypatch.setattr(RemoteLog, "PAUSE", pause)
        path = store / f"log-{pause}"
        path.write_bytes(b"0\n")
        with RemoteLog(path, b"0\n") as journal:
            for number in range(1, 100):
                journal.add(b"%d\n" % number)
        assert [int(line) for line in path.read_bytes().split()] == list(range(100))
    with RemoteLog(store / "none"):
        pass
    assert not (store / "none").exists()


def test_a_write_of_a_journal_that_fails_loses_nothing(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write, answers = MemoryFileSystem.pipe_file, iter([RuntimeError("no route"), None, RuntimeError("still none")])

    def shaky(self: Any, path: str, value: bytes, **kwargs: Any) -> None:
        if (error := next(answers)) is not None:
            raise error
        write(self, path, value, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", shaky)
    monkeypatch.setattr(RemoteLog, "PAUSE", 1000.0)
    with RemoteLog(store / "log") as journal:
        journal.add(b"1\n")
        journal.add(b"2\n")
    assert (store / "log").read_bytes() == b"1\n2\n"
    assert "no route: the newest lines of this log are not there yet" in caplog.text
    journal = RemoteLog(store / "log")
    journal._written = time.monotonic()
    journal.add(b"3\n")
    with pytest.raises(OSError, match="still none"):
        journal.__exit__(None)


def test_what_stopped_the_work_is_reported_and_not_its_log(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", broken)
    with pytest.raises(ZeroDivisionError), RemoteLog(store / "log") as journal:
        journal.add(b"1\n")
        raise ZeroDivisionError
