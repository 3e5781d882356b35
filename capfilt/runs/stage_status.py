"""The stages of a run folder, read from its files alone: what each was to do, what is done, what failed.

Beside a stage's completions lie `ledger/STAGE.plan.jsonl` (a header, then a line for each shard) and, where shards
failed as a whole, `ledger/STAGE.failed.jsonl`. `ledger/STAGE.pace.json` holds how much the newest command has done and
in how many seconds; times of files are not used, so that a copy of the folder gives the same rate. `usage.py` says what
`ledger/STAGE.usage.jsonl` has.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from capfilt.errors import RunError
from capfilt.printable import MAX_MESSAGE, printable
from capfilt.runs.ledger import Ledger
from capfilt.runs.tally import Tally, bounded
from capfilt.runs.usage import Usage, read_usage
from capfilt.storage import documents, safe_paths
from capfilt.storage.append_log import append_line
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.documents import PLAN_BYTES
from capfilt.storage.paths import StoragePath, listing, make_folder, remove_file

ORDER = (
    *("world", "download", "convert", "pack", "embed", "held-out", "decontaminate", "decontaminate-exact"),
    *("captioner-pretrain", "captioner", "filter-pretrain", "filter"),
    *("calibrate", "annotate", "score", "select"),
    *("pretrain", "language", "stage-1", "stage-2", "evaluate"),
)
"""The order of the stages of one round, "score" for each `score-NAME`; others come after these, by name."""
PLAN, FAILED, PACE = ".plan.jsonl", ".failed.jsonl", ".pace.json"

PACE_SECONDS = 2.0
"""Seconds between two writes of `STAGE.pace.json` while the driver works."""

_LEDGERS = ("ledger", "*/ledger", "*/*/ledger")  # where ledgers lie in a run folder


@dataclass(frozen=True)
class StagePlan:
    """What the newest command is to do of a stage."""

    label: str
    total: int
    done_before: int = 0
    """How much was done before the command began; "found" in the file."""
    unit: str = "shards"
    log: str = ""
    """For a stage that is one training: its log, relative to the folder of the ledger, whose last line has `step`."""

    def to_json(self) -> dict[str, Any]:
        """The header of `STAGE.plan.jsonl`."""
        return {key: getattr(self, name) for key, (name, _) in _PLAN_KEYS.items()}

    @classmethod
    def from_json(cls, tree: Any) -> StagePlan:
        """Read what `to_json` wrote. ValueError or TypeError for anything else."""
        if not isinstance(tree, dict) or tree.keys() - _PLAN_KEYS.keys():
            raise TypeError("it holds other keys than a plan")
        plan = cls(**{_PLAN_KEYS[key][0]: value for key, value in tree.items()})
        if not all(type(getattr(plan, name)) is type_ for name, type_ in _PLAN_KEYS.values()) or plan.total < 0:
            raise TypeError("it holds values of other types than a plan")
        if plan.log:
            safe_paths.check_relative(plan.log)
        return plan


_PLAN_KEYS = {
    "label": ("label", str),
    "total": ("total", int),
    "found": ("done_before", int),
    "unit": ("unit", str),
    "log": ("log", str),
}


def write_plan(ledger: Ledger, plan: StagePlan, identities: Mapping[str, str] | None = None) -> None:
    """Write what a stage is to do, and each shard's fingerprint, before it begins; removes the failures of before."""
    path = ledger.path.with_name(f"{ledger.stage}{PLAN}")
    with atomic(path) as file:
        file.write(json.dumps(plan.to_json(), ensure_ascii=False).encode() + b"\n")
        for shard, identity in (identities or {}).items():
            file.write(json.dumps([shard, identity], ensure_ascii=False).encode() + b"\n")
    for ending in (FAILED, PACE):
        remove_file(ledger.path.with_name(f"{ledger.stage}{ending}"))


class PaceFile:
    """Counts what a command has done of a stage, and writes the count and the seconds for `read_status`: after
    the first item, then every `PACE_SECONDS`, and at the end."""

    def __init__(self, ledger: Ledger):
        self._path = ledger.path.with_name(f"{ledger.stage}{PACE}")
        self._started = time.monotonic()
        self._done, self._written, self._due = 0, 0, self._started

    def add(self) -> None:
        """Count one more item as done."""
        self._done += 1
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        """Write the file, if it has changed."""
        now = time.monotonic()
        if self._done > self._written:
            write_json(self._path, {"done": self._done, "seconds": round(now - self._started, 3)})
        self._written, self._due = self._done, now + PACE_SECONDS


