"""The stages of a run folder, read from its files alone: what each was to do, what is done, what failed.

Beside a stage's completions lie `ledger/STAGE.plan.jsonl` (a head, then a line for each shard) and, where shards failed
as a whole, `ledger/STAGE.failed.jsonl`; `ledger/STAGE.pace.json` says how much the newest command has done in how many
seconds of its own stopwatch, and a copy of the folder says the same. Nothing here knows which stages there are: it
finds them.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from capfilt.errors import RunError
from capfilt.printable import MAX_MESSAGE, printable
from capfilt.runs.ledger import Completion, Ledger
from capfilt.runs.tally import Tally, bounded
from capfilt.storage import documents, safe_paths
from capfilt.storage.append_log import append_line
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.documents import PLAN_BYTES
from capfilt.storage.paths import StoragePath, listing, make_folder, map_concurrent, remove_file
from capfilt.storage.remote_path import RemotePath

ORDER = (
    *("world", "download", "captioner", "filter", "calibrate", "annotate", "select"),
    *("pretrain", "language", "stage-1", "stage-2", "evaluate"),
)
"""How the stages of one round follow each other; others come after, by name."""
PLAN, FAILED, PACE = ".plan.jsonl", ".failed.jsonl", ".pace.json"

PACE_SECONDS = 2.0
"""How old what `STAGE.pace.json` says may be while its driver works."""

_DEPTH = ("ledger", "*/ledger", "*/*/ledger")  # where ledgers lie in a run folder


@dataclass(frozen=True)
class Plan:
    """What the newest command wanted of a stage. `found` was done before it began."""

    label: str
    total: int
    found: int = 0
    unit: str = "shards"
    log: str = ""
    """For a stage that is one long piece of work: the file, from the ledger's folder, whose last line says `step`."""


def begin(ledger: Ledger, plan: Plan, identities: Mapping[str, str] | None = None) -> None:
    """Write down what a stage is to do, before it does it; what failed before is not held against it any more."""
    path = ledger.path.with_name(f"{ledger.stage}{PLAN}")
    with atomic(path) as file:
        file.write(json.dumps(asdict(plan), ensure_ascii=False).encode() + b"\n")
        for shard, identity in (identities or {}).items():
            file.write(json.dumps([shard, identity], ensure_ascii=False).encode() + b"\n")
    for ending in (FAILED, PACE):
        remove_file(ledger.path.with_name(f"{ledger.stage}{ending}"))


class Pace:
    """Counts what a command has done of a stage since now, and keeps the count and the seconds where `standing` looks:
    at once, then every `PACE_SECONDS`, and at the end."""

    def __init__(self, ledger: Ledger):
        self._path = ledger.path.with_name(f"{ledger.stage}{PACE}")
        self._began = time.monotonic()
        self._done, self._kept, self._due = 0, 0, self._began

    def add(self) -> None:
        """One more is done."""
        self._done += 1
        if time.monotonic() >= self._due:
            self.keep()

    def keep(self) -> None:
        """Write it down."""
        now = time.monotonic()
        if self._done > self._kept:
            write_json(self._path, {"done": self._done, "seconds": round(now - self._began, 3)})
        self._kept, self._due = self._done, now + PACE_SECONDS


def planned(ledger: Ledger) -> tuple[Plan | None, dict[str, str]]:
    """What a stage was to do, and the fingerprint of each shard; None where it never was begun."""
    path = ledger.path.with_name(f"{ledger.stage}{PLAN}")
    try:
        first, *lines = documents.read_bytes(path, PLAN_BYTES).split(b"\n")
        identities = [documents.parse(line) for line in lines if line]
        if not all(isinstance(shard, str) and isinstance(identity, str) for shard, identity in identities):
            raise TypeError("a line must be a shard and its fingerprint")
        return _plan(documents.parse(first)), dict(identities)
    except FileNotFoundError:
        return None, {}
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}); run the same command again, it is written anew.") from error


def _plan(tree: Any) -> Plan:
    """The head of a plan. ValueError or TypeError for what is none."""
    plan = Plan(**tree)
    if not all(type(getattr(plan, name)) is type_ for name, type_ in _TYPES.items()) or plan.total < 0:
        raise TypeError("it holds values of other types than a plan")
    if plan.log:
        safe_paths.check_relative(plan.log)
    return plan


_TYPES = {"label": str, "total": int, "found": int, "unit": str, "log": str}


