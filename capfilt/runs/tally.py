"""Counters that add, and the balance they must keep: in = kept + dropped + failed.

The counters may be filled in place, `tally.samples["in"] += 1`; frozen only means that none is swapped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from capfilt.errors import RunError
from capfilt.printable import printable, short_repr

SAMPLES = ("in", "kept", "dropped", "failed")
TEXTS = ("in", "kept", "dropped")
NO_TEXT = "no text"
"""The reason why a text is dropped in which there is nothing to read (`data.sample.is_text`); it has no scores."""
MAX_REASONS = 256
"""Reasons that are counted apart; ours are a few dozen, so more of them are somebody's data."""
MAX_SOURCES = 16
OTHER = "other"
"""What the rarer reasons count as."""


def _no_texts() -> dict[str, Counter[str]]:
    return {key: Counter() for key in TEXTS}


@dataclass(frozen=True)
class Tally:
    """What became of a set of samples and of their texts.

    `texts["in"]` and `texts["kept"]` count by source, `texts["dropped"]` by "source: reason", `failed` by
    reason. The texts of a failed sample are not counted. Reasons are keys: `bounded` keeps them few and short.
    """

    samples: Counter[str] = field(default_factory=Counter)
    texts: dict[str, Counter[str]] = field(default_factory=_no_texts)
    failed: Counter[str] = field(default_factory=Counter)
    members: Counter[str] = field(default_factory=Counter)
    """Of a stage that reads shards: how many members they had, "in", and what became of each: "used" by a sample,
    "carried" beside one, or passed over, by the reason. Empty where nothing was counted."""

    @classmethod
    def zero(cls) -> Tally:
        """Return an empty tally, the start of `sum(tallies, Tally.zero())`."""
        return cls()

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            samples=_add(self.samples, other.samples),
            texts={key: _add(self.texts[key], other.texts[key]) for key in TEXTS},
            failed=_add(self.failed, other.failed),
            members=_add(self.members, other.members),
        )

    def imbalance(self) -> str:
        """Say what does not add up, or "" where all of it does.

        Texts balance for each source on its own: a synthetic text cannot make up for a lost web text.
        """
        counters = {"samples": self.samples, "failed": self.failed, "members": self.members, **self.texts}
        if unknown := [*(set(self.samples) - set(SAMPLES)), *(set(self.texts) - set(TEXTS))]:
            return f"unknown counters {sorted(unknown)}"
        if negative := [name for name, counter in counters.items() if min(counter.values(), default=0) < 0]:
            return f"negative counts in {negative}"
        num = {key: self.samples[key] for key in SAMPLES}
        if num["in"] != num["kept"] + num["dropped"] + num["failed"]:
            return "samples: {in} in, but {kept} kept + {dropped} dropped + {failed} failed".format(**num)
        if num["failed"] != self.failed.total():
            return f"samples: {num['failed']} failed, but {self.failed.total()} reasons"
        if (came := self.members["in"]) != (gone := self.members.total() - came):
            return f"members: {came} in, but {gone} used, carried or passed over"
        dropped: Counter[str] = Counter()
        for key, count in self.texts["dropped"].items():
            dropped[key.partition(": ")[0]] += count
        for source in sorted({*self.texts["in"], *self.texts["kept"], *dropped}):
            came, kept, gone = self.texts["in"][source], self.texts["kept"][source], dropped[source]
            if came != kept + gone:
                return f"{source} texts: {came} in, but {kept} kept + {gone} dropped"
        return ""

    def judged(self) -> dict[str, int]:
        """By source, the texts that came in and in which there is something to read: what shares are shares of."""
        return {source: n - self.texts["dropped"][f"{source}: {NO_TEXT}"] for source, n in self.texts["in"].items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, for json.dumps."""
        return {
            "samples": {key: self.samples[key] for key in SAMPLES},
            "texts": {key: dict(bounded(self.texts[key])) for key in TEXTS},
            "failed": dict(bounded(self.failed)),
            **({"members": dict(bounded(self.members))} if self.members else {}),
        }

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Tally:
        """Read what `to_json` wrote; RunError for anything else."""
        try:
            found = cls(
                samples=_counter(obj["samples"]),
                texts={key: _counter(obj["texts"][key]) for key in TEXTS},
                failed=_counter(obj["failed"]),
                members=_counter(obj.get("members", {})),
            )
            if len(found.texts["in"]) > MAX_SOURCES:
                raise TypeError(f"{len(found.texts['in'])} sources of texts")
            return found
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(f"this is no tally ({error!r}): {short_repr(obj)}; run the stage again.") from error


def _add(a: Counter[str], b: Counter[str]) -> Counter[str]:
    # Counter's own + drops what is not positive, which would hide a miscount.
    total = Counter(a)
    total.update(b)
    return total if len(total) <= MAX_REASONS else bounded(total)


def bounded(counts: Counter[str]) -> Counter[str]:
    """The same total under at most MAX_REASONS names, each printable and short.

    The rarest count as "other" (a text as "source: other"), so that sources still balance.
    """
    found: Counter[str] = Counter()
    for name, count in counts.items():
        found[printable(name)] += count
    if len(found) <= MAX_REASONS:
        return found
    for name, _ in found.most_common()[MAX_REASONS - MAX_SOURCES :]:
        source, colon, _ = name.partition(": ")
        count = found.pop(name)
        found[f"{source}: {OTHER}" if colon else OTHER] += count
    return found


def _counter(counts: Mapping[str, Any]) -> Counter[str]:
    for name, count in counts.items():
        if type(count) is not int:
            raise TypeError(f"{name} is {count!r}")
    return bounded(Counter(dict(counts)))
