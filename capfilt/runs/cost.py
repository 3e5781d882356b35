"""What a run used and what that costs: figures for tables, from the measured usage of its stages and a price.

A cloud bills machines and not work: costs are of the time for which workers were reserved, which `usage` has beside the
time for which they were busy. Prices are given where costs are read, and stand in no record of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from capfilt.errors import UsageError, did_you_mean
from capfilt.runs import stage_status
from capfilt.runs.ledger import Ledger
from capfilt.runs.stage_status import StageStatus
from capfilt.runs.usage import Usage, read_usage
from capfilt.storage.paths import StoragePath, relative_to

HOUR, MILLION = 3600.0, 1e6
EXAMPLE = "gpu=3.0,cpu=0.05, the USD of a GPU-hour and of a CPU-hour"
OF_A_RUN = ("select", "annotate", "download", "convert", "pack")
"""The stages whose samples are the images of a run; the first that it has counts, of its newest round."""


@dataclass(frozen=True)
class Price:
    """USD per CPU-hour and per GPU-hour; None: not said, and what used any has no cost."""

    cpu: float | None = None
    gpu: float | None = None

    @classmethod
    def of(cls, given: str | Mapping[str, Any]) -> Self:
        """A price as `--price` has it, "gpu=3.0,cpu=0.05", or as a mapping. UsageError for anything else."""
        pairs: Iterable[Sequence[Any]] = (
            [part.partition("=")[::2] for part in given.split(",")] if isinstance(given, str) else given.items()
        )
        prices: dict[str, float] = {}
        for name, value in ((str(name).strip(), value) for name, value in pairs):
            if name not in ("cpu", "gpu"):
                raise UsageError(f"--price names {name!r}; give {EXAMPLE}.{did_you_mean(name, ('cpu', 'gpu'))}")
            if name in prices:
                raise UsageError(f"--price has {name} twice; give {EXAMPLE}.")
            prices[name] = _usd(name, value)
        if not prices:
            raise UsageError(f"--price names no price; give {EXAMPLE}.")
        return cls(**prices)

    def missing(self, used: Usage) -> list[str]:
        """The kinds that were used and have no price."""
        return [kind for kind in ("cpu", "gpu") if getattr(self, kind) is None and getattr(used, f"{kind}_reserved")]

    def usd(self, used: Usage) -> float | None:
        """What it costs; None where something that was used has no price."""
        if self.missing(used):
            return None
        return ((self.cpu or 0.0) * used.cpu_reserved + (self.gpu or 0.0) * used.gpu_reserved) / HOUR

    def record(self) -> dict[str, float]:
        return {kind: price for kind in ("cpu", "gpu") if (price := getattr(self, kind)) is not None}


def _usd(name: str, value: object) -> float:
    try:
        usd = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        usd = math.nan
    if not 0 <= usd < math.inf:
        raise UsageError(f"--price: {name} is {value!r}, and must be a number of USD an hour, 0 or more: {EXAMPLE}.")
    return usd


def usage_record(used: Usage) -> dict[str, Any]:
    """What a stage used, as `summary.json` and `--json` have it; images a second only where images were counted."""
    speed = used.samples_per_second
    return {
        **({} if speed is None else {"images_per_second_per_worker": _short(speed)}),
        "cpu_seconds": {"busy": round(used.cpu_busy, 1), "reserved": round(used.cpu_reserved, 1)},
        "gpu_seconds": {"busy": round(used.gpu_busy, 1), "reserved": round(used.gpu_reserved, 1)},
    }


def stage_figures(stand: StageStatus, price: Price | None) -> dict[str, Any]:
    """The `usage` of a stage and, with a price, its `cost`; {} where nothing was measured."""
    used = stand.usage
    if used is None:
        return {}
    usd = None if price is None else price.usd(used)
    if usd is None:
        return {"usage": usage_record(used)}
    cost = {"usd": usd, "usd_expected": _expected(stand, usd), "usd_per_million_images": _per_million(stand, usd)}
    return {"usage": usage_record(used), "cost": {name: _short(x) for name, x in cost.items() if x is not None}}


def run_cost(stands: Sequence[StageStatus], price: Price) -> dict[str, Any]:
    """What the stages of a run cost together; a figure that is not known is absent.

    So far and in all are of the time that this run used itself. Per million images and per million kept texts they are
    of the rates measured: what a fork took over, or a killed command did unseen, counts as if it had been done so.
    """
    record: dict[str, Any] = {"price": price.record()}
    measured = [(stand, stand.usage) for stand in stands if stand.usage is not None]
    if missing := price.missing(sum((used for _, used in measured), Usage())):
        return {**record, "unpriced": missing}
    costs = [(stand, usd, used) for stand, used in measured if (usd := price.usd(used)) is not None]
    if not costs:
        return record
    record["usd"] = _short(sum(usd for _, usd, _ in costs))
    expected = [_expected(stand, usd) for stand, usd, _ in costs]
    begun = [amount for amount in expected if amount is not None]
    if len(begun) == len(costs) and all(stand.usage or stand.done >= stand.plan.total for stand in stands):
        record["usd_expected"] = _short(sum(begun))
    if not any(map(_is_unmeasured, stands)):
        total = sum(usd * _unseen(stand, used) for stand, usd, used in costs)
        for name, number in zip(("images", "kept_texts"), _images_and_texts(stands), strict=True):
            if number:
                record[f"usd_per_million_{name}"] = _short(MILLION * total / number)
    return record


def rate_figures(images_per_second: float, cpus: float, gpus: float, price: Price | None) -> dict[str, Any]:
    """What a million images need at a measured rate of one worker of this size and, with a price, what they cost."""
    seconds = MILLION / images_per_second
    used = Usage(cpu_reserved=cpus * seconds, gpu_reserved=gpus * seconds)
    hours = {f"{kind}_hours": _short(getattr(used, f"{kind}_reserved") / HOUR) for kind in ("cpu", "gpu")}
    record: dict[str, Any] = {"per_million_images": hours}
    if price is None:
        return record
    cost: dict[str, Any] = {"price": price.record()}
    if missing := price.missing(used):
        return record | {"cost": {**cost, "unpriced": missing}}
    usd = price.usd(used)
    return record | {"cost": cost if usd is None else {**cost, "usd_per_million_images": _short(usd)}}


def usage_by_stage(folder: StoragePath) -> dict[str, Any]:
    """What each stage of a run used, by FOLDER/STAGE; without those of which nothing was measured."""
    used = {ledger: read_usage(ledger) for ledger in stage_status.find_ledgers(folder)}
    return {_name(folder, ledger): usage_record(one) for ledger, one in used.items() if one is not None}


def figures(folder: StoragePath, price: Price | None) -> dict[str, Any]:
    """The `usage` of a run and, with a price, its `cost`; {} where nothing was measured."""
    if not (used := usage_by_stage(folder)):
        return {}
    if price is None:
        return {"usage": used}
    stands = [stage_status.read_status(ledger) for ledger in stage_status.find_ledgers(folder)]
    return {"usage": used, "cost": run_cost(stands, price)}


def table_of_usage(stages: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of what stages used, from their records with `label`, `usage` and perhaps `cost`; a column
    without any figure is left out, a figure that is not known is a dash."""
    rows = [{"stage": stage["label"], **_columns(stage["usage"], stage.get("cost", {}))} for stage in stages]
    headings = [name for name in rows[0] if any(row[name] not in ("", "0") for row in rows)] if rows else []
    return headings, [[row[name] or "–" for name in headings] for row in rows]


