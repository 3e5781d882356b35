"""Opens local files of a run folder so that nothing in the folder can lead out of it.

A run folder may come from another user, or lie where others write. Below its root (the folder that holds plan.json)
no symbolic link is followed when something is written, renamed or removed: every folder on the way is opened by its
name in its parent, so that a link created at any moment is refused. Only regular files up to a given size are read.
The root itself and the folders above it may be links: whoever named the folder is responsible for those.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from capfilt.errors import RunError

PLAN = "plan.json"
"""The file that makes a folder a run."""

PRIVATE = 0o600
"""The mode of files in which a secret may have escaped `redact`: plans, recipes, logs."""

_LEVELS = 8  # how many folders above a file may be the root of its run; the deepest file of a run has five
_TRAVERSE = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # O_NONBLOCK: a FIFO without a writer would block


def check_relative(name: object) -> str:
    """Return a path that was read from a file. ValueError unless it is relative and stays in its folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"a relative path is needed, not {str(name)[:80]!r}")
    os.fsencode(name)  # a lone surrogate cannot be in a file name: UnicodeEncodeError, which is a ValueError
    parts = name.split("/")  # not pathlib: a ledger of a million shards has three million of these
    if not parts[0] or ".." in parts or not any(part not in ("", ".") for part in parts) or "://" in name:
        raise ValueError(f"the path {name[:80]!r} leads out of the folder that it is in")
    return name


def check_file_name(name: object) -> str:
    """Return a file name that was read from a file. ValueError unless it is one part of a path."""
    path = check_relative(name)
    if "/" in path or path == ".":
        raise ValueError(f"a file name is needed, not {path[:80]!r}")
    return path


def _absolute(path: str | Path) -> str:
    """The absolute path, with its `..` kept: behind a link, `..` is not the folder of the link."""
    # os.getcwd fails where the working directory was removed, as a job's may be: call it for relative paths alone.
    return os.fspath(path) if os.path.isabs(path) else os.path.join(os.getcwd(), path)


def run_root(path: str) -> str | None:
    """The nearest folder above a path that holds a plan.json; None where there is none."""
    folder = _absolute(path)
    for _ in range(_LEVELS):
        folder, _, name = folder.rpartition("/")
        if not folder or name == "..":
            return None
        if os.path.lexists(f"{folder}/{PLAN}"):
            return folder
    return None


@contextmanager
def opened_folder(path: Path, make: bool = False) -> Iterator[int]:
    """Open a folder for the `dir_fd` of os's functions; `make` creates it and its missing parents. RunError where,
    below the root of a run, a part of the path is a link."""
    full = _absolute(path)
    root = run_root(f"{full}/.")
    if root is None:
        if make:
            os.makedirs(full, exist_ok=True)
        handle = os.open(full, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    else:
        handle = _walk(root, [name for name in full[len(root) :].split("/") if name not in ("", ".")], make)
    try:
        yield handle
    finally:
        os.close(handle)


def _walk(root: str, names: list[str], make: bool) -> int:
    """Open the folders below `root` one by one, following no link; returns the last."""
    handle, reached = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), root
    for number, name in enumerate(names, 1):
        reached = f"{reached}/{name}"
        flags = _TRAVERSE if number < len(names) else os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        parent = handle
        try:
            handle = _open_below(parent, name, flags | os.O_NOFOLLOW, make)
        except OSError as error:
            if _is_link(name, parent):
                raise link_error(reached) from None
            error.filename = reached
            raise
        finally:
            os.close(parent)
    return handle


def _open_below(parent: int, name: str, flags: int, make: bool) -> int:
    try:
        return os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):  # another process was faster, or a broken link has this name
        os.mkdir(name, dir_fd=parent)
    return os.open(name, flags, dir_fd=parent)


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode)
    except OSError:
        return False


def link_error(path: str | Path) -> RunError:
    """The error for a link inside a run folder."""
    return RunError(f"{path} is a link, and in a run folder none is followed: remove it, or put its target there.")


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents. RunError where a part of the path in a run is a link."""
    with opened_folder(path, make=True):
        pass


def create_file(folder: int, path: Path, mode: int) -> BinaryIO:
    """Create a file that must not exist yet in an opened folder; `path` is its whole path, for error messages."""

    def opener(name: str, flags: int) -> int:
        return os.open(os.path.basename(name), flags | os.O_NOFOLLOW, mode, dir_fd=folder)

    return open(path, "xb", opener=opener)


def open_log(path: Path, mode: int = 0o644) -> int:
    """Open a file for appending and reading, and create it where it is missing; the caller closes the descriptor.
    RunError for a link, a device, or a file with a second hard link, which may be another user's."""
    with opened_folder(path.parent) as folder:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            file = os.open(path.name, flags, mode, dir_fd=folder)
        except OSError as error:
            if _is_link(path.name, folder):
                raise link_error(path) from None
            error.filename = str(path)
            raise
    opened = os.fstat(file)
    if not stat.S_ISREG(opened.st_mode) or opened.st_nlink != 1:
        os.close(file)
        raise RunError(
            f"{path} is a device, or a file with a second hard link: nothing was written to it; remove it, or copy it."
        )
    return file


