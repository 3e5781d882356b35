"""The ledger: one completion file a shard, which is the commit, and the atomic writes it rests on.

A rerun trusts a completion only where its fingerprint is the wanted one and its outputs lie there with the
recorded sizes; everything else is done again, which costs time and never truth.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from capfilt.errors import RunError
from capfilt.redact import redact_tree
from capfilt.reports import documents, fence, forks, safe_paths
from capfilt.reports.documents import unlink
from capfilt.reports.places import Place, Remote, together, within
from capfilt.reports.tally import Tally

PART = ".capfilt-part-"
"""How the name of every temporary file begins; a folder with only such files counts as empty."""

WITHDRAWN = ".withdrawn"
"""Ends the name of the mark that a shard of a fork is to be done again though the run it came from has it."""

FORMAT = 2
"""The version of what plans and fingerprints hold. It goes up when either changes its contents: a run folder of another
version is refused (`run.check_format`) instead of being done again piece by piece, unnoticed."""

_PART = re.compile(rf"{re.escape(PART)}(?P<host>.+)-(?P<pid>[1-9]\d{{0,9}})-\w+")
_ABANDONED = 24 * 3600  # seconds after which another host's temporary file is taken for a dead one's


@contextmanager
def atomic(path: Place, private: bool = False) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` whole or not at all, whatever kills the process; two fsyncs.

    The bytes go to a sibling with a name of its own, so two workers on one shard cannot mix theirs. Leave the
    file open: it is then flushed, synced, renamed and its folder synced, or removed if the block raises. On a store
    it becomes an object (`Remote.replaced`). `private`: nobody but its owner may read it. In a run folder that another
    driver took over nothing is replaced: LockLostError.
    """
    if isinstance(path, Remote):
        with path.replaced() as file:
            yield file
            fence.confirm(path)
        return
    with safe_paths.opened_folder(path.parent, make=True) as folder:
        part = _part()
        try:
            with safe_paths.open_part(folder, path.parent / part, safe_paths.PRIVATE if private else 0o666) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            fence.confirm(path)
            os.replace(part, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(part, dir_fd=folder)
            raise
        os.fsync(folder)


def _part() -> str:
    """The name of a temporary file: of whom it is and, for one writer, of its own."""
    return f"{PART}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def share(source: Place, target: Place) -> None:
    """Make `target` the same file as `source` by a link, or where links do not reach a copy with its times.

    No file of a run is ever written in place, so the two cannot change each other. A file of another user is copied:
    its owner could write into it later. What goes to a store or comes from one is copied, in one store by the store.
    """
    fence.confirm(target)
    if isinstance(source, Remote) and isinstance(target, Remote):
        target.copy_from(source)
        return
    if isinstance(source, Remote) or isinstance(target, Remote):
        with source.open("rb") as read, atomic(target) as file:
            shutil.copyfileobj(read, file)
        return
    with safe_paths.open_file(source) as read:
        known = os.fstat(read.fileno())
        if known.st_uid == os.geteuid() and _linked(source, target, known):
            return
        with atomic(target) as file:
            shutil.copyfileobj(read, file)
            file.flush()
            os.utime(file.fileno(), ns=(known.st_atime_ns, known.st_mtime_ns))


def _linked(source: Path, target: Path, known: os.stat_result) -> bool:
    """Whether `target` could be made another name of the file `source`, which is the one that is `known`."""
    with (
        safe_paths.opened_folder(source.parent) as there,
        safe_paths.opened_folder(target.parent, make=True) as folder,
    ):
        part = _part()
        try:
            os.link(source.name, part, src_dir_fd=there, dst_dir_fd=folder, follow_symlinks=False)
        except OSError:
            return False
        try:
            same = os.path.samestat(os.lstat(part, dir_fd=folder), known)
            if same:
                os.replace(part, target.name, src_dir_fd=folder, dst_dir_fd=folder)
            return same
        finally:
            with suppress(FileNotFoundError):  # a link that replaces itself leaves both names
                os.unlink(part, dir_fd=folder)


@contextmanager
def filled(folder: Place) -> Iterator[Path]:
    """A folder of this machine for what writes into paths only: `folder` itself, or for one on a store an empty one,
    whose files are sent there when the block ends, and never where it raises.
    """
    if isinstance(folder, Path):
        safe_paths.make_folder(folder)
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)
        for path in sorted(Path(scratch).iterdir()):
            share(path, folder / path.name)


def sweep(folder: Place, over: bool = False) -> int:
    """Remove what killed writers left under `folder` and return how many files that were.

    A file of this host goes when its process is gone, one of another host when it is a day old; at once where the
    work is `over`: then a writer that is cut off may live there still, but nobody waits for what it writes. Through a
    link nothing is looked for, and a name that no writer of ours gives stays.
    """
    if isinstance(folder, Remote):
        return folder.sweep()
    here, num_removed = socket.gethostname(), 0
    with safe_paths.opened_folder(folder) as top:
        for _, _, names, handle in os.fwalk(".", dir_fd=top):
            for found in filter(None, map(_PART.fullmatch, (name for name in names if name.startswith(PART)))):
                if not _alive(int(found["pid"])) if found["host"] == here else over or _old(found[0], handle):
                    with suppress(FileNotFoundError):
                        os.unlink(found[0], dir_fd=handle)
                    num_removed += 1
    return num_removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 asks and does nothing
    except (ProcessLookupError, OverflowError):  # no machine has numbers as large as the second
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def _old(part: str, folder: int) -> bool:
    try:
        return time.time() - os.lstat(part, dir_fd=folder).st_mtime > _ABANDONED
    except FileNotFoundError:  # its writer has just renamed it
        return False


