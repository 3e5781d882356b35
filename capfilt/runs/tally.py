"""Counters that add, and the balance they must keep: in = kept + dropped + failed.

The counters may be filled in place, `tally.samples["in"] += 1`; frozen only means that none is replaced.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from capfilt.errors import RunError
from capfilt.printable import printable, short_repr

SAMPLES = ("in", "kept", "dropped", "failed")
TEXTS = ("in", "kept", "dropped")
NO_TEXT = "no text"
"""The reason of dropping a text without any letter or digit (`data.sample.is_text`); it has no scores."""
CAPTION_FAILED = "caption failed: "
"""How the reason begins of a row whose caption was not written; the class of the failure follows."""
NO_TEXT_REASONS = rf"^({NO_TEXT}$|caption (failed|dropped): )"
"""The reasons of rows without a text to score: that nothing was to be read in it, or that no caption came of it."""
MAX_REASONS = 256
"""Reasons that are counted separately. The code has a few dozen, so more of them come from data."""
MAX_SOURCES = 16
OTHER = "other"
"""The reason under which the rarer ones are counted."""


def no_text(reason: str) -> str:
    """The `reason` of a row of annotations if it is one of NO_TEXT_REASONS, "" for any other."""
    return reason if re.match(NO_TEXT_REASONS, reason) else ""


def _no_texts() -> dict[str, Counter[str]]:
    return {key: Counter() for key in TEXTS}


@dataclass(frozen=True)
class Tally:
    """Counts of a set of samples and of their texts, by outcome.

    `texts["in"]` and `texts["kept"]` count by source, `texts["dropped"]` by "source: reason", `failed` by
    reason. The texts of a failed sample are not counted. Reasons are keys: `bounded` keeps them few and short.
    """

    samples: Counter[str] = field(default_factory=Counter)
    texts: dict[str, Counter[str]] = field(default_factory=_no_texts)
    failed: Counter[str] = field(default_factory=Counter)
    members: Counter[str] = field(default_factory=Counter)
    """Members of the shards that a stage read: "in", and each again as "used" by a sample, "carried" beside one, or
    skipped, by reason. Empty where none were counted."""
    remarks: Counter[str] = field(default_factory=Counter)
    """What was done to texts that were kept ("cut: opener"), or is said of them. Empty where nothing is."""

    @classmethod
    def zero(cls) -> Tally:
        """Return an empty tally, the start of `sum(tallies, Tally.zero())`."""
        return cls()

    def add_failed(self, reason: str) -> None:
        """Count a sample that failed."""
        self.samples.update(["in", "failed"])
        self.failed[reason] += 1

    def add_text(self, source: str, dropped: str = "") -> None:
        """Count a text, kept or `dropped` for this reason."""
        self.texts["in"][source] += 1
        if dropped:
            self.texts["dropped"][f"{source}: {dropped}"] += 1
        else:
            self.texts["kept"][source] += 1

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            samples=_add(self.samples, other.samples),
            texts={key: _add(self.texts[key], other.texts[key]) for key in TEXTS},
            failed=_add(self.failed, other.failed),
            members=_add(self.members, other.members),
            remarks=_add(self.remarks, other.remarks),
        )

    def imbalance(self) -> str:
        """Describe what does not add up; "" where everything does.

        Texts must balance for each source: a synthetic text cannot make up for a lost web text.
        """
        counters = {
            "samples": self.samples,
            "failed": self.failed,
            "members": self.members,
            "remarks": self.remarks,
            **self.texts,
        }
        if unknown := [*(set(self.samples) - set(SAMPLES)), *(set(self.texts) - set(TEXTS))]:
            return f"unknown counters {sorted(unknown)}"
        if negative := [name for name, counter in counters.items() if min(counter.values(), default=0) < 0]:
            return f"negative counts in {negative}"
        num = {key: self.samples[key] for key in SAMPLES}
        if num["in"] != num["kept"] + num["dropped"] + num["failed"]:
            return "samples: {in} in, but {kept} kept + {dropped} dropped + {failed} failed".format(**num)
        if num["failed"] != self.failed.total():
            return f"samples: {num['failed']} failed, but {self.failed.total()} reasons"
        if (num_in := self.members["in"]) != (num_out := self.members.total() - num_in):
            return f"members: {num_in} in, but {num_out} used, carried or skipped"
        dropped: Counter[str] = Counter()
        for key, count in self.texts["dropped"].items():
            dropped[key.partition(": ")[0]] += count
        for source in sorted({*self.texts["in"], *self.texts["kept"], *dropped}):
            num_in, kept, num_dropped = self.texts["in"][source], self.texts["kept"][source], dropped[source]
            if num_in != kept + num_dropped:
                return f"{source} texts: {num_in} in, but {kept} kept + {num_dropped} dropped"
        return ""

    @property
    def has_failures(self) -> bool:
        """Whether a sample failed, or the caption of one."""
        return self.samples["failed"] > 0 or any(
            reason.partition(": ")[2].startswith(CAPTION_FAILED) for reason in self.texts["dropped"]
        )

    def num_scored(self) -> dict[str, int]:
        """By source, the number of texts that came in and could be scored: all but those with nothing to read."""
        scored = Counter(self.texts["in"])
        for key, count in self.texts["dropped"].items():
            source, _, reason = key.partition(": ")
            scored[source] -= count if no_text(reason) else 0
        return {source: scored[source] for source in self.texts["in"]}

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": {key: self.samples[key] for key in SAMPLES},
            "texts": {key: dict(bounded(self.texts[key])) for key in TEXTS},
            "failed": dict(bounded(self.failed)),
            **({"members": dict(bounded(self.members))} if self.members else {}),
            **({"remarks": dict(bounded(self.remarks))} if self.remarks else {}),
        }

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Tally:
        """Read what `to_json` wrote; RunError for anything else."""
        try:
            tally = cls(
                samples=_counter(obj["samples"]),
                texts={key: _counter(obj["texts"][key]) for key in TEXTS},
                failed=_counter(obj["failed"]),
                members=_counter(obj.get("members", {})),
                remarks=_counter(obj.get("remarks", {})),
            )
            if len(tally.texts["in"]) > MAX_SOURCES:
                raise TypeError(f"{len(tally.texts['in'])} sources of texts")
            return tally
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(f"this is no tally ({error!r}): {short_repr(obj)}; run the stage again.") from error


def _add(a: Counter[str], b: Counter[str]) -> Counter[str]:
    # The + of Counter drops what is not positive, which would hide a miscount.
    total = Counter(a)
    total.update(b)
    return total if len(total) <= MAX_REASONS else bounded(total)


_shown = lru_cache(4096)(printable)
"""A ledger of a million shards names the same few reasons in each."""


def bounded(counts: Counter[str]) -> Counter[str]:
    """The same total under at most MAX_REASONS names, each printable and short.

    The rarest count as "other" (a text as "source: other"), so that sources still balance.
    """
    total: Counter[str] = Counter()
    for name, count in counts.items():
        total[_shown(name)] += count
    if len(total) <= MAX_REASONS:
        return total
    for name, _ in total.most_common()[MAX_REASONS - MAX_SOURCES :]:
        source, colon, _ = name.partition(": ")
        count = total.pop(name)
        total[f"{source}: {OTHER}" if colon else OTHER] += count
    return total


def difference(annotated: Tally, selected: Tally) -> str:
    """Describe what was lost or added between the annotations of a shard and their verdicts; "" where nothing was."""
    if annotated.samples["in"] != selected.samples["in"]:
        return f"{annotated.samples['in']} samples were annotated, {selected.samples['in']} have a verdict"
    if annotated.samples["failed"] != selected.samples["failed"]:
        return f"{annotated.samples['failed']} samples failed, {selected.samples['failed']} of them have a verdict"
    before, after = annotated.members["in"], selected.members["in"]
    if before and after and before != after:
        return f"{before} members of the shard were read for annotations, {after} for verdicts"
    for source in sorted({*annotated.texts["in"], *selected.texts["in"]}):
        before, after = annotated.texts["in"][source], selected.texts["in"][source]
        if before != after:
            return f"{before} {source} texts were annotated, {after} have a verdict"
    return ""


def _counter(counts: Mapping[str, Any]) -> Counter[str]:
    total: Counter[str] = Counter()
    for name, count in counts.items():
        if type(count) is not int:
            raise TypeError(f"{name} is {count!r}")
        shown = _shown(name)
        total[shown] = total.get(shown, 0) + count
    return total if len(total) <= MAX_REASONS else bounded(total)
