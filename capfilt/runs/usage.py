"""What the workers of a stage use, measured: CPU-seconds and GPU-seconds, added up over all commands.

Beside a stage's completions lies `ledger/STAGE.usage.jsonl`, to which the driver adds a line now and then. It decides
nothing: no fingerprint has it, a fork begins its own, and without it only the costs are unknown.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import Self

from capfilt.errors import CapfiltError, RunError
from capfilt.runs.ledger import Ledger
from capfilt.runs.round_figures import is_number
from capfilt.storage import documents
from capfilt.storage.append_log import append_line
from capfilt.storage.paths import StoragePath, make_folder
from capfilt.storage.remote_path import RemotePath

USAGE = ".usage.jsonl"
"""The ending of the file beside a stage's folder."""
PAUSE, REMOTE_PAUSE = 2.0, 10.0
"""Seconds between two lines at least: on a store each is a request with all lines of before."""
SHARE = 0.01
"""And at least this share of the command's time, so that a run of weeks has some hundred lines."""

_COUNTED = ("done", "samples", "busy", "reserved")
_LINE = (*_COUNTED, "cpus", "gpus")


@dataclass(frozen=True)
class Usage:
    """What the workers of a stage used, all commands together. A worker is busy while it works on an item, whatever
    comes of it; it is reserved from when its process begins, or one that was kept is taken, to the stage's end, loading
    and waiting too."""

    done: int = 0
    """Items that were done, or steps of a training."""
    samples: int = 0
    """Samples of these."""
    busy: float = 0.0
    """Seconds, summed over workers."""
    cpu_busy: float = 0.0
    """Seconds times the CPUs of their worker; so for the next three."""
    cpu_reserved: float = 0.0
    gpu_busy: float = 0.0
    gpu_reserved: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in Usage.__dataclass_fields__})

    @property
    def samples_per_second(self) -> float | None:
        """Of one worker while it is busy; None where no sample was counted."""
        return self.samples / self.busy if self.samples and self.busy else None


class Meter:
    """Counts what the workers of one stage use, and writes it down; a context manager.

    Without a file it counts for nobody.
    """

    def __init__(self, path: StoragePath | None = None, cpus: float = 1.0, gpus: float = 0.0):
        """`cpus` and `gpus` are of each worker."""
        self._path, self._size = path, {"cpus": cpus, "gpus": gpus}
        self._counts = dict.fromkeys(_COUNTED, 0.0)
        self._since: dict[str, float] = {}  # until when the time of each worker that is held has been counted
        self._begun = self._written = time.monotonic()
        self._first = True

    @classmethod
    def of(cls, ledger: Ledger, cpus: float, gpus: float) -> Self:
        return cls(ledger.path.with_name(f"{ledger.stage}{USAGE}"), cpus, gpus)

    def hold(self, worker: str, ago: float = 0.0) -> None:
        """A worker is reserved, since so many seconds."""
        self._since[worker] = time.monotonic() - ago

    def release(self, worker: str) -> None:
        """A worker has ended; one that was never held costs nothing."""
        now = time.monotonic()
        self._counts["reserved"] += now - self._since.pop(worker, now)

    def work(self, seconds: float) -> None:
        """A worker was busy so long."""
        self._counts["busy"] += seconds

    def end(self, done: int = 0, samples: int = 0) -> None:
        """Something ended: count what was done, and write if it is time to."""
        self._counts["done"] += done
        self._counts["samples"] += samples
        now = time.monotonic()
        pause = REMOTE_PAUSE if isinstance(self._path, RemotePath) else PAUSE
        if now - self._written >= max(pause, SHARE * (now - self._begun)):
            self.write()

    def write(self) -> None:
        """Add a line with what was counted since the last one, if there is anything."""
        now = time.monotonic()
        for worker, since in self._since.items():
            self._counts["reserved"] += now - since
            self._since[worker] = now
        line = {
            name: round(value, 3) if name in ("busy", "reserved") else int(value)
            for name, value in self._counts.items()
        }
        self._written = now
        if self._path is None or not any(line.values()):
            return
        make_folder(self._path.parent)
        # An empty line first: a crash of the machine may have torn the last one of the command before.
        text = "\n" * self._first + json.dumps({**line, **self._size}) + "\n"
        append_line(self._path, text.encode())
        self._counts, self._first = dict.fromkeys(_COUNTED, 0.0), False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in list(self._since):
            self.release(worker)
        try:
            self.write()
        except (OSError, CapfiltError) as error:
            if kind is None:
                raise
            # What ended the stage is the error to show.
            logging.getLogger(__name__).warning("%s: the last times are not written down: %s", self._path, error)


def read_usage(ledger: Ledger) -> Usage | None:
    """What a stage used, as its commands wrote it down; None where none did. RunError for a malformed file."""
    path = ledger.path.with_name(f"{ledger.stage}{USAGE}")
    total: Usage | None = None
    for line in documents.read_json_lines(path):
        if not all(is_number(line.get(name)) and 0 <= line[name] < 1e15 for name in _LINE):
            raise RunError(f"{path} has a line without the times of workers; remove the file, only costs are lost.")
        busy, reserved, cpus, gpus = (float(line[name]) for name in ("busy", "reserved", "cpus", "gpus"))
        used = Usage(
            done=int(line["done"]),
            samples=int(line["samples"]),
            busy=busy,
            cpu_busy=cpus * busy,
            cpu_reserved=cpus * reserved,
            gpu_busy=gpus * busy,
            gpu_reserved=gpus * reserved,
        )
        total = used if total is None else total + used
    return total
