"""The run folder: what was planned, what is in it already, what was logged.

plan.json is written before anything else and is what makes a folder a run: one that was killed before that
holds nothing and is opened as new.
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

from capfilt.errors import RunError
from capfilt.printable import MAX_MESSAGE, printable
from capfilt.redact import redact_tree
from capfilt.runs import forks, lock
from capfilt.runs.forks import FORK
from capfilt.runs.ledger import FORMAT
from capfilt.storage import documents, safe_paths
from capfilt.storage.append_log import append_line
from capfilt.storage.atomic import PART, atomic, sweep, write_json
from capfilt.storage.paths import StoragePath, listing, make_folder, relative_to
from capfilt.storage.remote_path import RemotePath

DECIDED = "decided"
"""The key of plan.json under which stands what a run's first command chose (`Run.decide`)."""

MIN_FREE_BYTES = 100_000_000
_EARLY = ("recipe.yaml", FORK)  # what may lie there before the plan does
_SHOWN = 5  # changed keys named in the refusal of another plan


@dataclass(frozen=True)
class Run:
    """An opened run folder; `resumed` tells whether it was one before."""

    folder: StoragePath
    plan: dict[str, Any]
    resumed: bool

    @classmethod
    def open(
        cls, out: StoragePath, recipe_yaml: str, plan: Mapping[str, Any], min_free_bytes: int = MIN_FREE_BYTES
    ) -> Run:
        """Create the run folder, or take up the one that has the same plan; this process is its one driver then.

        `plan` is what JSON can hold and decides what the run writes: recipe, inputs, fingerprints; no times.
        plan.json also says of which version it is (`FORMAT`). Secrets of addresses stay out of it (`redact`).
        Raises RunError for another plan (naming what changed), for a folder of another version, for one that holds
        something else, where less than `min_free_bytes` are free, and where another driver works.
        `lock.release_all` lets go of it.
        """
        wanted = json.loads(json.dumps(redact_tree({**plan, "format": FORMAT})))
        try:
            _check_space(out, min_free_bytes)
            out.mkdir(parents=True, exist_ok=True)
            _check(out, wanted)  # before the lock: a folder that is not ours stays as it is
            _check_tree(out)
            lock.hold(out)
            sweep(out)
            if not (resumed := _check(out, wanted)):
                write_json(out / "plan.json", wanted, private=True)
            plan_now = _read_plan(out)
            recipe = out / "recipe.yaml"
            # Compared, not assumed: a kill may have fallen between the two files.
            if not recipe.is_file() or documents.read_bytes(recipe) != recipe_yaml.encode():
                with atomic(recipe, private=True) as file:
                    file.write(recipe_yaml.encode())
            _mend_log(out / "log.jsonl")
        except OSError as error:
            raise RunError(f"the run folder {out} cannot be used: {error}; choose another --out.") from error
        return cls(out, plan_now, resumed)

    @classmethod
    def load(cls, folder: StoragePath) -> Run:
        """Take up an existing run folder to look at it; nothing in it is touched.

        RunError for one that holds a link out of it, a device or a pipe: its files lie where somebody else put them.
        """
        if not (folder / "plan.json").is_file():
            raise RunError(f"{folder} is no run folder: it holds no plan.json. Give a folder that was an --out.")
        _check_tree(folder)
        return cls(folder, _read_plan(folder), resumed=True)

    def decided(self, stage: str) -> dict[str, str] | None:
        """What was chosen when a stage began (`decide`); None where nothing was."""
        every = self.plan.get(DECIDED, {})
        found = every.get(stage) if isinstance(every, dict) else every
        if found is not None and not (isinstance(found, dict) and all(isinstance(x, str) for x in found.values())):
            raise RunError(f"the plan of {self.folder} does not say what {stage} computes with; use another --out.")
        return found

    def decided_at_origin(self, stage: str) -> dict[str, str] | None:
        """The same of the run that this one was forked from."""
        origin = forks.origin(self.folder)
        return None if origin is None else Run.load(origin).decided(stage)

    def decide(self, stage: str, choice: Mapping[str, str]) -> None:
        """Write into plan.json what a recipe left open and this run's first command chose, and keep to it from then on.

        No part of what `open` compares: whether a choice may stand is for whoever chooses to say.
        """
        if self.decided(stage) != choice:
            self.plan[DECIDED] = {**self.plan.get(DECIDED, {}), stage: dict(choice)}
            write_json(self.folder / "plan.json", redact_tree(self.plan), private=True)

    def path(self, *parts: str) -> StoragePath:
        """Return the path of something in the run folder, there or not."""
        return self.folder.joinpath(*parts)

    def round(self, r: int) -> StoragePath:
        """Return the folder of round `r`, created."""
        folder = self.folder / f"round-{r}"
        make_folder(folder)
        return folder

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to log.jsonl: when, what, and the fields.

        A fallen loss is worth a line, so NaN and infinity are written, as text: "nan", "inf". Texts are `printable`, of
        MAX_MESSAGE characters at most.
        """
        line = {"ts": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        data = json.dumps(_plain(line), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        append_line(self.folder / "log.jsonl", data)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json; a figure that was not measured is left out by the caller, never 0."""
        write_json(self.folder / "summary.json", redact_tree(dict(summary)))


