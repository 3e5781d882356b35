"""The ledger: one completion file a shard, which is the commit, and the atomic writes it rests on.

A rerun trusts a completion only where its fingerprint is the wanted one and its outputs lie there with the
recorded sizes; everything else is done again, which costs time and never truth.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from capfilt.errors import RunError
from capfilt.redact import redact_tree
from capfilt.runs import forks
from capfilt.runs.tally import Tally
from capfilt.storage import documents, safe_paths, write_guard
from capfilt.storage.atomic import atomic, link_or_copy, sha256_file, write_json
from capfilt.storage.paths import StoragePath, map_concurrent, relative_to, remove_file
from capfilt.storage.remote_path import RemotePath

WITHDRAWN = ".withdrawn"
"""Ends the name of the mark that a shard of a fork is to be done again though the run it came from has it."""

FORMAT = 2
"""The version of what plans and fingerprints hold. It goes up when either changes its contents: a run folder of another
version is refused (`run.check_format`) instead of being done again piece by piece, unnoticed."""


def fingerprint(*parts: Any) -> str:
    """Return the sha256 of FORMAT and the parts' canonical JSON; a part is anything JSON can hold.

    An address counts without its secrets: with a fresh signature it leads to the same thing.
    """
    canonical = json.dumps(redact_tree([FORMAT, *parts]), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Output:
    """One file that a shard's job wrote; `path` is relative to the ledger's folder, so a run may be moved."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Input:
    """What a shard's job read, all of it: what lies there now may be compared. Where it lay the run's plan says."""

    bytes: int
    sha256: str
    version: str = ""
    """What storage said of it before it was read: its time of writing or etag. While that stands, nothing need be read
    to know that it is the same."""


