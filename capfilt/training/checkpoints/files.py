"""The files of training states: the only place that knows how a state lies on a disk or a store.

A state is a folder named by its step, written by torch.distributed.checkpoint: every process its own share, or one
process all of it. What counts is the marker in it, which is written last, whole or not at all, and has the size and
the sha256 of every other file: a folder without one is what a kill left, a folder that differs from its own is damaged.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FileSystem, FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from capfilt.storage import documents, safe_paths
from capfilt.storage.atomic import atomic, sha256_file, write_json
from capfilt.storage.paths import StoragePath, listing, make_folder, remove_file, remove_folder
from capfilt.storage.remote_path import PART_BYTES, RemotePath

MARKER = "state.json"
"""In a state's folder: which training it is of, and what files it has."""


_FRESH: dict[str, Any] = {"use_listings_cache": False}  # other processes write beside this one


class DamagedState(Exception):
    """A state that does not have the bytes that were written; its text says what is wrong."""


class StateFiles:
    """The states in one folder."""

    def __init__(self, folder: StoragePath):
        self.folder = folder

    def path(self, step: int) -> StoragePath:
        """The folder of the state after `step` steps."""
        return self.folder / f"{step:09d}"

    def steps(self) -> list[int]:
        """The states that were written to their end, oldest first."""
        steps = (name for name, stat in listing(self.folder).items() if stat is None and re.fullmatch(r"\d{9}", name))
        return sorted(int(name) for name in steps if (self.folder / name / MARKER).is_file())

    def write(self, step: int, tensors: dict[str, Tensor], group: dist.ProcessGroup | None, alone: bool) -> Future[Any]:
        """Take a copy of the tensors and write it in a thread: together with the processes of `group`, or alone.

        torch wants a group of CPUs from one that writes alone, too, where there are processes at all.
        """
        make_folder(self.path(step))
        _alone_on_purpose()
        with plainly(self.path(step)):
            written = async_save(tensors, storage_writer=_writer(self.path(step)), process_group=group, no_dist=alone)
        assert isinstance(written, Future)
        return written

    def commit(self, step: int, about: dict[str, Any]) -> None:
        """Make a state count whose files are all there."""
        there = sorted(listing(self.path(step)).items())
        files = {name: [stat.st_size, sha256_file(self.path(step) / name)] for name, stat in there if stat is not None}
        write_json(self.path(step) / MARKER, {**about, "step": step, "files": files})

    def copy(self, other: StateFiles, step: int, about: dict[str, Any]) -> None:
        """Have a state of another training's here too. Its bytes are copied, for a state may be written over."""
        for name, stat in listing(other.path(step)).items():
            if stat is not None and name != MARKER:
                with (other.path(step) / name).open("rb") as read, atomic(self.path(step) / name) as file:
                    shutil.copyfileobj(read, file, PART_BYTES)
        self.commit(step, about)

    def about(self, step: int) -> dict[str, Any]:
        """What `commit` recorded. Raises DamagedState."""
        path = self.path(step) / MARKER
        try:
            record = documents.parse(documents.read_bytes(path))
            files = {
                safe_paths.check_file_name(name): (int(size), str(digest))
                for name, (size, digest) in record["files"].items()
            }
            if not isinstance(record["identity"], dict) or not isinstance(record["loss"], int | float | None):
                raise TypeError("identity or loss")
            return {**record, "files": files}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise DamagedState(f"{path} cannot be read ({type(error).__name__})") from error

    def check(self, step: int) -> dict[str, Any]:
        """Read every byte of a state; returns what `commit` recorded. Raises DamagedState."""
        about = self.about(step)
        for name, (size, digest) in about["files"].items():
            path = self.path(step) / name
            if not path.is_file() or (isinstance(path, Path) and path.is_symlink()):
                raise DamagedState(f"{path} is not there")
            if path.stat().st_size != size or sha256_file(path) != digest:
                raise DamagedState(f"{path} does not have the bytes that were written")
        self.names(step)
        return about

    def names(self, step: int) -> set[str]:
        """The names of its tensors. Raises DamagedState for a state that has anything else in it."""
        try:
            with plainly(self.path(step)):
                return set(_reader(self.path(step)).read_metadata().state_dict_metadata)
        except (pickle.PickleError, ValueError, TypeError, AttributeError, EOFError, LookupError) as error:
            raise DamagedState(f"{self.path(step)} is not a state of tensors alone ({error})") from error

    def read(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Fill these tensors, each process those parts that it has of them."""
        _alone_on_purpose()
        with plainly(self.path(step)):
            load(tensors, storage_reader=_reader(self.path(step)), no_dist=True)

    def remove(self, step: int) -> None:
        """Remove a state; its marker goes first."""
        try:
            remove_file(self.path(step) / MARKER)
        except OSError as error:
            logging.getLogger(__name__).warning("%s: an old state stays", error)
            return
        remove_folder(self.path(step))

    def sweep(self) -> None:
        """Remove what a kill left half written."""
        for name, stat in listing(self.folder).items():
            if stat is None and not (self.folder / name / MARKER).is_file():
                remove_folder(self.folder / name)


@contextmanager
def plainly(where: StoragePath) -> Iterator[None]:
    """Make torch's error of several processes, which is no Exception, an OSError that says what the first one met."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"{where}: {type(first).__name__}: {' '.join(str(first).split())}") from error


class _Store(FileSystem):
    """A folder on a store is there when something is in it. A client that is asked to make one looks for the bucket,
    and where it may not look tries to make that."""

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Nothing."""


class _StoreWriter(FsspecWriter):
    def __init__(self, url: str) -> None:
        super().__init__(url, sync_files=False)
        self.fs = _Store()  # type: ignore[assignment]  # as torch does, which is not checked there
        self.path = self.fs.init_path(url, **_FRESH)


METADATA = {
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
}
"""What the pickle that describes a state is made of. torch opens it as any pickle, and any pickle can run code."""


class _Unpickler(pickle.Unpickler):
    """Knows the classes of `METADATA` and torch's number formats, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        """A class by its name. UnpicklingError for any other."""
        if (module, name) in METADATA or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a state")


class _TensorsAlone(FileSystemReader):
    """A reader of states that have tensors and nothing that would be unpickled, in files of the state's own folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As torch does it. UnpicklingError, ValueError or TypeError for anything but tensors."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"it describes a {type(metadata).__name__}")
        for name, tensor in metadata.state_dict_metadata.items():
            if not isinstance(tensor, TensorStorageMetadata):  # of bytes torch makes an object, by pickle
                raise TypeError(f"{name} is no tensor")
        for part in metadata.storage_data.values():
            if safe_paths.check_file_name(part.relative_path) and part.transform_descriptors:
                raise TypeError(f"{part.relative_path} is written in another way")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _StoreReader(_TensorsAlone, FsspecReader):
    """The same on a store."""


def _writer(folder: StoragePath) -> FileSystemWriter:
    return _StoreWriter(folder.url) if isinstance(folder, RemotePath) else FileSystemWriter(folder)


def _reader(folder: StoragePath) -> FileSystemReader:
    return _StoreReader(folder.url, **_FRESH) if isinstance(folder, RemotePath) else _TensorsAlone(folder)


def _alone_on_purpose() -> None:
    """torch warns where one process reads or writes for itself, from its thread, so for good and not for a while."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
