"""The files of training states: the only place that knows how a state lies on a disk or a store.

A state is a folder named by its step, written by torch.distributed.checkpoint: every process its own share, or one
process all of it. What counts is the marker in it, which is written last, whole or not at all, and has the size and
the sha256 of every other file: a folder without one is what a kill left, a folder that differs from its own is damaged.
"""

from __future__ import annotations

import json
import warnings
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from capfilt.reports.ledger import sha256_file, write_json
from capfilt.reports.places import Place, Remote, listing, remove_all

MARKER = "state.json"
"""In a state's folder: which training it is of, and what files it has."""


_FRESH: dict[str, Any] = {"use_listings_cache": False}  # other processes write beside this one


class DamagedState(Exception):
    """A state that does not have the bytes that were written; its text says what is wrong."""


class StateFiles:
    """The states in one folder."""

    def __init__(self, folder: Place):
        self.folder = folder

    def path(self, step: int) -> Place:
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
        written = async_save(tensors, storage_writer=_writer(self.path(step)), process_group=group, no_dist=alone)
        assert isinstance(written, Future)
        return written

    def commit(self, step: int, about: dict[str, Any]) -> None:
        """Make a state count whose files are all there."""
        there = sorted(listing(self.path(step)).items())
        files = {name: [stat.st_size, sha256_file(self.path(step) / name)] for name, stat in there if stat is not None}
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
        return set(_reader(self.path(step)).read_metadata().state_dict_metadata)

    def read(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Fill these tensors, each process those parts that it has of them."""
        _alone_on_purpose()
        load(tensors, storage_reader=_reader(self.path(step)), no_dist=True)

    def remove(self, step: int) -> None:
        """Remove a state; its marker goes first."""
        (self.path(step) / MARKER).unlink(missing_ok=True)
        remove_all(self.path(step))

    def sweep(self) -> None:
        """Remove what a kill left half written."""
        for name, stat in listing(self.folder).items():
            if stat is None and not (self.folder / name / MARKER).is_file():
                remove_all(self.folder / name)

    def remove_all(self) -> None:
        """Remove every state."""
        remove_all(self.folder)


def _writer(folder: Place) -> FileSystemWriter:
    return (
        FsspecWriter(folder.url, sync_files=False, **_FRESH) if isinstance(folder, Remote) else FileSystemWriter(folder)
    )


def _reader(folder: Place) -> FileSystemReader:
    return FsspecReader(folder.url, **_FRESH) if isinstance(folder, Remote) else FileSystemReader(folder)


def _alone_on_purpose() -> None:
    """torch warns where one process reads or writes for itself, from its thread, so for good and not for a while."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