def open_file(path: Path, follow: bool = False) -> BufferedReader:
    """Open a regular file for reading; with `follow` it may be reached by a link.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        RunError: it is a link, a device or a pipe.
    """
    return os.fdopen(_opened_regular(path, follow)[0], "rb")


def _opened_regular(path: Path, follow: bool) -> tuple[int, int]:
    """The descriptor of a regular file and its size."""
    try:
        file = os.open(path, _READ if follow else _READ | os.O_NOFOLLOW)
    except OSError:
        if not follow and os.path.islink(path):
            raise link_error(path) from None
        raise
    opened = os.fstat(file)
    if not stat.S_ISREG(opened.st_mode):
        os.close(file)
        if stat.S_ISDIR(opened.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise not_regular(path)
    return file, opened.st_size


def not_regular(path: str | Path) -> RunError:
    """The error for a device, a pipe or a socket."""
    return RunError(f"{path} is a device, a pipe or a socket, and no regular file: remove it.")


def check_file(path: Path) -> Path:
    """Return a path that another reader opens. RunError for a device, a pipe or a socket."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # the reader raises it again when it opens the file
        return path
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise not_regular(path)
    return path


def read_bytes(path: Path, limit: int) -> bytes:
    """The bytes of a regular file. RunError, before any is read, for one of more than `limit` bytes."""
    file, size = _opened_regular(path, follow=False)
    try:
        if size > limit:
            raise too_large(path, limit)
        data = os.read(file, size)
        while len(data) < size and (more := os.read(file, size - len(data))):
            data += more
        return data
    finally:
        os.close(file)


def too_large(path: object, limit: int) -> RunError:
    """The error for a file that is larger than any file of its kind should be."""
    return RunError(
        f"{path} is larger than {limit >> 20} MiB, the limit for a file of its kind, and was not read; remove it."
    )


def unlink(path: Path) -> None:
    """Remove a file, where there is one, or a link itself. RunError where a folder of its path in a run is a link."""
    with suppress(FileNotFoundError), opened_folder(path.parent) as folder:
        os.unlink(path.name, dir_fd=folder)


def remove_tree(path: Path) -> None:
    """Remove a folder and its contents, as far as possible; a link itself stays. RunError where a part of the path
    in a run is a link."""
    with suppress(FileNotFoundError, NotADirectoryError), opened_folder(path.parent) as folder:
        shutil.rmtree(path.name, ignore_errors=True, dir_fd=folder)


def list_names(path: Path) -> list[str]:
    """The names in a folder of a run; [] where there is no folder. RunError where a part of its path is a link."""
    try:
        with opened_folder(path) as folder:
            return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def check_model(path: Path) -> None:
    """Refuse a model in a run folder that is reached by a link, or for which `check_tree` raises.

    A model elsewhere may be made of links: the cache of the Hugging Face hub is.
    """
    root = run_root(str(path / "."))
    if root is not None and path.is_dir():
        with opened_folder(path):
            check_tree(path, Path(root))


def check_tree(folder: Path, root: Path | None = None) -> None:
    """Refuse a run folder that holds a link out of it, a device, a pipe or a socket, at any depth.

    `root` is the run that the folder lies in, where it is not one itself. Only folders are read, no files.
    """
    start, home = os.path.realpath(folder), os.path.realpath(root or folder)
    waiting = [start]
    while waiting:
        try:
            entries = os.scandir(waiting.pop())
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # it has just gone, or may not be read
            continue
        with entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):  # first: a large run has millions of them, and little else
                    continue
                if entry.is_symlink():
                    if not os.path.realpath(entry.path).startswith(f"{home}/"):
                        raise link_error(os.path.join(folder, os.path.relpath(entry.path, start)))
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif os.path.lexists(entry.path):
                    raise not_regular(os.path.join(folder, os.path.relpath(entry.path, start)))
