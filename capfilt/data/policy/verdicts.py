"""The verdict on each text of an image, from the scores of all of them.

What no threshold changes is decided first (failures, sources, rules, conditions), so whoever moves the threshold over
texts that are dropped by it alone sees what another `select` would keep.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.annotations import Annotation
from capfilt.data.policy.config import Condition, Rule, other_score
from capfilt.data.sample import is_text
from capfilt.printable import printable
from capfilt.runs.tally import NO_TEXT, NO_TEXT_REASONS, no_text


def verdicts_of_image(rows: Sequence[Annotation], rule: Rule) -> list[str]:
    """Why each text of one image is dropped, or "" where it is kept. A score passes when it reaches its threshold.

    `rows`: all texts of the image.
    """
    reasons = [_verdict_alone(row, rule) for row in rows]
    if not rule.top_k and rule.keep == "all":
        return reasons
    passing = [i for i, reason in enumerate(reasons) if not reason]
    for score, number in rule.shortlist.items():
        passing.sort(key=lambda i: _sort_key(rows[i], score))
        for i in passing[number:]:
            reasons[i] = f"not among the {number} best by {score}"
        passing = passing[:number]
    passing.sort(key=lambda i: _sort_key(rows[i], rule.rank))
    if rule.keep == "web-first":
        passing.sort(key=lambda i: rows[i].source == "synthetic")
    kept: set[str] = set()
    for i in passing:
        first = rows[passing[0]]
        if rule.keep == "web-first" and rows[i].source == "synthetic" != first.source:
            reasons[i] = f"a {first.source} text of the image passes"
        elif rows[i].text.strip() in kept:
            reasons[i] = "same text as a better one"
        elif rule.top_k and len(kept) == rule.top_k:
            reasons[i] = f"not among the {rule.top_k} best by {rule.rank}"
        elif rule.keep != "all" and kept:
            reasons[i] = f"a {first.source} text of the image ranks higher by {rule.rank}"
        else:
            kept.add(rows[i].text.strip())
    return reasons


def verdicts_of_table(table: pa.Table, rule: Rule) -> list[str] | None:
    """The same for all rows of a table at once, of a rule that is one threshold on one score; None for another rule."""
    ranked = rule.top_k or rule.keep != "all" or rule.shortlist or rule.needs_rank
    if ranked or rule.sources or rule.has_conditions or rule.other_threshold is not None or rule.threshold is None:
        return None
    value, reason = table[rule.score], table["reason"]
    plain = pc.match_substring_regex(table["text"], "[A-Za-z0-9]").to_numpy(zero_copy_only=False)
    rest = np.flatnonzero(~plain)
    plain[rest] = [is_text(text) for text in table["text"].take(pa.array(rest)).to_pylist()]
    below = pc.less(value.cast(pa.float64()), rule.threshold)  # as Python compares them
    why = pc.if_else(below, f"{rule.score} below threshold", "")
    why = pc.if_else(pc.is_null(value), f"no {rule.score} score", why)
    without = pc.if_else(pc.match_substring_regex(reason, NO_TEXT_REASONS), reason, NO_TEXT)
    why = pc.if_else(pa.array(plain), why, without)
    result: list[str] = pc.if_else(pc.equal(table["status"], "failed"), reason, why).to_pylist()
    return result


def best_text(kept: Iterable[Annotation], rule: Rule) -> Annotation:
    """The best of an image's kept texts, by `rank` where the policy ranks (`top_k`, no threshold), else by `score`."""
    by = rule.rank if rule.top_k or rule.threshold is None else rule.score
    return min(kept, key=lambda row: _sort_key(row, by))


def _sort_key(row: Annotation, score: str) -> tuple[float, bool, bool, int]:
    """Sorts better texts first; of equals web texts, then human ones, then the first candidate."""
    value = row.score(score)
    order = (row.source == "synthetic", row.source != "web", row.candidate)
    return (math.inf if value is None else -value, *order)


def _verdict_alone(row: Annotation, rule: Rule) -> str:
    """Why a text is dropped whatever the image's other texts are, or ""."""
    if fixed := fixed_reason(row, rule):
        return fixed
    if rule.threshold is not None:
        reason = _below(row, rule.score, rule.threshold)
        if rule.other_threshold is not None:
            other = _below(row, other_score(rule.score), rule.other_threshold)
            either = rule.combine == "or"
            reason = (reason and other and f"{reason}, {other}") if either else reason or other
        if reason:
            return reason
    for score in rule.shortlist:
        if row.score(score) is None:
            return f"no {score} score"
    return f"no {rule.rank} score" if row.score(rule.rank) is None and rule.needs_rank else ""


def fixed_reason(row: Annotation, rule: Rule) -> str:
    """Why a text is dropped whatever the thresholds on `score` and the other one are, or ""."""
    if row.status == "failed":
        return row.reason
    if not is_text(row.text):
        return no_text(row.reason) or NO_TEXT
    if rule.sources and row.source not in rule.sources:
        return f"{row.source} texts are left out"
    if not rule.has_conditions:
        return ""
    unmet = (_unmet(row, alternatives) for alternatives in rule.conditions)
    return rule.rules.broken(row.text) or next((reason for reason in unmet if reason), "")


def whatever_threshold(row: Annotation, why: str, rule: Rule) -> str | None:
    """Why a text is dropped whatever the threshold on `score`, "" where that decides, None where it is kept anyhow.

    `why` is its verdict. What `top_k` or `keep` has dropped stays dropped: another threshold may rank otherwise.
    """
    if fixed := fixed_reason(row, rule):
        return fixed
    ranked = why if why and not why.startswith("no ") and "below threshold" not in why else ""
    if ranked or rule.other_threshold is None:
        return ranked
    other = _below(row, other_score(rule.score), rule.other_threshold)
    return other if rule.combine == "and" else "" if other else None


def _unmet(row: Annotation, alternatives: Sequence[Condition]) -> str:
    """Why a text meets none of these conditions, or ""."""
    reasons = [_outside(row, condition) for condition in alternatives]
    return ", ".join(reasons) if all(reasons) else ""


def _outside(row: Annotation, condition: Condition) -> str:
    value = row.score(condition.score)
    if value is None:
        return f"no {condition.score} score"
    if condition.min is not None and value < condition.min:
        return f"{condition.score} below {condition.min:g}"
    if condition.max is not None and value > condition.max:
        return f"{condition.score} above {condition.max:g}"
    return ""


def _below(row: Annotation, score: str, threshold: float) -> str:
    """Why a score does not reach a threshold, or ""."""
    value = row.score(score)
    if value is None:
        return f"no {score} score"
    return "" if value >= threshold else f"{score} below threshold"


def failure_class(reason: str) -> str:
    """The class by which a failure is counted: its reason without the particulars (a position, a size, a message)."""
    return printable(re.split(r":| \(| at byte", reason, maxsplit=1)[0])