@dataclass(frozen=True)
class Completion:
    """The record of one shard that is done."""

    shard: str
    fingerprint: str
    outputs: tuple[Output, ...]
    tally: Tally
    input: Input | None = None
    """None where nothing was read to its end, and in ledgers from before inputs were recorded."""

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, for json.dumps."""
        outputs = [{"path": o.path, "bytes": o.bytes, "sha256": o.sha256} for o in self.outputs]
        head = {"shard": self.shard, "fingerprint": self.fingerprint, "outputs": outputs}
        read = {} if self.input is None else {"input": asdict(self.input)}
        return {**head, **read, "tally": self.tally.to_json()}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Completion:
        """Read what `to_json` wrote; RunError for anything else, a path that leads out of the folder among it."""
        try:
            outputs = tuple(
                Output(safe_paths.check_relative(o["path"]), int(o["bytes"]), str(o["sha256"])) for o in obj["outputs"]
            )
            tally, read = Tally.from_json(obj["tally"]), obj.get("input")
            found = (
                None if read is None else Input(int(read["bytes"]), str(read["sha256"]), str(read.get("version", "")))
            )
            return cls(safe_paths.check_file_name(obj["shard"]), str(obj["fingerprint"]), outputs, tally, found)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RunError(f"this is no completion ({error!r}); delete it and run the stage again.") from error


class Ledger:
    """The completions of one stage: `folder/ledger/STAGE/SHARD.json`, one a shard."""

    def __init__(self, folder: StoragePath, stage: str) -> None:
        self.folder = folder
        self.stage = stage
        self.path = folder / "ledger" / stage

    def completion(self, shard: str, fingerprint: str) -> Completion | None:
        """Return the shard's completion if it can be trusted, else None: the shard is to be done (again).

        In a run that was forked, what is not here is taken over from the run that it forked, if it holds there.
        """
        found = self._trusted(shard, fingerprint)
        if found is None and self.origin is not None and not self._withdrawn(shard).is_file():
            found = self.origin._trusted(shard, fingerprint)
            return found and self._adopt(found, self.origin)
        return found

    def read(self, path: StoragePath) -> Completion | None:
        """Read one of `files`; None where it is torn (by a disk, not by a kill): doing the shard again mends it."""
        try:
            return _read(path)
        except (RunError, FileNotFoundError):
            return None

    def files(self) -> list[StoragePath]:
        """The completion files, in the order of shard names. RunError where the folder is reached by a link."""
        return [self.path / name for name in sorted(self._names()) if name.endswith(".json")]

    def _names(self) -> list[str]:
        return safe_paths.list_names(self.path) if isinstance(self.path, Path) else list(self.path.listing())

    def begun(self) -> set[str]:
        """The shards that have a completion, here or in the run that was forked, whatever it is worth: by listing, so
        that those that have none cost nothing."""
        own = {path.stem for path in self.files()}
        if self.origin is None:
            return own
        withdrawn = {name.removesuffix(WITHDRAWN) for name in self._names() if name.endswith(WITHDRAWN)}
        return own | self.origin.begun() - withdrawn

    def withdraw(self, shard: str) -> None:
        """Forget that a shard is done: a rerun does it again, in a fork too, whose origin still has it."""
        write_guard.check_lock(self.path)
        if self.origin is not None:
            with atomic(self._withdrawn(shard)):
                pass
        remove_file(self._file(shard))

    def commit(
        self, shard: str, fingerprint: str, outputs: Sequence[StoragePath], tally: Tally, read: Input | None = None
    ) -> Completion:
        """Record that the shard is done; `outputs` are in place already. Writing this one file is the commit.

        Raises RunError, naming the shard, for a tally that is not balanced or an output that is not there.
        """
        if imbalance := tally.imbalance():
            raise RunError(
                f"{self.stage}, shard {shard}: {imbalance}. Every input must end as kept, dropped or failed;"
                " nothing was committed. This is a bug, please report it."
            )
        recorded = tuple(self._output(shard, path) for path in outputs)
        done = Completion(shard, fingerprint, recorded, tally, read)
        write_json(self._file(shard), done.to_json())
        if self.origin is not None:
            remove_file(self._withdrawn(shard))
        return done

    def renew(self, done: Completion) -> None:
        """Write a completion anew whose work stands: the same input was found under another version."""
        write_json(self._file(done.shard), done.to_json())

    def completions(self) -> Iterator[Completion]:
        """Yield every completion in the order of shard names; RunError for a file that cannot be read."""
        yield from map_concurrent(_read, self.files(), isinstance(self.path, RemotePath))

    def total(self) -> Tally:
        """Add up the tallies of all completions."""
        return sum((done.tally for done in self.completions()), Tally.zero())

    def doubt(self, done: Completion, hashes: bool = False) -> str:
        """Say why the outputs of a completion do not hold, or "". `hashes` reads every byte of them."""
        for output in done.outputs:
            path = self.folder / output.path
            try:
                found = path.stat() if isinstance(path, RemotePath) else os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return f"{path} is not there"
            if isinstance(found, os.stat_result) and not stat.S_ISREG(found.st_mode):
                return f"{path} is no regular file"
            if found.st_size != output.bytes:
                return f"{path} has {found.st_size} bytes, {output.bytes} were committed"
            if hashes and sha256_file(path) != output.sha256:
                return f"{path} does not have the bytes that were committed"
        return ""

    def _trusted(self, shard: str, fingerprint: str) -> Completion | None:
        found = self.read(self._file(shard))
        if found is None or found.fingerprint != fingerprint or found.shard != shard:
            return None
        return None if self.doubt(found) else found

    @cached_property
    def origin(self) -> Ledger | None:
        """The same stage of the run that this one was forked from, as `fork.json` at the root of the run says."""
        root = forks.run_of(self.folder)
        forked = None if root is None else forks.origin(root)
        if root is None or forked is None:
            return None
        return Ledger(forked / str(relative_to(self.folder, root)), self.stage)

    def _adopt(self, found: Completion, origin: Ledger) -> Completion:
        for output in found.outputs:
            link_or_copy(origin.folder / output.path, self.folder / output.path)
        write_json(self._file(found.shard), found.to_json())
        return found

    def _output(self, shard: str, path: StoragePath) -> Output:
        try:
            relative = relative_to(path.resolve(), self.folder.resolve())
            return Output(relative.as_posix(), path.stat().st_size, sha256_file(path))
        except FileNotFoundError:
            raise RunError(f"{self.stage}, shard {shard}: {path} was to be committed and is not there.") from None
        except ValueError:
            raise RunError(f"{self.stage}, shard {shard}: {path} lies outside {self.folder}.") from None

    def _withdrawn(self, shard: str) -> StoragePath:
        return self.path / f"{shard}{WITHDRAWN}"

    def _file(self, shard: str) -> StoragePath:
        if not shard or shard.startswith(".") or "/" in shard or "\0" in shard:
            raise RunError(f"a shard cannot be called {shard!r}: its name becomes a file name. Rename the shard.")
        return self.path / f"{shard}.json"


def _read(path: StoragePath) -> Completion:
    try:
        return Completion.from_json(documents.parse(documents.read_bytes(path)))
    except (ValueError, RunError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete it and run the stage again.") from error