def _columns(usage: Mapping[str, Any], cost: Mapping[str, float]) -> dict[str, str]:
    speed = usage.get("images_per_second_per_worker")
    columns = {"images/s per worker": "" if speed is None else f"{speed:,.1f}"}
    for kind in ("cpu", "gpu"):
        for what in ("reserved", "busy"):
            columns[f"{kind.upper()}-seconds {what}"] = f"{usage[f'{kind}_seconds'][what]:,.0f}"
    for name, heading in (
        ("usd", "USD so far"),
        ("usd_expected", "USD in all"),
        ("usd_per_million_images", "USD per million images"),
    ):
        columns[heading] = _money(cost[name]) if name in cost else ""
    return columns


def lines(cost: Mapping[str, Any]) -> Iterator[str]:
    """The cost of a run for a person."""
    prices = ", ".join(f"{usd:g} USD a {kind.upper()}-hour" for kind, usd in cost["price"].items())
    if missing := cost.get("unpriced"):
        used = " and ".join(kind.upper() for kind in missing)
        yield f"no cost: {used} time was used, and --price does not say what an hour of it costs"
    elif "usd" not in cost:
        yield "no cost: nothing that was used has been measured"
    else:
        parts = [f"{_money(cost['usd'])} USD so far"]
        for name, words in (
            ("usd_expected", "in all, of the stages that have begun"),
            ("usd_per_million_images", "per million images"),
            ("usd_per_million_kept_texts", "per million kept texts"),
        ):
            if name in cost:
                parts.append(f"{_money(cost[name])} USD {words}")
        yield f"cost        {'; '.join(parts)} (at {prices}, reserved)"


def _name(folder: StoragePath, ledger: Ledger) -> str:
    home = relative_to(ledger.folder, folder).as_posix()
    return ledger.stage if home == "." else f"{home}/{ledger.stage}"


def _is_unmeasured(stand: StageStatus) -> bool:
    """Whether workers did something of a stage unseen, in a run of before or that this one was forked from. What the
    driver commits by itself, without a sample and without a training, takes none."""
    worked = stand.tally.samples["in"] or stand.plan.log or stand.ledger.forked_from is not None
    return stand.usage is None and bool(stand.done and worked)


def _expected(stand: StageStatus, usd: float) -> float | None:
    """What the stage will have cost; None while nothing of it is done."""
    left = stand.plan.total - stand.done
    if left <= 0:
        return usd
    return usd + usd / stand.usage.done * left if stand.usage is not None and stand.usage.done else None


def _per_million(stand: StageStatus, usd: float) -> float | None:
    """Per million samples of the stage, each counted once however often it was done."""
    assert stand.usage is not None
    counted = stand.tally.samples["in"]
    samples = min(counted, stand.usage.samples) if counted else stand.usage.samples
    return MILLION * usd / samples if samples else None


def _unseen(stand: StageStatus, used: Usage) -> float:
    """By how much the cost of what was measured is to be raised for what was not."""
    counted = stand.tally.samples["in"]
    return max(1.0, counted / used.samples) if counted and used.samples else 1.0


def _images_and_texts(stands: Sequence[StageStatus]) -> tuple[int, int]:
    """The images of a run, and the texts that its newest selection kept; 0 for none."""
    newest = {stand.ledger.stage: stand.tally for stand in stands}
    of_a_run = next((newest[stage] for stage in OF_A_RUN if stage in newest), None)
    images = of_a_run.samples["in"] if of_a_run else max((tally.samples["in"] for tally in newest.values()), default=0)
    return images, newest["select"].texts["kept"].total() if "select" in newest else 0


def _money(usd: float) -> str:
    return f"{usd:,.2f}" if usd >= 1 else f"{usd:.2g}"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
