"""Results that are tables, as people read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from capfilt.reports.places import Place

_SHOWN = 20  # broken pieces that are named one by one


def print_rounds(summary: dict[str, Any]) -> None:
    """One row per round; a figure that was not measured is a dash."""
    from rich.table import Table

    columns = {
        "round": lambda r: str(r["round"]),
        "kept web": lambda r: _share(r, "web"),
        "kept synthetic": lambda r: _share(r, "synthetic"),
        "filter AUC": lambda r: _figure(r.get("filter", {}).get("auc"), 3),
        "precision": lambda r: _figure(r.get("filter", {}).get("precision"), 3),
        "recall": lambda r: _figure(r.get("filter", {}).get("recall"), 3),
        "TR@1": lambda r: _figure(r.get("retrieval", {}).get("tr@1"), 1),
        "IR@1": lambda r: _figure(r.get("retrieval", {}).get("ir@1"), 1),
        "CIDEr": lambda r: _figure(r.get("captioning", {}).get("cider"), 1),
        "seconds": lambda r: _figure(r["seconds"], 0),
    }
    table = Table(*columns, title="CapFilt by round")
    for entry in summary["rounds"]:
        table.add_row(*(column(entry) for column in columns.values()))
    _print(table)


def print_next(folder: Place, summary: dict[str, Any]) -> None:
    """The page of the run, and what to do next."""
    from capfilt.pipelines import report

    typer.echo(f"report      {folder / report.PAGE}")
    for what, command in report.next_steps(folder, summary):
        typer.echo(f"\n{what}:\n  {command}")


def _share(entry: dict[str, Any], source: str) -> str:
    noise = entry.get("noise_ratio", {}).get(source)
    return "-" if noise is None else f"{entry['kept'].get(source, 0)} ({1 - noise:.0%})"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_status(told: dict[str, Any]) -> None:
    """One row per stage, then why shards and samples failed."""
    from rich.table import Table

    table = Table("stage", "done", "per minute", "left", "samples failed", title=f"{told['run']}: {told['state']}")
    for stage in told["stages"]:
        rate, left = stage.get("per_second"), stage.get("seconds_left")
        table.add_row(
            stage["label"],
            f"{stage['done']}/{stage['total']} {stage['unit']}",
            "-" if rate is None else f"{60 * rate:.1f}",
            "-" if left is None or stage["done"] >= stage["total"] else _duration(left),
            str(stage["samples"].get("failed", 0)),
        )
    _print(table)
    for stage in told["stages"]:
        for kind in ("errors", "failed"):
            for reason, count in stage[kind].items():
                what = "shards failed" if kind == "errors" else "samples failed"
                typer.echo(f"{stage['label']}: {count} {what}: {reason}")


def print_verified(told: dict[str, Any]) -> None:
    """What was read, what does not hold, and what to do about it."""
    typer.echo(f"{told['shards']} pieces of work, {told['files']} files, {told['bytes']} bytes hold or are named below")
    if told["undone"]:
        typer.echo(f"{told['undone']} shards are not done yet: the same command goes on")
    for piece in told["broken"][:_SHOWN]:
        typer.echo(f"{piece['folder']}: {piece['stage']}, shard {piece['shard']}: {piece['why']}")
    if (more := len(told["broken"]) - _SHOWN) > 0:
        typer.echo(f"and {more} more; --json names all")
    if told["withdrawn"]:
        typer.echo(f"{told['withdrawn']} withdrawn: run the command that made them again, it does just these")
    elif told["broken"]:
        typer.echo(f"{len(told['broken'])} do not hold: `capfilt verify {told['run']} --mend`, then the same command")
    else:
        typer.echo("everything holds, and the balance too")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)  # a pipe has no width to keep to
