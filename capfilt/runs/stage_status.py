"""The stages of a run folder, read from its files alone: what each was to do, what is done, what failed.

Beside a stage's completions lie `ledger/STAGE.plan.jsonl` (a header, then a line for each shard) and, where shards
failed as a whole, `ledger/STAGE.failed.jsonl`. `ledger/STAGE.pace.json` holds how much the newest command has done and
in how many seconds; times of files are not used, so that a copy of the folder gives the same rate. `usage.py` says what
`ledger/STAGE.usage.jsonl` has.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, get_type_hints

from capfilt.errors import RunError
from capfilt.printable import MAX_MESSAGE, printable
from capfilt.runs.ledger import Ledger
from capfilt.runs.tally import Tally, bounded
from capfilt.runs.usage import Usage, read_usage
from capfilt.storage import documents, safe_paths
from capfilt.storage.append_log import append_line
from capfilt.storage.atomic import atomic, write_json
from capfilt.storage.documents import PLAN_BYTES, RECORD_BYTES
from capfilt.storage.paths import StoragePath, listing, make_folder, remove_file, subfolders
from capfilt.storage.remote_path import RemotePath

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

MAX_COUNTED = 5_000
"""Shards of a stage whose completions `read_status` reads: some 60 microseconds each, and an answer of a store."""

_DEPTH = 2
"""Folders between a run folder and its deepest ledgers: `data/web/ledger`."""
_WITHOUT_LEDGERS = {"ledger", "annotations", "dataset", "scores", "embeddings", "plan", "poison", "checkpoint"}


@dataclass(frozen=True)
class StagePlan:
    """What the newest command is to do of a stage; the fields are the keys of the header of `STAGE.plan.jsonl`."""

    label: str
    total: int
    found: int = 0
    """How much was done before the command began."""
    unit: str = "shards"
    log: str = ""
    """For a stage that is one training: its log, relative to the folder of the ledger, whose last line has `step`."""

    @classmethod
    def from_json(cls, tree: Any) -> StagePlan:
        """Read a header. ValueError or TypeError for anything else."""
        types = get_type_hints(cls)
        if not isinstance(tree, dict) or tree.keys() - types.keys():
            raise TypeError("it holds other keys than a plan")
        plan = cls(**tree)
        if not all(type(getattr(plan, name)) is type_ for name, type_ in types.items()) or plan.total < 0:
            raise TypeError("it holds values of other types than a plan")
        if plan.log:
            safe_paths.check_relative(plan.log)
        return plan


def write_plan(ledger: Ledger, plan: StagePlan, identities: Mapping[str, str] | None = None) -> None:
    """Write what a stage is to do, and each shard's fingerprint, before it begins; removes the failures of before."""
    path = ledger.path.with_name(f"{ledger.stage}{PLAN}")
    with atomic(path) as file:
        file.write(json.dumps(asdict(plan), ensure_ascii=False).encode() + b"\n")
        for shard, identity in (identities or {}).items():
            file.write(json.dumps([shard, identity], ensure_ascii=False).encode() + b"\n")
    for ending in (FAILED, PACE):
        remove_file(ledger.path.with_name(f"{ledger.stage}{ending}"))


class PaceFile:
    """Counts what a command has done of a stage, and writes the count, the seconds and, of a large stage, the sum of
    all that is done for `read_status`: after the first item, then every `PACE_SECONDS`, and at the end."""

    def __init__(self, ledger: Ledger, total: int = 0):
        """`total`: the items of the stage."""
        self._path, self._large = ledger.path.with_name(f"{ledger.stage}{PACE}"), total > MAX_COUNTED
        self._started = time.monotonic()
        self._done, self._written, self._due = 0, 0, self._started

    def add(self, in_all: int, total: Tally) -> None:
        """Count one more item as done, after which the stage has so many and their sum is `total`."""
        self._done += 1
        if time.monotonic() >= self._due:
            self.write(in_all, total)

    def write(self, in_all: int, total: Tally) -> None:
        """Write the file, if it has changed."""
        now = time.monotonic()
        if self._done > self._written:
            record: dict[str, Any] = {"done": self._done, "seconds": round(now - self._started, 3)}
            write_json(self._path, record | ({"in_all": in_all, "tally": total.to_json()} if self._large else {}))
        self._written, self._due = self._done, now + PACE_SECONDS


