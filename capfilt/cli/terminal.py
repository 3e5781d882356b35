"""Output of the command line: the one place that writes to stdout and stderr.

Names and texts come from data: they are made printable, and rich never takes them for markup.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from capfilt.printable import MAX_MESSAGE, MAX_NAME, printable, printable_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table
    from rich.text import Text


def say(line: object, err: bool = False) -> None:
    """Print one line, to stdout, or to stderr with `err`."""
    typer.echo(printable(line, MAX_MESSAGE), err=err)


def pass_on(output: str) -> None:
    """Print the output of another program, made printable, with nothing added."""
    typer.echo(printable_lines(output), nl=False)


def say_json(tree: Any, indent: int | None = None) -> None:
    """Print JSON in ASCII, so that control characters, DEL too, are JSON escapes that no terminal obeys."""
    typer.echo(json.dumps(tree, indent=indent).replace("\x7f", "\\u007f"))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: object) -> Table:
    from rich.table import Table

    result = Table(*columns, title=cell(title, MAX_MESSAGE))
    for row in rows:
        result.add_row(*map(cell, row))
    return result


def cell(value: object, limit: int = MAX_NAME) -> Text:
    """A text for rich, without markup: "[/x]" is four characters."""
    from rich.text import Text

    return Text(printable(value, limit))


def show_table(table: Table) -> None:
    """Print a table as wide as the terminal; into a pipe, 120 characters wide."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