def write_json(path: Place, obj: Any, private: bool = False) -> None:
    """Write `obj` atomically, keys sorted, indent 1; RunError for NaN and infinity, which JSON lacks."""
    try:
        text = json.dumps(obj, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise RunError(f"{path} would hold a figure that is no number ({error}); leave such figures out.") from error
    with atomic(path, private) as file:
        file.write(text.encode() + b"\n")


def sha256_file(path: Place) -> str:
    """Return the sha256 of a file's bytes, read in pieces. RunError for a device, which would never end."""
    with safe_paths.open_file(path, follow=True) if isinstance(path, Path) else path.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
                Output(safe_paths.relative(o["path"]), int(o["bytes"]), str(o["sha256"])) for o in obj["outputs"]
            )
            tally, read = Tally.from_json(obj["tally"]), obj.get("input")
            found = (
                None if read is None else Input(int(read["bytes"]), str(read["sha256"]), str(read.get("version", "")))
            )
            return cls(safe_paths.plain_name(obj["shard"]), str(obj["fingerprint"]), outputs, tally, found)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RunError(f"this is no completion ({error!r}); delete it and run the stage again.") from error


class Ledger:
    """The completions of one stage: `folder/ledger/STAGE/SHARD.json`, one a shard."""

    def __init__(self, folder: Place, stage: str) -> None:
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

    def read(self, path: Place) -> Completion | None:
        """Read one of `files`; None where it is torn (by a disk, not by a kill): doing the shard again mends it."""
        try:
            return _read(path)
        except (RunError, FileNotFoundError):
            return None

    def files(self) -> list[Place]:
        """The completion files, in the order of shard names. RunError where the folder is reached by a link."""
        return [self.path / name for name in sorted(self._names()) if name.endswith(".json")]

    def _names(self) -> list[str]:
        return safe_paths.entries(self.path) if isinstance(self.path, Path) else list(self.path.listing())

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
        fence.confirm(self.path)
        if self.origin is not None:
            with atomic(self._withdrawn(shard)):
                pass
        unlink(self._file(shard))

    def commit(
        self, shard: str, fingerprint: str, outputs: Sequence[Place], tally: Tally, read: Input | None = None
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
            unlink(self._withdrawn(shard))
        return done

    def renew(self, done: Completion) -> None:
        """Write a completion anew whose work stands: the same input was found under another version."""
        write_json(self._file(done.shard), done.to_json())

    def completions(self) -> Iterator[Completion]:
        """Yield every completion in the order of shard names; RunError for a file that cannot be read."""
        yield from together(_read, self.files(), isinstance(self.path, Remote))

    def total(self) -> Tally:
        """Add up the tallies of all completions."""
        return sum((done.tally for done in self.completions()), Tally.zero())

    def doubt(self, done: Completion, hashes: bool = False) -> str:
        """Say why the outputs of a completion do not hold, or "". `hashes` reads every byte of them."""
        for output in done.outputs:
            path = self.folder / output.path
            try:
                found = path.stat() if isinstance(path, Remote) else os.lstat(path)
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
        return Ledger(forked / str(within(self.folder, root)), self.stage)

    def _adopt(self, found: Completion, origin: Ledger) -> Completion:
        for output in found.outputs:
            share(origin.folder / output.path, self.folder / output.path)
        write_json(self._file(found.shard), found.to_json())
        return found

    def _output(self, shard: str, path: Place) -> Output:
        try:
            relative = within(path.resolve(), self.folder.resolve())
            return Output(relative.as_posix(), path.stat().st_size, sha256_file(path))
        except FileNotFoundError:
            raise RunError(f"{self.stage}, shard {shard}: {path} was to be committed and is not there.") from None
        except ValueError:
            raise RunError(f"{self.stage}, shard {shard}: {path} lies outside {self.folder}.") from None

    def _withdrawn(self, shard: str) -> Place:
        return self.path / f"{shard}{WITHDRAWN}"

    def _file(self, shard: str) -> Place:
        if not shard or shard.startswith(".") or "/" in shard or "\0" in shard:
            raise RunError(f"a shard cannot be called {shard!r}: its name becomes a file name. Rename the shard.")
        return self.path / f"{shard}.json"


def _read(path: Place) -> Completion:
    try:
        return Completion.from_json(documents.parse(documents.read_bytes(path)))
    except (ValueError, RunError) as error:
        raise RunError(f"{path} cannot be read ({error}); delete it and run the stage again.") from error
