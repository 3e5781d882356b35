"""The exceptions of users' mistakes and of data's faults; bugs of our own stay `assert`.

    CapfiltError            exit code 1; the message is one line for a person
    ├── RecipeError         exit code 2; an unknown key or preset, roles that do not meet
    ├── UsageError          exit code 2; a command line that cannot be meant
    ├── RunError            a run folder, ledger or balance that does not hold
    │   ├── ShortfallError  all is done, and too little of it came to something; carries the result
    │   └── LockLostError   another driver took the run folder over, or its lock was removed
    ├── DataError
    │   ├── ShardError      a shard that is not there or cannot be read
    │   │   └── StorageError    what keeps it does not give it now, and may later
    │   ├── ImageError      bytes that are no usable picture
    │   └── TextError       a caption or vocabulary that cannot be used
    ├── ModelError          an architecture or checkpoint that does not fit
    └── ClusterError        work that could not be placed or finished
        └── TimeLimitError  a piece of work that takes longer than it may

Every message says what was found, what is allowed and what to do, on one line of bounded length, whatever the names
in it hold. The classes carry the exit code, so that the command line needs one `except` and no table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from capfilt.printable import MAX_MESSAGE, MAX_NAME, printable


class CapfiltError(Exception):
    """What a person can put right; printed without a traceback."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, MAX_MESSAGE))


class RecipeError(CapfiltError):
    """A recipe or preset that cannot be run as it stands."""

    exit_code = 2


class UsageError(CapfiltError):
    """A command line that cannot be meant."""

    exit_code = 2


class RunError(CapfiltError):
    """A run folder, ledger or balance that does not hold."""


class ShortfallError(RunError):
    """Work that is done and committed, of which nothing, or less than was asked for, succeeded; `result` is printed."""

    def __init__(self, message: str, result: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = None if result is None else dict(result)


class LockLostError(RunError):
    """A run folder that is not this command's any more."""


class DataError(CapfiltError):
    """A fault of what came in."""


class ShardError(DataError):
    """A shard that is not there or cannot be read."""


class StorageError(ShardError):
    """A shard whose storage failed; asked again, it may not."""


class ImageError(DataError):
    """Bytes that are no usable picture."""


class TextError(DataError):
    """A caption or vocabulary that cannot be used."""


class ModelError(CapfiltError):
    """An architecture or checkpoint that does not fit."""


class ClusterError(CapfiltError):
    """Work that could not be placed or finished."""


class TimeLimitError(ClusterError):
    """A piece of work that takes longer than it may."""


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest allowed name, or "" when none is near.

    "demo" is taken to be near "bootstrap/demo" and "lr" near "optimizer.lr": people forget the first part.
    """
    if len(found) > MAX_NAME:
        return ""
    names = list(allowed)
    tails = [name for name in names if found and name.replace(".", "/").endswith("/" + found)]
    folded = {name.lower(): name for name in names}
    near = tails or [folded[match] for match in get_close_matches(found.lower(), folded, n=1)]
    return f" Did you mean {near[0]!r}?" if near else ""
