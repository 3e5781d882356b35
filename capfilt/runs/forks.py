"""fork.json: the run that another one takes over from; believed at the root of a run alone, and from its own user."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from capfilt.errors import RunError
from capfilt.storage import documents, safe_paths
from capfilt.storage.paths import StoragePath, storage_path

FORK = "fork.json"
"""In the folder of a run that was forked: which run it came from."""


def origin(root: StoragePath) -> StoragePath | None:
    """The run that a run takes over from; None for one that is no fork.

    RunError for a `fork.json` that is none, or that another user wrote: it makes a run take what lies elsewhere.
    """
    path = root / FORK
    try:
        with safe_paths.open_file(path) if isinstance(path, Path) else nullcontext() as file:
            found = documents.read_object(path)["from"]
            if file is not None and (owner := os.fstat(file.fileno()).st_uid) != os.geteuid():
                raise RunError(
                    f"{path} was written by user {owner}, and this is user {os.geteuid()}: a fork takes over what lies"
                    " elsewhere, so only who began it may go on with it. Remove the file, or begin another --fork."
                )
    except FileNotFoundError:
        return None
    except KeyError:
        raise RunError(f"{path} does not say `from` which run it was forked; remove it.") from None
    if not isinstance(found, str) or not ("://" in found or found.startswith("/")) or ".." in found.split("/"):
        raise RunError(f"{path} names no run folder in full, but {str(found)[:80]!r}; remove it.")
    return storage_path(found)


def run_of(folder: StoragePath) -> StoragePath | None:
    """The root of the run that a folder is in: itself, or one of the two above it."""
    return next((root for root in (folder, *folder.parents[:2]) if (root / safe_paths.PLAN).is_file()), None)