def read_plan(ledger: Ledger) -> tuple[StagePlan | None, dict[str, str]]:
    """What a stage was to do, and the fingerprint of each shard; None where it never began."""
    path = ledger.path.with_name(f"{ledger.stage}{PLAN}")
    try:
        first, *lines = documents.read_bytes(path, PLAN_BYTES).split(b"\n")
        identities = [documents.parse(line) for line in lines if line]
        if not all(isinstance(shard, str) and isinstance(identity, str) for shard, identity in identities):
            raise TypeError("a line must be a shard and its fingerprint")
        return StagePlan.from_json(documents.parse(first)), dict(identities)
    except FileNotFoundError:
        return None, {}
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); run the same command again, which writes it again."
        ) from error


def record_failure(ledger: Ledger, shard: str, error: str) -> None:
    """Record that a shard failed as a whole, and why."""
    make_folder(ledger.path.parent)
    line = json.dumps({"shard": shard, "error": printable(error, MAX_MESSAGE)}, ensure_ascii=False).encode() + b"\n"
    append_line(ledger.path.with_name(f"{ledger.stage}{FAILED}"), line)


def read_failures(ledger: Ledger) -> dict[str, str]:
    """The shards that failed as a whole when the stage last ran, and why."""
    lines = documents.read_json_lines(ledger.path.with_name(f"{ledger.stage}{FAILED}"))  # a kill may have cut the last
    return {str(line.get("shard")): str(line.get("error")) for line in lines}


def find_ledgers(folder: StoragePath) -> list[Ledger]:
    """The ledgers of all stages in a run folder, in the order of the stages."""
    ledgers: dict[tuple[StoragePath, str], Ledger] = {}
    for pattern in _LEDGERS:
        for home in folder.glob(pattern):
            entries = listing(home)
            stages = {name.removesuffix(PLAN) for name in entries if name.endswith(PLAN)}
            for stage in stages | {name for name, stat in entries.items() if stat is None}:
                ledgers[home.parent, stage] = Ledger(home.parent, stage)
    return sorted(ledgers.values(), key=_order)


def _order(ledger: Ledger) -> tuple[Any, ...]:
    parts = [[int(p) if p.isdigit() else -1 for p in re.split(r"(\d+)", part)] for part in ledger.folder.parts]
    kind = "score" if ledger.stage.startswith("score-") else ledger.stage
    rank = ORDER.index(kind) if kind in ORDER else len(ORDER)
    return len(parts), parts, str(ledger.folder), rank, ledger.stage


@dataclass
class StageStatus:
    """How far a stage is."""

    ledger: Ledger
    plan: StagePlan
    done: int = 0
    tally: Tally = field(default_factory=Tally.zero)
    errors: Counter[str] = field(default_factory=Counter)
    """Shards that failed as a whole, by reason."""
    rate: float | None = None
    """Units a second since the newest command began, as it recorded them; None where it recorded none."""
    usage: Usage | None = None
    """What it used, all commands together; None where that was not measured."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds until it is done, at this rate; None without a rate."""
        return (self.plan.total - self.done) / self.rate if self.rate else None


def read_status(ledger: Ledger) -> StageStatus:
    """Count what a stage has done; completions of an earlier plan do not count."""
    plan, identities = read_plan(ledger)
    count = 0
    status = StageStatus(ledger, plan or StagePlan(ledger.stage, 0), usage=read_usage(ledger))
    stats = listing(ledger.path)
    for done in ledger.readable_completions():
        if stats.get(f"{done.shard}.json") is None or (identities and identities.get(done.shard) != done.fingerprint):
            continue
        count += 1
        status.tally += done.tally
    status.done = count
    if plan is None:
        status.plan = StagePlan(ledger.stage, count, count)
    elif plan.log:
        steps, status.rate = _steps(ledger.folder / plan.log)
        status.done = plan.total if count else steps
    else:
        status.rate = _rate(ledger)
    status.errors = bounded(Counter(error_kind(error) for error in read_failures(ledger).values()))
    return status


def error_kind(error: str) -> str:
    """An error without its names and numbers and shortened, to count the same error of many shards together."""
    return re.sub(r"\S*[/\d]\S*", "…", printable(error, MAX_MESSAGE))[:120]


def _rate(ledger: Ledger) -> float | None:
    try:
        pace = documents.parse(documents.read_bytes(ledger.path.with_name(f"{ledger.stage}{PACE}")))
        return float(pace["done"] / pace["seconds"])
    except (
        FileNotFoundError,
        ValueError,
        LookupError,
        TypeError,
        ArithmeticError,
    ):  # not written yet, or by another program
        return None


def _steps(log: StoragePath) -> tuple[int, float | None]:
    """The newest step of a training, and its steps a second over the last 64 KiB of its log."""
    lines = list(documents.read_json_lines(log, 65536))
    try:
        seconds = [float(line["step_seconds"]) for line in lines if line.get("step_seconds")]
        return (int(lines[-1]["step"]) if lines else 0), (len(seconds) / sum(seconds) if seconds else None)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise RunError(f"{log} cannot be read ({error!r}): its lines must say `step` and `step_seconds`.") from error
