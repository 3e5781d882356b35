"""Checks that all measures share: columns of one length, and rows that count once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Sized

from capfilt.errors import DataError


def check_columns(what: str, rows: int, **columns: Sized | None) -> None:
    """DataError where a column is there and has another number of rows; `what` names a row, in the plural."""
    for name, column in columns.items():
        if column is not None and len(column) != rows:
            raise DataError(f"{rows} {what} but {len(column)} {name.replace('_', ' ')}; there must be one each.")


def check_unique(what: str, ids: Sequence[Hashable] | None) -> None:
    """DataError where an id stands twice: a row that counts double is a figure of other data."""
    rows: dict[Hashable, int] = {}
    for row, key in enumerate(ids or ()):
        if (first := rows.setdefault(key, row)) != row:
            raise DataError(f"{what} {key} of row {row} is that of row {first} too; each counts once: leave one out.")
