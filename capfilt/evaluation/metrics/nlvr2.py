"""Statements about two pictures, true or false: accuracy, and consistency over the pairs of one statement."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from capfilt.evaluation.metrics.rows import check_columns, check_unique


def accuracy(
    answers: Sequence[bool],
    labels: Sequence[bool | None],
    groups: Sequence[str | None] | None = None,
    ids: Sequence[Hashable] | None = None,
) -> dict[str, Any]:
    """Measure accuracy and consistency in percent, majority (the accuracy of the more frequent label), statements.

    Consistency is the share of groups of which every statement is answered right; a group is one sentence beside
    several pairs of pictures (NLVR2's identifier without its third part). A statement without a group is in no
    consistency, one without a label in nothing but the count unlabelled; what has nothing to average is absent.

    Source: nlvr2/eval/metrics.py. Raises DataError when columns differ in length or an id stands twice.
    """
    check_columns("answers", len(answers), labels=labels, groups=groups, ids=ids)
    check_unique("statement", ids)
    known = [(row, label) for row, label in enumerate(labels) if label is not None]
    figures: dict[str, Any] = {"statements": len(known)}
    if len(known) < len(labels):
        figures["unlabelled"] = len(labels) - len(known)
    if not known:
        return figures
    consistent: dict[str, bool] = {}
    right = 0
    for row, label in known:
        is_right = bool(answers[row]) == bool(label)
        right += is_right
        group = groups[row] if groups is not None else None
        if group is not None:
            consistent[group] = consistent.get(group, True) and is_right
    true = sum(bool(label) for _, label in known)
    figures["accuracy"] = 100.0 * right / len(known)
    figures["majority"] = 100.0 * max(true, len(known) - true) / len(known)
    if consistent:
        figures["consistency"] = 100.0 * sum(consistent.values()) / len(consistent)
    return figures
