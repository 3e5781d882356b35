"""Exceptions for mistakes of users and faults of data; bugs of this package are assertions.

    CapfiltError            exit code 1; the message is one line for a person
    ├── RecipeError         exit code 2; an unknown key or preset, or parts that do not fit
    ├── UsageError          exit code 2; a command line that cannot be run
    │   ├── FolderError         exit code 2; and RunError: a folder that cannot be what it was given as
    │   ├── NoShardError        exit code 2; and ShardError: what was given as shards names none
    │   ├── NoModelError        exit code 2; and ModelError: what was given as a model is none
    │   ├── AddressError        exit code 2; and ClusterError: an address of no form that there is
    │   └── ListError           exit code 2; and DataError: a list of URLs, or a column of it, that is not there
    ├── RunError            a run folder, ledger or balance that is not valid
    │   ├── ShortfallError  all is done, and too little of it succeeded; has the result
    │   └── LockLostError   another driver took the run folder over, or its lock was removed
    ├── DataError
    │   ├── ShardError      a shard that is not there or cannot be read
    │   │   └── StorageError    its storage cannot be read now, and may be later
    │   ├── ImageError      bytes that are not a usable image
    │   └── TextError       a caption or vocabulary that cannot be used
    ├── ModelError          an architecture or checkpoint that does not fit
    └── ClusterError        work that could not be started or finished
        └── TimeLimitError  a piece of work that takes longer than it may

Every message says what was found, what is allowed and what to do, on one line of bounded length, whatever characters
the names in it have. The exit code is an attribute of the class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from capfilt.printable import MAX_MESSAGE, MAX_NAME, printable

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|_STATUS_\w*ALLOC(ATION)?_FAILED", re.IGNORECASE
)


class CapfiltError(Exception):
    """An error that a user can correct; the command line prints it without a traceback."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, MAX_MESSAGE))


class RecipeError(CapfiltError):
    """A recipe or preset that cannot be run as it stands."""

    exit_code = 2


class UsageError(CapfiltError):
    """A command line that cannot be run."""

    exit_code = 2


class RunError(CapfiltError):
    """A run folder, ledger or balance that is not valid."""


class ShortfallError(RunError):
    """Work that is committed, of which nothing or less than requested succeeded; `result` is printed."""

    def __init__(self, message: str, result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = None if result is None else dict(result)


class LockLostError(RunError):
    """A run folder whose lock this command has lost."""


class DataError(CapfiltError):
    """A fault of the input data."""


class ShardError(DataError):
    """A shard that is not there or cannot be read."""


class StorageError(ShardError):
    """A shard whose storage failed; a later try may succeed."""


class ImageError(DataError):
    """Bytes that are not a usable image."""


class TextError(DataError):
    """A caption or vocabulary that cannot be used."""


class ModelError(CapfiltError):
    """An architecture or checkpoint that does not fit."""


class FolderError(RunError, UsageError):
    """A folder that is no run folder, that of another verb, or not empty where it must be."""


class NoShardError(ShardError, UsageError):
    """An argument that names no shard."""


class NoModelError(ModelError, UsageError):
    """An argument that names no model."""


class ListError(DataError, UsageError):
    """A list of URLs that is not there, or lacks a column that was asked for."""


class ClusterError(CapfiltError):
    """Work that could not be started or finished."""


class AddressError(ClusterError, UsageError):
    """An address at which nothing can work, whatever runs."""


class TimeLimitError(ClusterError):
    """A piece of work that takes longer than it may."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is an allocator that had no more to give: that of a CPU, of CUDA, or of one of its libraries, which
    raise four classes of torch for it and have only their words in common."""
    return type(error).__name__ == "OutOfMemoryError" or bool(_OUT_OF_MEMORY.search(str(error)))


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest allowed name, or "" when none is near.

    "demo" counts as near "bootstrap/demo" and "lr" as near "optimizer.lr": people leave out the first part.
    """
    if len(name) > MAX_NAME:
        return ""
    choices = list(allowed)
    tails = [choice for choice in choices if name and choice.replace(".", "/").endswith("/" + name)]
    folded = {choice.lower(): choice for choice in choices}
    near = tails or [folded[match] for match in get_close_matches(name.lower(), folded, n=1)]
    return f" Did you mean {near[0]!r}?" if near else ""
