"""The ledger: one completion file a shard, whose atomic write is the commit of that shard.

A rerun trusts a completion only where its fingerprint is the expected one and its outputs exist with the recorded
sizes; everything else is done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from capfilt.errors import RunError
from capfilt.redact import redact_tree
from capfilt.runs import forks
from capfilt.runs.tally import Tally, difference
from capfilt.storage import documents, safe_paths, write_guard
from capfilt.storage.atomic import atomic, link_or_copy, sha256_file, write_json
from capfilt.storage.paths import StoragePath, map_concurrent, relative_to, remove_file
from capfilt.storage.remote_path import RemotePath

WITHDRAWN = ".withdrawn"
"""The ending of an empty file which says that a fork does a shard again, though the run it was forked from has it."""

FORMAT = 2
"""The version of what plans and fingerprints contain, raised when either changes. A run folder of another version is
refused (`run.check_format`) instead of being done again shard by shard, unnoticed."""


def fingerprint(*parts: Any) -> str:
    """Return the sha256 of FORMAT and the parts' canonical JSON; a part is anything JSON can hold.

    URLs count without their secrets: with a new signature they name the same object.
    """
    canonical = json.dumps(redact_tree([FORMAT, *parts]), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Output:
    """A file that a shard's job wrote; `path` is relative to the folder of the ledger, so that a run may be moved."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Input:
    """The input that a shard's job read, to compare with what is there now; its URL is in the plan of the run."""

    bytes: int
    sha256: str
    version: str = ""
    """The modification time or ETag that the storage reported before it was read. While that is unchanged, the input
    need not be read to know that it is the same."""