def read_plan(ledger: Ledger) -> tuple[StagePlan | None, dict[str, str]]:
    """What a stage was to do, and the fingerprint of each shard; None where it never began."""
    path = ledger.path.with_name(f"{ledger.stage}{PLAN}")
    try:
        lines = io.BytesIO(documents.read_bytes(path, PLAN_BYTES))
        plan, identities = StagePlan.from_json(documents.parse(lines.readline())), dict[str, str]()
        for line in filter(bytes.strip, lines):
            shard, identity = documents.parse(line)
            if not (isinstance(shard, str) and isinstance(identity, str)):
                raise TypeError("a line must be a shard and its fingerprint")
            identities[shard] = identity
        return plan, identities
    except FileNotFoundError:
        return None, {}
    except (ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _read_head(ledger: Ledger) -> StagePlan | None:
    """The plan of a stage without its shards, of which a large one has 100 MB; None where it never began."""
    path = ledger.path.with_name(f"{ledger.stage}{PLAN}")
    try:
        with path.open("rb") if isinstance(path, RemotePath) else safe_paths.open_file(path) as file:
            return StagePlan.from_json(documents.parse(file.readline(RECORD_BYTES)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: StoragePath, error: Exception) -> RunError:
    return RunError(f"{path} cannot be read ({error}); run the same command again, which writes it again.")


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
    for home in _homes(folder, _DEPTH):
        entries = listing(home / "ledger")
        stages = {name.removesuffix(PLAN) for name in entries if name.endswith(PLAN)}
        for stage in stages | {name for name, stat in entries.items() if stat is None}:
            ledgers[home, stage] = Ledger(home, stage)
    return sorted(ledgers.values(), key=_order)


def _homes(folder: StoragePath, depth: int) -> Iterator[StoragePath]:
    """The folders that hold a `ledger/`, down to a depth; those with a file a shard are not listed."""
    names = set(subfolders(folder))
    if "ledger" in names:
        yield folder
    for name in names - _WITHOUT_LEDGERS if depth else ():
        yield from _homes(folder / name, depth - 1)


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
    """Count what a stage has done; completions of an earlier plan do not count.

    Of more than `MAX_COUNTED` shards it is what the driver has counted, as new as `PACE_SECONDS`, unless completions
    were withdrawn since.
    """
    plan, pace = _read_head(ledger), _read_pace(ledger)
    status = StageStatus(ledger, plan or StagePlan(ledger.stage, 0), usage=read_usage(ledger))
    if not _take_count(status, pace):
        _count(status)
    if plan is None:
        status.plan = StagePlan(ledger.stage, status.done, status.done)
    elif plan.log:
        steps, status.rate = _steps(ledger.folder / plan.log)
        status.done = plan.total if status.done else steps
    else:
        status.rate = _rate(pace)
    status.errors = bounded(Counter(error_kind(error) for error in read_failures(ledger).values()))
    return status


def _count(status: StageStatus) -> None:
    """Read every completion of a stage."""
    _, identities = read_plan(status.ledger)
    stats = listing(status.ledger.path)
    for done in status.ledger.readable_completions():
        known = stats.get(f"{done.shard}.json") is not None
        if known and (not identities or identities.get(done.shard) == done.fingerprint):
            status.done += 1
            status.tally += done.tally


def _take_count(status: StageStatus, pace: Mapping[str, Any]) -> bool:
    """Take what the driver of a large stage has counted, if it has and nothing of that was withdrawn."""
    if status.plan.total <= MAX_COUNTED or "in_all" not in pace:
        return False
    try:
        done, tally = int(pace["in_all"]), Tally.from_json(pace["tally"])
    except (RunError, ValueError, TypeError, KeyError):  # by another program
        return False
    if not 0 <= done <= min(status.plan.total, status.ledger.num_files()):
        return False
    status.done, status.tally = done, tally
    return True


def error_kind(error: str) -> str:
    """An error without its names and numbers and shortened, to count the same error of many shards together."""
    return re.sub(r"\S*[/\d]\S*", "…", printable(error, MAX_MESSAGE))[:120]


def _read_pace(ledger: Ledger) -> Mapping[str, Any]:
    """What the driver has counted; {} where it is not written yet, or by another program."""
    try:
        pace = documents.parse(documents.read_bytes(ledger.path.with_name(f"{ledger.stage}{PACE}")))
    except (FileNotFoundError, ValueError):
        return {}
    return pace if isinstance(pace, dict) else {}


def _rate(pace: Mapping[str, Any]) -> float | None:
    try:
        return float(pace["done"] / pace["seconds"])
    except (ValueError, LookupError, TypeError, ArithmeticError):
        return None


def _steps(log: StoragePath) -> tuple[int, float | None]:
    """The newest step of a training, and its steps a second over the last 64 KiB of its log."""
    lines = list(documents.read_json_lines(log, 65536))
    try:
        seconds = [float(line["step_seconds"]) for line in lines if line.get("step_seconds")]
        return (int(lines[-1]["step"]) if lines else 0), (len(seconds) / sum(seconds) if seconds else None)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise RunError(f"{log} cannot be read ({error!r}): its lines must say `step` and `step_seconds`.") from error
