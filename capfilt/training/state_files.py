"""The files of training states: the only place that knows how a state lies on disk.

A state is a folder named by its step, written by torch.distributed.checkpoint: every process its own share, or one
process all of it. What counts is the marker in it, which is written last, whole or not at all, and has the size and
the sha256 of every other file: a folder without one is what a kill left, a folder that differs from its own is damaged.
"""

from __future__ import annotations

import json
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from capfilt.reports.ledger import sha256_file, write_json

MARKER = "state.json"
"""In a state's folder: which training it is of, and what files it has."""


class DamagedState(Exception):
    """A state that does not have the bytes that were written; its text says what is wrong."""


class StateFiles:
    """The states in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, step: int) -> Path:
        """The folder of the state after `step` steps."""
        return self.folder / f"{step:09d}"

    def steps(self) -> list[int]:
        """The states that were written to their end, oldest first."""
        return sorted(int(marker.parent.name) for marker in self.folder.glob(f"*/{MARKER}"))

    def write(self, step: int, tensors: dict[str, Tensor], group: dist.ProcessGroup | None, alone: bool) -> Future[Any]:
        """Take a copy of the tensors and write it in a thread: together with the processes of `group`, or alone.

        torch wants a group of CPUs from one that writes alone, too, where there are processes at all.
        """
        self.path(step).mkdir(parents=True, exist_ok=True)
        _alone_on_purpose()
        writer = FileSystemWriter(self.path(step))
        written = async_save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
        assert isinstance(written, Future)
        return written

    def commit(self, step: int, about: dict[str, Any]) -> None:
        """Make a state count whose files are all there."""
        files = {p.name: [p.stat().st_size, sha256_file(p)] for p in sorted(self.path(step).iterdir())}
        write_json(self.path(step) / MARKER, {**about, "step": step, "files": files})

    def about(self, step: int) -> dict[str, Any]:
        """What `commit` was told. Raises DamagedState."""
        path = self.path(step) / MARKER
        try:
            found = json.loads(path.read_bytes())
            return {**found, "files": dict(found["files"])}
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedState(f"{path} cannot be read ({type(error).__name__})") from error

    def check(self, step: int) -> dict[str, Any]:
        """Read every byte of a state; returns what `commit` was told. Raises DamagedState."""
        about = self.about(step)
        for name, (size, digest) in about["files"].items():
            path = self.path(step) / name
            if not path.is_file():
                raise DamagedState(f"{path} is not there")
            if path.stat().st_size != size or sha256_file(path) != digest:
                raise DamagedState(f"{path} does not have the bytes that were written")
        return about

    def names(self, step: int) -> set[str]:
        """The names of its tensors."""
        return set(FileSystemReader(self.path(step)).read_metadata().state_dict_metadata)

    def read(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Fill these tensors, each process those parts that it has of them."""
        _alone_on_purpose()
        load(tensors, storage_reader=FileSystemReader(self.path(step)), no_dist=True)

    def remove(self, step: int) -> None:
        """Remove a state; its marker goes first."""
        (self.path(step) / MARKER).unlink(missing_ok=True)
        shutil.rmtree(self.path(step), ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a kill left half written."""
        for path in self.folder.glob("*"):
            if path.is_dir() and not (path / MARKER).is_file():
                shutil.rmtree(path, ignore_errors=True)

    def remove_all(self) -> None:
        """Remove every state."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _alone_on_purpose() -> None:
    """torch warns where one process reads or writes for itself, from its thread, so for good and not for a while."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