def fork(old: StoragePath, new: StoragePath) -> StoragePath:
    """Make `new` the folder of a run that takes over from run `old` every piece of work that it asks for and that
    holds there; returns `new`. Nothing in `old` is touched, nothing is taken before it is asked for.
    """
    opened = Run.load(old)
    check_format(old, opened.plan)
    source = opened.folder.resolve()
    where = new.resolve()
    if _nested(where, source) or _nested(source, where):
        raise RunError(f"{new} lies in {old} or is it; a fork is a run of its own: choose another folder for --fork.")
    if not (new / FORK).is_file() and not (new / "plan.json").is_file():
        new.mkdir(parents=True, exist_ok=True)
        _check_empty(new)
        lock.hold(new)
        write_json(new / FORK, {"from": str(source)})
    found = forks.origin(new)
    if found is None or str(found) != str(source):
        raise RunError(
            f"{new} is a run already, forked from {found or 'no other run'}; choose another folder for --fork."
        )
    return new


def _nested(inner: StoragePath, outer: StoragePath) -> bool:
    try:
        relative_to(inner, outer)
    except ValueError:
        return False
    return True


def _check_space(out: StoragePath, min_free_bytes: int) -> None:
    if isinstance(out, RemotePath):  # a store does not say
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
    own = (*_EARLY, lock.FOLDER) if isinstance(out, RemotePath) else _EARLY
    names = listing(out)
    held = sorted(n for n in names if n not in own and not n.startswith(PART) and not lock.PATTERN.fullmatch(n))
    if held:
        what = f"{held[0]!r} and more" if held[1:] else repr(held[0])
        raise RunError(
            f"{out} holds {what} but no plan.json, so it is no run folder; choose another --out, or empty it."
        )


def check_format(folder: StoragePath, plan: Mapping[str, Any]) -> None:
    """Refuse to go on in a run folder, or from one, that was planned by a capfilt of another format.

    Folders from before formats were counted are of the first. Looking at them (status, verify, explain, report, select
    from their annotations) goes on working.
    """
    found = plan.get("format", 1)
    if found != FORMAT:
        which = "an earlier" if isinstance(found, int) and found < FORMAT else "a later"
        raise RunError(
            f"{folder} is the run of {which} capfilt (format {found}, this one has {FORMAT}), whose records cannot be"
            " compared with today's: finish it with the version that began it, or begin anew in another --out."
        )


def _check_plan(out: StoragePath, wanted: dict[str, Any]) -> None:
    old = _read_plan(out)
    check_format(out, old)
    asked = {key: value for key, value in old.items() if key != DECIDED}
    changes = list(islice(_changes(asked, wanted), 1000))
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


def _mend_log(log: StoragePath) -> None:
    """End a line that a kill cut short, or the next one would be lost with it."""
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
