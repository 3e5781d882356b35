"""What a person or a program reads from the command line: the one place that writes to stdout and stderr.

Names and texts come from data: they are shown as `printable` has them, and never taken for rich's markup.
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
    """Print what another program has printed, as far as it is text; nothing is added to it."""
    typer.echo(printable_lines(output), nl=False)


def say_json(tree: Any, indent: int | None = None) -> None:
    """Print JSON in ASCII: what a terminal would obey is an escape of JSON's own there, DEL too."""
    typer.echo(json.dumps(tree, indent=indent).replace("\x7f", "\\u007f"))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: object) -> Table:
    """A table of texts."""
    from rich.table import Table

    made = Table(*columns, title=cell(title, MAX_MESSAGE))
    for row in rows:
        made.add_row(*map(cell, row))
    return made


def cell(value: object, limit: int = MAX_NAME) -> Text:
    """A text as rich shows it; "[/x]" is three signs and a letter."""
    from rich.text import Text

    return Text(printable(value, limit))


def show_table(made: Table) -> None:
    """Print a table, as wide as the terminal; a pipe has no width to keep to."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=120)).print(made)
