"""Rows of any number, joined with their labels and sorted by picture, in a file of SQLite and not in memory."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from capfilt.data.tasks.official.rows import Item, Label, OfficialRow, OtherSplit, Picture, check

_TABLE = """CREATE TABLE rows (
    number INTEGER PRIMARY KEY, kind TEXT, id TEXT, pictures TEXT, value TEXT, problem TEXT, waits INTEGER,
    name TEXT UNIQUE)"""
_INSERT = "INSERT INTO rows (kind, id, pictures, value, problem, waits, name) VALUES (?, ?, ?, ?, ?, ?, ?)"
_CACHE = "PRAGMA cache_size = -65536"  # KiB
_NO_JOURNAL = "PRAGMA journal_mode = OFF"  # after a kill the file is made anew


class Spool:
    """A file of rows. Of two rows of one kind and id the second cannot be used."""

    def __init__(self, path: Path):
        """`path`: where the file is made; it must not be there."""
        self._path = path
        self.other_splits: Counter[str] = Counter()
        """How many rows of splits that are not wanted came."""

    def fill(self, items: Iterable[Item]) -> int:
        """Add rows, and to rows their labels; returns how many rows there are."""
        with closing(sqlite3.connect(self._path, isolation_level=None)) as data:
            for statement in (_NO_JOURNAL, "PRAGMA synchronous = OFF", _CACHE, _TABLE, "BEGIN"):
                data.execute(statement)
            for item in items:
                if isinstance(item, OtherSplit):
                    self.other_splits[item.split] += 1
                elif isinstance(item, Label):
                    self._label(data, item)
                else:
                    self._add(data, item)
            data.execute("CREATE INDEX by_picture ON rows (pictures, number)")
            data.execute("COMMIT")
            (count,) = data.execute("SELECT count(*) FROM rows").fetchone()
            return int(count)

    def groups(self) -> Iterator[tuple[tuple[Picture, ...], list[OfficialRow]]]:
        """The rows of each picture or pair, sorted by it, each row checked; a row without a picture is alone."""
        with closing(sqlite3.connect(self._path)) as data:
            data.execute(_CACHE)
            found = data.execute(
                "SELECT kind, id, pictures, value, problem, waits, number FROM rows ORDER BY pictures, number"
            )
            for (pictures, _), rows in groupby(found, key=lambda r: (r[2], r[6] if r[2] == "[]" else 0)):
                names = tuple(map(_picture, json.loads(pictures)))
                yield names, [_row(names, *row[:2], *row[3:6]) for row in rows]

    def _add(self, data: sqlite3.Connection, row: OfficialRow) -> None:
        try:
            _insert(data, row, json.dumps(f"{row.kind} {row.id}"))
        except sqlite3.IntegrityError:
            _insert(data, replace(row, problem=row.problem or "its id comes twice", needs_label=False), None)

    def _label(self, data: sqlite3.Connection, label: Label) -> None:
        name = json.dumps(f"{label.kind} {label.id}")
        found = data.execute("SELECT number, value, problem, waits FROM rows WHERE name = ?", (name,)).fetchone()
        problem = "" if found is not None else "no row has the id that its label names"
        if found is not None and not found[3]:
            problem = "its id has two labels"
        if problem:
            _insert(data, OfficialRow(label.kind, label.id, (), label.value, problem), None)
            return
        number, value, before, _ = found
        value = json.dumps({**json.loads(value), **label.value})
        query = "UPDATE rows SET value = ?, problem = ?, waits = 0 WHERE number = ?"
        data.execute(query, (value, before or label.problem, number))


def _insert(data: sqlite3.Connection, row: OfficialRow, name: str | None) -> None:
    pictures = json.dumps([f"#{one:018d}" if isinstance(one, int) else f"/{one}" for one in row.pictures])
    values = (row.kind, json.dumps(row.id), pictures, json.dumps(row.value), row.problem, row.needs_label, name)
    data.execute(_INSERT, values)


def _picture(text: str) -> Picture:
    return int(text[1:]) if text.startswith("#") else text[1:]


def _row(pictures: tuple[Picture, ...], kind: str, id_: str, value: str, problem: str, waits: int) -> OfficialRow:
    fields: dict[str, Any] = json.loads(value)
    problem = problem or ("no label has its id" if waits else check(kind, fields))
    return OfficialRow(kind, json.loads(id_), pictures, fields, problem)
