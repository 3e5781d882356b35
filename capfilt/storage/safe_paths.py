"""Files below a run's folder, opened so that nothing in the folder can lead out of it.

A run folder may come from somebody else, or lie where others write. Below its root (the folder that holds plan.json)
no link is followed when something is written, renamed or removed: every folder on the way is opened by its name in the
one above it, so that a link planted at any moment is refused and not used. What is read is a regular file, of a stated
size at most. The root itself and what lies above it may be links: those belong to whoever named the folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from capfilt.errors import RunError

PLAN = "plan.json"
"""What makes a folder a run."""

PRIVATE = 0o600
"""The mode of files that may hold a secret whose kind nobody knew: plans, recipes, logs."""

_LEVELS = 8  # folders above a file in which the root of its run is looked for; the deepest file has five
_PASSED = os.O_DIRECTORY | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # a FIFO without a writer must not stop anybody


def relative(name: object) -> str:
    """A path that was read from a file, checked to lead nowhere but down. ValueError for any other."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"a relative path is needed, not {str(name)[:80]!r}")
    os.fsencode(name)  # a half of a pair that makes one character is in no name: UnicodeEncodeError, a ValueError
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "://" in name:
        raise ValueError(f"the path {name[:80]!r} leads out of the folder that it is in")
    return name


def plain_name(name: object) -> str:
    """A name that was read from a file, checked to be one part of a path. ValueError for any other."""
    found = relative(name)
    if "/" in found or found == ".":
        raise ValueError(f"a file name is needed, not {found[:80]!r}")
    return found


def _absolute(path: str | Path) -> str:
    """A path from the root down, as it is otherwise: `..` behind a link is not what lies above the link."""
    # A working directory that was removed, as a job's may be, matters to relative paths alone.
    return os.fspath(path) if os.path.isabs(path) else os.path.join(os.getcwd(), path)


def run_root(path: str) -> str | None:
    """The nearest folder above a path that is a run; None where there is none."""
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
    """A handle of a folder, for the `dir_fd` of os's functions; `make` creates what is missing on the way.

    Raises:
        RunError: below the root of a run, a link stands on the way.
    """
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
    """Go down from a folder, one name at a time, and never through a link."""
    handle, where = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), root
    for number, name in enumerate(names, 1):
        where = f"{where}/{name}"
        flags = _PASSED if number < len(names) else os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        above = handle
        try:
            handle = _step(above, name, flags | os.O_NOFOLLOW, make)
        except OSError as error:
            if _is_link(name, above):
                raise refused(where) from None
            error.filename = where
            raise
        finally:
            os.close(above)
    return handle


def _step(above: int, name: str, flags: int, make: bool) -> int:
    try:
        return os.open(name, flags, dir_fd=above)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):  # another process was faster, or a link to nowhere stands there
        os.mkdir(name, dir_fd=above)
    return os.open(name, flags, dir_fd=above)


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.lstat(name, dir_fd=folder).st_mode)
    except OSError:
        return False


def refused(path: str | Path) -> RunError:
    """The error for a link where none may be."""
    return RunError(
        f"{path} is a link, and in a run folder none is followed: remove it, or put there what it leads to."
    )


def make_folder(path: Path) -> None:
    """Create a folder and what is missing above it. RunError where a link of a run is on the way."""
    with opened_folder(path, make=True):
        pass


def open_part(folder: int, path: Path, mode: int) -> BinaryIO:
    """Create a file that must not be there, in an opened folder, to write to; its name says the whole path."""

    def opener(name: str, flags: int) -> int:
        return os.open(os.path.basename(name), flags | os.O_NOFOLLOW, mode, dir_fd=folder)

    return open(path, "xb", opener=opener)


