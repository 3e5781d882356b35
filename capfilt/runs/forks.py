"""fork.json: the run that a fork takes finished work from; only trusted in the root of a run and from its own user."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from capfilt.errors import RunError
from capfilt.storage import documents, safe_paths
from capfilt.storage.paths import StoragePath, storage_path

FORK = "fork.json"
"""The file in the folder of a fork that names the run it was forked from."""


def forked_from(root: StoragePath) -> StoragePath | None:
    """The run that the run in `root` was forked from; None for one that is not a fork.

    Raises:
        RunError: `fork.json` is malformed, or another user wrote it: it makes a run read files from elsewhere.
    """
    path = root / FORK
    try:
        with safe_paths.open_file(path) if isinstance(path, Path) else nullcontext() as file:
            source = documents.read_object(path)["from"]
            if file is not None and (owner := os.fstat(file.fileno()).st_uid) != os.geteuid():
                raise RunError(
                    f"{path} was written by user {owner}, and this is user {os.geteuid()}: a fork reads files from"
                    " elsewhere, so only the user who began it may go on with it. Remove the file, or begin another"
                    " --fork."
                )
    except FileNotFoundError:
        return None
    except KeyError:
        raise RunError(f"{path} does not say `from` which run it was forked; remove it.") from None
    if not isinstance(source, str) or not ("://" in source or source.startswith("/")) or ".." in source.split("/"):
        raise RunError(f"{path} names no run folder in full, but {str(source)[:80]!r}; remove it.")
    return storage_path(source)


def run_root(folder: StoragePath) -> StoragePath | None:
    """The root of the run that a folder is in: itself, or one of the two folders above it."""
    return next((root for root in (folder, *folder.parents[:2]) if (root / safe_paths.PLAN).is_file()), None)