def failed(ledger: Ledger, shard: str, error: str) -> None:
    """Write down that a shard failed as a whole, and of what."""
    make_folder(ledger.path.parent)
    line = json.dumps({"shard": shard, "error": printable(error, MAX_MESSAGE)}, ensure_ascii=False).encode() + b"\n"
    append_line(ledger.path.with_name(f"{ledger.stage}{FAILED}"), line)


def failures(ledger: Ledger) -> dict[str, str]:
    """The shards that failed as a whole when the stage last ran, and why."""
    lines = documents.read_json_lines(ledger.path.with_name(f"{ledger.stage}{FAILED}"))  # a kill may have cut the last
    return {str(line.get("shard")): str(line.get("error")) for line in lines}


def find(folder: StoragePath) -> list[Ledger]:
    """The ledgers of every stage in a run folder, in the order in which the stages follow each other."""
    found: dict[tuple[StoragePath, str], Ledger] = {}
    for pattern in _DEPTH:
        for home in folder.glob(pattern):
            entries = listing(home)
            stages = {name.removesuffix(PLAN) for name in entries if name.endswith(PLAN)}
            for stage in stages | {name for name, stat in entries.items() if stat is None}:
                found[home.parent, stage] = Ledger(home.parent, stage)
    return sorted(found.values(), key=_place)


def _place(ledger: Ledger) -> tuple[Any, ...]:
    parts = [[int(p) if p.isdigit() else -1 for p in re.split(r"(\d+)", part)] for part in ledger.folder.parts]
    rank = ORDER.index(ledger.stage) if ledger.stage in ORDER else len(ORDER)
    return len(parts), parts, str(ledger.folder), rank, ledger.stage


@dataclass
class Standing:
    """How far a stage is."""

    ledger: Ledger
    plan: Plan
    done: int = 0
    tally: Tally = field(default_factory=Tally.zero)
    errors: Counter[str] = field(default_factory=Counter)
    """Shards that failed as a whole, by reason."""
    rate: float | None = None
    """Units a second since the newest command began, as it recorded them itself; None where it recorded none."""

    @property
    def left(self) -> float | None:
        """Seconds until it is done, at this rate."""
        return (self.plan.total - self.done) / self.rate if self.rate else None


def standing(ledger: Ledger) -> Standing:
    """Count what a stage has done; a completion of an earlier plan is none of it."""
    plan, identities = planned(ledger)
    count = 0
    stand = Standing(ledger, plan or Plan(ledger.stage, 0))
    stats = listing(ledger.path)
    for done in readable(ledger):
        if stats.get(f"{done.shard}.json") is None or (identities and identities.get(done.shard) != done.fingerprint):
            continue
        count += 1
        stand.tally += done.tally
    stand.done = count
    if plan is None:
        stand.plan = Plan(ledger.stage, count, count)
    elif plan.log:
        steps, stand.rate = _steps(ledger.folder / plan.log)
        stand.done = plan.total if count else steps
    else:
        stand.rate = _rate(ledger)
    stand.errors = bounded(Counter(reason(error) for error in failures(ledger).values()))
    return stand


def reason(error: str) -> str:
    """What an error of a shard has in common with others: itself without names and numbers, kept short."""
    return re.sub(r"\S*[/\d]\S*", "…", printable(error, MAX_MESSAGE))[:120]


def readable(ledger: Ledger) -> Iterator[Completion]:
    """The completions that can be read, in the order of shard names; a torn one counts as not there."""
    for done in map_concurrent(ledger.read, ledger.files(), isinstance(ledger.path, RemotePath)):
        if done is not None:
            yield done


def _rate(ledger: Ledger) -> float | None:
    try:
        pace = documents.parse(documents.read_bytes(ledger.path.with_name(f"{ledger.stage}{PACE}")))
        return float(pace["done"] / pace["seconds"])
    except (FileNotFoundError, ValueError, LookupError, TypeError, ArithmeticError):  # not written yet, or not by us
        return None


def _steps(log: StoragePath) -> tuple[int, float | None]:
    """The newest step of a training, and its steps a second over the last lines of its log."""
    told = list(documents.read_json_lines(log, 65536))
    try:
        seconds = [float(line["step_seconds"]) for line in told if line.get("step_seconds")]
        return (int(told[-1]["step"]) if told else 0), (len(seconds) / sum(seconds) if seconds else None)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise RunError(f"{log} cannot be read ({error!r}): its lines must say `step` and `step_seconds`.") from error
