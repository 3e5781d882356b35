"""The run folder: its plan, its log, and whether a command may use it.

plan.json is written before anything else and makes a folder a run: one that was killed before that is opened as new.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from capfilt.errors import FolderError, RunError
from capfilt.printable import MAX_MESSAGE, printable
from capfilt.redact import redact_tree
from capfilt.runs import forks
from capfilt.runs.forks import FORK
from capfilt.runs.ledger import FORMAT
from capfilt.runs.locking import lock
from capfilt.runs.locking.lock_file import LOCK_FOLDER, LOCK_NAME
from capfilt.storage import documents, safe_paths
from capfilt.storage.append_log import append_line
from capfilt.storage.atomic import PART, atomic, sweep, write_json
from capfilt.storage.paths import StoragePath, listing, make_folder, relative_to
from capfilt.storage.remote_path import RemotePath

DECIDED = "decided"
"""The key of plan.json for what the first command of a run chose (`Run.decide`)."""

MIN_FREE_BYTES = 100_000_000
_BEFORE_PLAN = ("recipe.yaml", FORK)  # files that may exist before the plan
_TOLD_BY = {"bootstrap": "pretrain", "pretrain": "train"}  # the key by which plans without `verb` are known
_SHOWN = 5  # changed keys that the error for another plan names


@dataclass(frozen=True)
class Run:
    """An opened run folder; `resumed`: whether it was a run before."""

    folder: StoragePath
    plan: dict[str, Any]
    resumed: bool

    @classmethod
    def open(
        cls, out: StoragePath, recipe_yaml: str, plan: Mapping[str, Any], min_free_bytes: int = MIN_FREE_BYTES
    ) -> Run:
        """Create the run folder, or resume the one with the same plan, and become its one driver.

        `plan` is JSON that decides what the run writes: recipe, inputs, fingerprints; no times. In plan.json it has the
        version of its contents (`FORMAT`), and URLs have no secrets (`redact`). `lock.release_all` releases the folder.

        Raises:
            FolderError: the folder is that of another verb, holds other files, or can be no folder.
            RunError: the folder has another plan (the error names what changed) or is of another version; less than
                `min_free_bytes` are free; or another driver works there.
        """
        wanted = json.loads(json.dumps(redact_tree({**plan, "format": FORMAT})))
        try:
            _check_space(out, min_free_bytes)
            out.mkdir(parents=True, exist_ok=True)
            _check(out, wanted)  # before the lock: nothing is written into a folder that is not a run
            _check_tree(out)
            lock.acquire_once(out)
            sweep(out)
            if not (resumed := _check(out, wanted)):
                write_json(out / "plan.json", wanted, private=True)
            plan_now = _read_plan(out)
            recipe = out / "recipe.yaml"
            # A kill may have come between the two files: compare.
            if not recipe.is_file() or documents.read_bytes(recipe) != recipe_yaml.encode():
                with atomic(recipe, private=True) as file:
                    file.write(recipe_yaml.encode())
            _end_torn_line(out / "log.jsonl")
        except (FileExistsError, NotADirectoryError) as error:
            raise FolderError(
                f"--out {out} is or lies in a file, and no folder ({error.strerror}); choose another --out."
            ) from None
        except OSError as error:
            raise RunError(f"the run folder {out} cannot be used: {error}; choose another --out.") from error
        return cls(out, plan_now, resumed)

    @classmethod
    def load(cls, folder: StoragePath) -> Run:
        """Open an existing run folder to read it; nothing in it is changed.

        Raises:
            FolderError: it has no plan.json.
            RunError: it holds a link out of it, a device or a pipe.
        """
        check_is_run(folder)
        _check_tree(folder)
        return cls(folder, _read_plan(folder), resumed=True)

    def decided(self, stage: str) -> dict[str, str] | None:
        """What was chosen when a stage began (`decide`); None where nothing was."""
        choices = self.plan.get(DECIDED, {})
        choice = choices.get(stage) if isinstance(choices, dict) else choices
        if choice is not None and not (isinstance(choice, dict) and all(isinstance(x, str) for x in choice.values())):
            raise RunError(f"the plan of {self.folder} does not say what {stage} computes with; use another --out.")
        return choice

    def decided_before_fork(self, stage: str) -> dict[str, str] | None:
        """`decided` of the run that this one was forked from."""
        source = forks.forked_from(self.folder)
        return None if source is None else Run.load(source).decided(stage)

    def decide(self, stage: str, choice: Mapping[str, str]) -> None:
        """Write into plan.json what a recipe left open and the first command of the run chose; later ones keep to it.

        `open` does not compare it: the code that chooses decides whether a choice may stay.
        """
        if self.decided(stage) != choice:
            self.plan[DECIDED] = {**self.plan.get(DECIDED, {}), stage: dict(choice)}
            write_json(self.folder / "plan.json", redact_tree(self.plan), private=True)

    def path(self, *parts: str) -> StoragePath:
        """Return a path in the run folder, whether it exists or not."""
        return self.folder.joinpath(*parts)

    def round(self, r: int) -> StoragePath:
        """Return the folder of round `r`, created."""
        folder = self.folder / f"round-{r}"
        make_folder(folder)
        return folder

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to log.jsonl: the time, the event and the fields.

        NaN and infinity, which JSON lacks, are written as text: "nan", "inf". Texts are made `printable`, with
        MAX_MESSAGE characters at most.
        """
        line = {"ts": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        data = json.dumps(_plain(line), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        append_line(self.folder / "log.jsonl", data)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json. Callers leave out a figure that was not measured, and never write 0 for it."""
        write_json(self.folder / "summary.json", redact_tree(dict(summary)))


def check_is_run(folder: StoragePath) -> None:
    """Refuse a folder that is no run folder. FolderError."""
    if (folder / "plan.json").is_file():
        return
    if not folder.exists():
        raise FolderError(f"there is no folder {folder}; a run folder is the --out of another command.")
    above = next((parent for parent in folder.parents if (parent / "plan.json").is_file()), None)
    give = "Give a folder that was an --out" if above is None else f"It lies in one: give {above}"
    raise FolderError(f"{folder} is no run folder: it holds no plan.json. {give}.")


def verb_of(folder: StoragePath) -> str:
    """The verb whose run folder it is, "bootstrap" or "annotate"; "" for what is no run folder."""
    return _verb_of(_read_plan(folder)) if (folder / "plan.json").is_file() else ""


def _verb_of(plan: Mapping[str, Any]) -> str:
    named = plan.get("verb")
    if isinstance(named, str):
        return named
    return next((verb for verb, key in _TOLD_BY.items() if key in plan), "")


def fork(old: StoragePath, new: StoragePath) -> StoragePath:
    """Make `new` the folder of a run that reuses from run `old` whatever work is the same and undamaged there.

    Nothing in `old` is changed, and work is only linked or copied when a stage asks for it. Returns `new`.
    """
    opened = Run.load(old)
    check_format(old, opened.plan)
    source = opened.folder.resolve()
    target = new.resolve()
    if _nested(target, source) or _nested(source, target):
        raise RunError(f"{new} lies in {old} or is it; a fork is a run of its own: choose another folder for --fork.")
    if not (new / FORK).is_file() and not (new / "plan.json").is_file():
        new.mkdir(parents=True, exist_ok=True)
        _check_empty(new)
        lock.acquire_once(new)
        write_json(new / FORK, {"from": str(source)})
    existing = forks.forked_from(new)
    if existing is None or str(existing) != str(source):
        raise RunError(
            f"{new} is a run already, forked from {existing or 'no other run'}; choose another folder for --fork."
        )
    return new


def _nested(inner: StoragePath, outer: StoragePath) -> bool:
    try:
        relative_to(inner, outer)
    except ValueError:
        return False
    return True


def _check_space(out: StoragePath, min_free_bytes: int) -> None:
    if isinstance(out, RemotePath):  # a store does not report it
        return
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < min_free_bytes:
        raise RunError(
            f"{free / 1e6:.0f} MB are free for {out}, a run needs at least {min_free_bytes / 1e6:.0f} MB;"
            " free some space or choose another --out."
        )


def _check(out: StoragePath, wanted: dict[str, Any]) -> bool:
    """Whether the folder is a run with this plan; RunError for one with another, and for something else."""
    if not (out / "plan.json").is_file():
        _check_empty(out)
        return False
    _check_plan(out, wanted)
    return True


def _check_empty(out: StoragePath) -> None:
    allowed = (*_BEFORE_PLAN, LOCK_FOLDER) if isinstance(out, RemotePath) else _BEFORE_PLAN
    names = listing(out)
    others = sorted(n for n in names if n not in allowed and not n.startswith(PART) and not LOCK_NAME.fullmatch(n))
    if others:
        what = f"{others[0]!r} and more" if others[1:] else repr(others[0])
        raise FolderError(
            f"{out} holds {what} but no plan.json, so it is no run folder; choose another --out, or empty it."
        )


def check_format(folder: StoragePath, plan: Mapping[str, Any]) -> None:
    """Refuse to resume or fork a run folder that was planned by a capfilt of another format.

    A plan without a format is of format 1. Reading such folders (status, verify, explain, report, select from their
    annotations) still works.
    """
    number = plan.get("format", 1)
    if number != FORMAT:
        which = "an earlier" if isinstance(number, int) and number < FORMAT else "a later"
        raise RunError(
            f"{folder} is the run of {which} capfilt (format {number}, this one has {FORMAT}), whose records cannot be"
            " compared with today's: finish it with the version that began it, or begin anew in another --out."
        )


def _check_plan(out: StoragePath, wanted: dict[str, Any]) -> None:
    old = _read_plan(out)
    was, now = _verb_of(old), _verb_of(wanted)
    if was and now and was != now:
        raise FolderError(
            f"{out} is the run folder of a `capfilt {was}`, and this is `capfilt {now}`; choose another --out."
        )
    check_format(out, old)
    compared = {key: value for key, value in old.items() if key != DECIDED}
    changes = list(islice(_changes(compared, wanted), 1000))
    if changes:
        more = f" (and {len(changes) - _SHOWN} more)" if len(changes) > _SHOWN else ""
        raise RunError(
            f"{out} was planned otherwise: {'; '.join(changes[:_SHOWN])}{more}."
            " Use another --out, or go back to what was planned; --fork NEW_OUT begins a new run that takes over"
            " from this one whatever still holds."
        )


def _read_plan(folder: StoragePath) -> dict[str, Any]:
    path = folder / "plan.json"
    plan = documents.read_json(path, documents.PLAN_BYTES)
    if not isinstance(plan, dict):
        raise RunError(f"{path} is no plan but a {type(plan).__name__}; use another --out.")
    return plan


def _check_tree(folder: StoragePath) -> None:
    """Refuse links that lead out of the folder, devices and pipes: on a store there are none."""
    if isinstance(folder, Path):
        safe_paths.check_tree(folder)


def _changes(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """Yield "a.b: old -> new" for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            inner = f"{key}.{name}" if key else name
            if name in old and name in new:
                yield from _changes(old[name], new[name], inner)
            else:
                yield f"{inner}: {_short(old[name]) if name in old else 'absent'} -> " + (
                    _short(new[name]) if name in new else "absent"
                )
    elif isinstance(old, list) and isinstance(new, list) and len(old) != len(new):
        yield f"{key}: {len(old)} items -> {len(new)} items"
    elif isinstance(old, list) and isinstance(new, list):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _changes(*pair, f"{key}[{index}]")
    elif type(old) is not type(new) or old != new:
        yield f"{key}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _end_torn_line(log: StoragePath) -> None:
    """End a line that a kill cut short, which would make the next one unreadable too."""
    if isinstance(log, RemotePath) or not log.is_file():
        return
    file = safe_paths.open_log(log)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
    finally:
        os.close(file)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {printable(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | float | None) else printable(value, MAX_MESSAGE)