def open_log(path: Path, mode: int = 0o644) -> int:
    """Open a file to append to and to read, created where it is missing; the descriptor is the caller's to close.

    Raises:
        RunError: a link, a device, or a file that has another name elsewhere: nothing was written to it.
    """
    with opened_folder(path.parent) as folder:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            file = os.open(path.name, flags, mode, dir_fd=folder)
        except OSError as error:
            if _is_link(path.name, folder):
                raise refused(path) from None
            error.filename = str(path)
            raise
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(file)
        raise RunError(
            f"{path} is no file of its own (a device, or a file that has a second name): nothing was written to it;"
            " remove it, or copy it."
        )
    return file


def open_file(path: Path, follow: bool = False) -> BufferedReader:
    """Open a regular file to read from; with `follow` its name may be a link.

    Raises:
        FileNotFoundError: there is none.
        RunError: a link, a folder, a device or a pipe.
    """
    return os.fdopen(_opened_regular(path, follow)[0], "rb")


def _opened_regular(path: Path, follow: bool) -> tuple[int, int]:
    """The descriptor of a regular file and its size."""
    try:
        file = os.open(path, _READ if follow else _READ | os.O_NOFOLLOW)
    except OSError:
        if not follow and os.path.islink(path):
            raise refused(path) from None
        raise
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        os.close(file)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise not_regular(path)
    return file, found.st_size


def not_regular(path: str | Path) -> RunError:
    """The error for a device, a pipe or a socket."""
    return RunError(f"{path} is a device, a pipe or a socket, and no regular file: remove it.")


def check_file(path: Path) -> Path:
    """The path again, for those who open it themselves. RunError for what is there and is no regular file."""
    try:
        mode = os.stat(path).st_mode
    except OSError:  # whoever opens it says what there is to say
        return path
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise not_regular(path)
    return path


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file as a whole. RunError for one of more than `limit` bytes, of which nothing is read then."""
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
    """The error for a file that is larger than any of its kind."""
    return RunError(
        f"{path} is larger than {limit >> 20} MiB, which no file of its kind is: it is not read; remove it."
    )


def unlink(path: Path, missing_ok: bool = False) -> None:
    """Remove a file, or a link itself. RunError where a link of a run is on the way."""
    try:
        with opened_folder(path.parent) as folder:
            os.unlink(path.name, dir_fd=folder)
    except FileNotFoundError:
        if not missing_ok:
            raise


def remove_tree(path: Path) -> None:
    """Remove a folder and what is in it, as far as that can be done; of a link the link itself is left.

    Raises:
        RunError: a link of a run is on the way.
    """
    try:
        with opened_folder(path.parent) as folder:
            shutil.rmtree(path.name, ignore_errors=True, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        return


def entries(path: Path) -> list[str]:
    """The names in a folder of a run; [] where there is no folder. RunError where a link of a run is on the way."""
    try:
        with opened_folder(path) as folder:
            return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def check_model(path: Path) -> None:
    """Refuse a model in a run folder that is reached by a link, or that holds what `check_tree` refuses.

    A model elsewhere may be made of links: the cache of the Hugging Face hub is.
    """
    root = run_root(str(path / "."))
    if root is not None and path.is_dir():
        with opened_folder(path):
            check_tree(path, Path(root))


def check_tree(folder: Path, root: Path | None = None) -> None:
    """Refuse a run folder that holds a link out of it, a device, a pipe or a socket, wherever in it.

    `root` is the run that the folder lies in, where it is not one itself. It costs no look at any file, only at the
    names in each folder.
    """
    start, home = os.path.realpath(folder), os.path.realpath(root or folder)
    waiting = [start]
    while waiting:
        try:
            found = os.scandir(waiting.pop())
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # it has just gone, or nobody can look into it
            continue
        with found:
            for entry in found:
                if entry.is_symlink():
                    if not os.path.realpath(entry.path).startswith(f"{home}/"):
                        raise refused(os.path.join(folder, os.path.relpath(entry.path, start)))
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                    raise not_regular(os.path.join(folder, os.path.relpath(entry.path, start)))