@dataclass(frozen=True)
class Completion:
    """The record of one shard that is done."""

    shard: str
    fingerprint: str
    outputs: tuple[Output, ...]
    tally: Tally
    input: Input | None = None
    """None where no input was read to its end, and in ledgers from before inputs were recorded."""

    def to_json(self) -> dict[str, Any]:
        outputs = [{"path": o.path, "bytes": o.bytes, "sha256": o.sha256} for o in self.outputs]
        head = {"shard": self.shard, "fingerprint": self.fingerprint, "outputs": outputs}
        read = {} if self.input is None else {"input": asdict(self.input)}
        return {**head, **read, "tally": self.tally.to_json()}

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Completion:
        """Read what `to_json` wrote. RunError for anything else, such as a path that leads out of the folder."""
        try:
            outputs = tuple(
                Output(safe_paths.check_relative(o["path"]), int(o["bytes"]), str(o["sha256"])) for o in obj["outputs"]
            )
            tally, read = Tally.from_json(obj["tally"]), obj.get("input")
            source = (
                None if read is None else Input(int(read["bytes"]), str(read["sha256"]), str(read.get("version", "")))
            )
            return cls(safe_paths.check_file_name(obj["shard"]), str(obj["fingerprint"]), outputs, tally, source)
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

        A fork takes what it lacks from the run that it was forked from, if it can be trusted there.
        """
        done = self._trusted(shard, fingerprint)
        if done is None and self.forked_from is not None and not self._withdrawn(shard).is_file():
            done = self.forked_from._trusted(shard, fingerprint)
            return done and self._take_over(done, self.forked_from)
        return done

    def read(self, path: StoragePath) -> Completion | None:
        """Read one of `files`; None where it is torn, by a disk and not by a kill: then the shard is done again."""
        try:
            return _read(path)
        except (RunError, FileNotFoundError):
            return None

    def files(self) -> list[StoragePath]:
        """The paths of the completion files, sorted by shard. RunError where the folder is reached by a link."""
        return [self.path / f"{shard}.json" for shard in sorted(self._recorded())]

    def num_files(self) -> int:
        """How many completion files there are, by one listing."""
        return sum(1 for _ in self._recorded())

    def _recorded(self) -> Iterator[str]:
        return (name.removesuffix(".json") for name in self._names() if name.endswith(".json"))

    def _names(self) -> list[str]:
        return safe_paths.list_names(self.path) if isinstance(self.path, Path) else list(self.path.listing())

    def recorded_shards(self) -> set[str]:
        """The shards with a completion, trusted or not, here or in the run that this one was forked from.

        It takes one listing, however many shards there are.
        """
        here = set(self._recorded())
        if self.forked_from is None:
            return here
        withdrawn = {name.removesuffix(WITHDRAWN) for name in self._names() if name.endswith(WITHDRAWN)}
        return here | self.forked_from.recorded_shards() - withdrawn

    def invalidate(self, shard: str) -> None:
        """Remove the completion of a shard: a rerun does it again, even in a fork whose first run still has it."""
        write_guard.check_lock(self.path)
        if self.forked_from is not None:
            with atomic(self._withdrawn(shard)):
                pass
        remove_file(self._file(shard))

    def commit(
        self, shard: str, fingerprint: str, outputs: Sequence[StoragePath], tally: Tally, read: Input | None = None
    ) -> Completion:
        """Record that the shard is done; `outputs` exist already. Writing this one file is the commit.

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
        if self.forked_from is not None:
            remove_file(self._withdrawn(shard))
        return done

    def rewrite(self, done: Completion) -> None:
        """Write a completion again that stays valid: the same input now has another version."""
        write_json(self._file(done.shard), done.to_json())

    def completions(self) -> Iterator[Completion]:
        """Yield every completion, sorted by shard. RunError for a file that cannot be read."""
        yield from map_concurrent(_read, self.files(), isinstance(self.path, RemotePath))

    def readable_completions(self) -> Iterator[Completion]:
        """Yield the completions that can be read, sorted by shard; a torn file counts as missing."""
        for done in map_concurrent(self.read, self.files(), isinstance(self.path, RemotePath)):
            if done is not None:
                yield done

    def total(self) -> Tally:
        """Add up the tallies of all completions."""
        return sum((done.tally for done in self.completions()), Tally.zero())

    def find_damage(self, done: Completion, hashes: bool = False) -> str:
        """Describe how the outputs of a completion differ from its record; "" where they do not.

        Compares sizes, and with `hashes` every byte.
        """
        for output in done.outputs:
            path = self.folder / output.path
            try:
                info = path.stat() if isinstance(path, RemotePath) else os.lstat(path)
            except (FileNotFoundError, NotADirectoryError):
                return f"{path} is not there"
            if isinstance(info, os.stat_result) and not stat.S_ISREG(info.st_mode):
                return f"{path} is no regular file"
            if info.st_size != output.bytes:
                return f"{path} has {info.st_size} bytes, {output.bytes} were committed"
            if hashes and sha256_file(path) != output.sha256:
                return f"{path} does not have the bytes that were committed"
        return ""

    def _trusted(self, shard: str, fingerprint: str) -> Completion | None:
        done = self.read(self._file(shard))
        if done is None or done.fingerprint != fingerprint or done.shard != shard:
            return None
        return None if self.find_damage(done) else done

    @cached_property
    def forked_from(self) -> Ledger | None:
        """The same stage of the run that this one was forked from, as `fork.json` in the root of the run says."""
        root = forks.run_root(self.folder)
        source = None if root is None else forks.forked_from(root)
        if root is None or source is None:
            return None
        return Ledger(source / str(relative_to(self.folder, root)), self.stage)

    def _take_over(self, done: Completion, source: Ledger) -> Completion:
        for output in done.outputs:
            link_or_copy(source.folder / output.path, self.folder / output.path)
        write_json(self._file(done.shard), done.to_json())
        return done

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


def check_balance(annotated: Ledger, selected: Ledger, shards: Iterable[str]) -> None:
    """Raise RunError, naming the shard, unless a selection accounts for everything that was annotated."""
    wanted, annotations = set(shards), annotated.readable_completions()
    before = next(annotations, None)
    for done in selected.readable_completions():  # both come sorted by shard
        while before is not None and before.shard < done.shard:
            before = next(annotations, None)
        if before is None or before.shard != done.shard or done.shard not in wanted:
            continue
        if why := difference(before.tally, done.tally):
            raise RunError(f"shard {done.shard}: {why}. Nothing may get lost: run `capfilt verify --mend` on the run.")


def _read(path: StoragePath) -> Completion:
    try:
        return Completion.from_json(documents.parse(documents.read_bytes(path)))
    except (ValueError, RunError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete it and run the stage again.") from error
