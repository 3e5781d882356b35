"""Results of verbs as tables and lines for a person."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from capfilt.cli.next_steps import print_steps
from capfilt.cli.terminal import cell, say, say_json, show_table, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.table import Table

    from capfilt.api.near import RetrieveResult
    from capfilt.storage.paths import StoragePath

_MAX_NAMED = 20  # broken shards that are named one by one


def print_neighbours(result: RetrieveResult) -> None:
    """One row per picture, the nearest first."""
    rows = [
        [str(place), f"{hit.cosine:.4f}", hit.key, hit.shard, hit.uid] for place, hit in enumerate(result.rows(), 1)
    ]
    show_table(table(["", "cosine", "key", "shard", "uid"], rows, result.record["query"]))
    if result.page is not None:
        say(f"page: {result.page}")


def print_rounds(summary: dict[str, Any]) -> None:
    """One row per round; a figure that was not measured is a dash. Then the figures of each stage of a BLIP-2."""
    from capfilt.reporting.collect import stage_lines

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
    rows = [[column(entry) for column in columns.values()] for entry in summary["rounds"]]
    show_table(table(list(columns), rows, "CapFilt by round"))
    for entry in summary["rounds"]:
        for line in stage_lines(entry):
            say(line)
    _print_tasks(summary["rounds"])


def _print_tasks(rounds: list[dict[str, Any]]) -> None:
    """One row per downstream task, one column per round; nothing where no task was measured."""
    from capfilt.runs.round_figures import TASK_FIGURES, trivial

    rows = []
    for task, shown in TASK_FIGURES.items():
        measured = [entry.get("tasks", {}).get(task, {}) for entry in rounds]
        values = [figures.get(shown.key) for figures in measured]
        if any(value is not None for value in values):
            without = trivial(task, measured[-1])
            gain = "-" if None in (values[0], values[-1]) else f"{values[-1] - values[0]:+.1f}"
            rows.append([shown.label, _figure(without, 1), *(_figure(value, 1) for value in values), gain])
    if rows:
        columns = ["task", "no picture", *(f"round {entry['round']}" for entry in rounds), "change"]
        show_table(table(columns, rows, "Downstream tasks by round"))


def print_next(folder: StoragePath, summary: dict[str, Any]) -> None:
    """The page of the run, and the commands that may come next."""
    from capfilt.reporting import collect

    say(f"report      {folder / collect.PAGE}")
    print_steps(collect.next_steps(folder, summary))


def _share(entry: dict[str, Any], source: str) -> str:
    noise = entry.get("noise_ratio", {}).get(source)
    return "-" if noise is None else f"{entry['kept'].get(source, 0)} ({1 - noise:.0%})"


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def in_words(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a verb for a person: what a stage used in one line."""
    used = record.get("usage")
    return {**record, "usage": {stage: _usage_words(one) for stage, one in used.items()}} if used else record


def _usage_words(usage: dict[str, Any]) -> str:
    speed = usage.get("images_per_second_per_worker")
    parts = [] if speed is None else [f"{speed:,.1f} images/s per worker"]
    for kind in ("cpu", "gpu"):
        seconds = usage[f"{kind}_seconds"]
        if seconds["reserved"] or kind == "cpu":
            parts.append(f"{kind.upper()}-seconds {seconds['reserved']:,.1f} reserved, {seconds['busy']:,.1f} busy")
    return "; ".join(parts)


def print_cost(record: dict[str, Any]) -> None:
    """What a run costs, where a price was given."""
    from capfilt.runs.cost import lines

    for line in lines(record["cost"]) if "cost" in record else ():
        say(line)


def print_estimate(record: dict[str, Any]) -> None:
    """A line for each figure, with its 95 % interval."""
    drawn = record["drawn"]
    say(
        f"{drawn['drawn']:,} samples drawn from {drawn['shards_read']:,} of {drawn['shards']:,} shards (seed"
        f" {drawn['seed']}); with 95 % intervals, for all of them on {record['workers']} workers:"
    )
    forms: dict[str, Callable[[float], str]] = {
        "kept": lambda x: f"{x:.1%}", "noise": lambda x: f"{x:.1%}", "failed": lambda x: f"{x:.2%}",
        "hours": lambda x: f"{x:,.3g} h", "usd": lambda x: f"{x:,.4g} USD", "bytes": lambda x: f"{x / 1e9:,.3g} GB",
        "images": lambda x: f"{x:,.1f}", "samples": lambda x: f"{x:,.0f}",
    }  # fmt: skip
    for name, figure in record.items():
        form = next((form for begin, form in forms.items() if name.startswith(begin)), None)
        if form is None or not isinstance(figure, dict) or "value" not in figure:
            continue
        say(f"{name:<38} {form(figure['value'])}{_between(figure, form)}")
    for stage, seconds in record["start_up_seconds"].items():
        say(f"{'start-up of ' + stage:<38} {seconds:,.1f} s, in the hours above")
    if missing := record.get("unpriced"):
        say(f"no cost: --price does not say what an hour of {' and '.join(missing)} costs")
    say(f"{'report':<38} {record['report']}")
    for name in ("precision", "recall") if "clicks" in record else ():
        figure = dict(zip(("low", "high"), record["clicks"].get(f"{name}_interval", (0, 1)), strict=True))
        value = record["clicks"].get(name)
        known = "not known" if value is None else f"{value:.1%}{_between(figure, '{:.1%}'.format)}"
        say(f"{name:<38} {known}, from {record['clicks']['labels']} labels")


def _between(figure: dict[str, float], form: Callable[[float], str]) -> str:
    ends = [form(figure[end]) if end in figure else "" for end in ("low", "high")]
    if all(ends):
        return " (exactly)" if figure["low"] == figure["high"] else f" ({ends[0]} to {ends[1]})"
    return f" (at {'least' if ends[0] else 'most'} {ends[0] or ends[1]})" if any(ends) else ""


def print_status(status: dict[str, Any]) -> None:
    """One row per stage, what each used, then why shards and samples failed, and what all of it costs."""
    for each in _status_tables(status):
        show_table(each)
    for line in _notes(status):
        say(line)


def watch_status(statuses: Iterable[dict[str, Any]], as_json: bool) -> None:
    """The same, drawn anew for each status; without a terminal, one line for each stage that has progressed."""
    from rich.console import Console, Group
    from rich.live import Live

    console = Console()
    if as_json:
        for status in statuses:
            say_json(status)
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for status in statuses:
                live.update(Group(*_status_tables(status), *map(cell, _notes(status))), refresh=True)
    else:
        _print_changes(statuses)


def _print_changes(statuses: Iterable[dict[str, Any]]) -> None:
    before: dict[str, Any] = {}
    for status in statuses:
        for stage in status["stages"]:
            name = f"{stage['folder']}/{stage['stage']}"
            if before.get(name) != stage["done"]:
                label, done, rate, left, failed = _cells(stage)
                say(f"{label:<24} {done}  {rate} per minute  {left} left  {failed} samples failed")
            before[name] = stage["done"]
        if before.get("") != status["state"]:
            say(f"{status['run']}: {status['state']}")
        before[""] = status["state"]


def _status_tables(status: dict[str, Any]) -> list[Table]:
    columns, stages = ("stage", "done", "per minute", "left", "samples failed"), status["stages"]
    title = f"{status['run']}: {status['state']}"
    return [table(columns, [_cells(stage) for stage in stages], title), *_usage_tables(status)]


def _usage_tables(status: dict[str, Any]) -> list[Table]:
    """What each stage used and, with a price, what that costs; none where nothing was measured."""
    from capfilt.runs.cost import table_of_usage

    headings, rows = table_of_usage([stage for stage in status["stages"] if "usage" in stage])
    return [table(headings, rows, "What the workers used")] if rows else []


def _notes(status: dict[str, Any]) -> list[str]:
    from capfilt.runs.cost import lines

    return [*_failures(status), *(lines(status["cost"]) if "cost" in status else ())]


def _cells(stage: dict[str, Any]) -> tuple[str, ...]:
    from capfilt.runs.progress import duration

    rate, left = stage.get("per_second"), stage.get("seconds_left")
    return (
        stage["label"],
        f"{stage['done']}/{stage['total']} {stage['unit']}",
        "-" if rate is None else f"{60 * rate:.1f}",
        "-" if left is None or stage["done"] >= stage["total"] else duration(left),
        str(stage["samples"].get("failed", 0)),
    )


def _failures(status: dict[str, Any]) -> list[str]:
    return [
        f"{stage['label']}: {count} {what}: {reason}"
        for stage in status["stages"]
        for kind, what in (("errors", "shards failed"), ("failed", "samples failed"))
        for reason, count in stage[kind].items()
    ]


def print_jobs(result: dict[str, Any]) -> None:
    """One row per job, the newest last."""
    from capfilt.runs.progress import duration

    rows = []
    for job in result["jobs"]:
        state = job["state"] if job.get("exit_code") in (None, 0) else f"{job['state']} ({job['exit_code']})"
        began, ended = job.get("began"), job.get("ended")
        took = "-"
        if began:
            until = datetime.fromisoformat(ended) if ended else datetime.now(UTC)
            took = duration((until - datetime.fromisoformat(began)).total_seconds())
        began = began[:16].replace("T", " ") if began else "-"
        rows.append((job["id"], job["verb"], job["out"] or "-", state, began, took))
    columns = ("job", "verb", "out", "state", "began (UTC)", "took")
    show_table(table(columns, rows, f"jobs of {result['address']}"))


def print_verified(result: dict[str, Any]) -> None:
    """What was read, what does not match its record, and what to do about it."""
    say(f"read {result['files']:,} files of {result['shards']:,} pieces of work, {result['bytes']:,} bytes")
    for stage, members in result["members"].items():
        say(_members_line(stage, members))
    if result["undone"]:
        say(f"{result['undone']} shards are not done yet: the same command goes on")
    for piece in result["broken"][:_MAX_NAMED]:
        say(f"{piece['folder']}: {piece['stage']}, shard {piece['shard']}: {piece['why']}")
    if (more := len(result["broken"]) - _MAX_NAMED) > 0:
        say(f"and {more} more; --json names all")
    if result["withdrawn"]:
        say(f"{result['withdrawn']} withdrawn: run the command that made them again, it does just these")
    elif result["broken"]:
        broken = len(result["broken"])
        say(f"{broken} are not as committed: `capfilt verify {result['run']} --mend`, then the same command")
    else:
        say("everything is as it was committed, and the counts add up")
    if "inputs" in result:
        _print_inputs(result["inputs"])


def _members_line(stage: str, members: dict[str, int]) -> str:
    """`annotate: 9 members of its shards = 6 used + 1 carried + 2 skipped (2 a folder)`."""
    skipped = {why: num for why, num in sorted(members.items()) if num and why not in ("in", "used", "carried")}
    why = f" ({', '.join(f'{num} {why}' for why, num in skipped.items())})" if skipped else ""
    used, carried = members.get("used", 0), members.get("carried", 0)
    return (
        f"{stage}: {members['in']} members of its shards = {used} used + {carried} carried"
        f" + {sum(skipped.values())} skipped{why}"
    )


def _print_inputs(result: dict[str, Any]) -> None:
    for piece in result["changed"][:_MAX_NAMED]:
        say(f"input of {piece['stage']}, shard {piece['shard']}: {piece['why']}")
    unknown = f", of {result['unrecorded']} nothing was recorded" if result["unrecorded"] else ""
    say(f"{result['compared']} inputs compared{unknown}, {len(result['changed'])} are not what was read")


def print_contamination(record: dict[str, Any]) -> None:
    """What the self-test finds, a row for each kind of copy; then one row for each held-out set."""
    tests = record["self_test"]
    copies = dict.fromkeys(copy for test in tests.values() for copy in test["recall"])
    if copies:
        rows = [[copy, *(f"{test['recall'][copy]:.1%}" for test in tests.values())] for copy in copies]
        rows.append(["another picture as near", *(f"{test['confused']:.1%}" for test in tests.values())])
        show_table(table(["copies of held-out pictures", *tests], rows, "What would be found"))
    kinds = dict.fromkeys(kind for each in record["sets"].values() for kind in each["samples"])
    rows = [
        [
            name,
            f"{each['pictures']:,}",
            f"{each['in_pool']:,}",
            *(f"{each['samples'].get(kind, 0):,}" for kind in kinds),
        ]
        for name, each in record["sets"].items()
    ]
    columns = ["held-out set", "pictures", "in the pool", *(f"samples by {kind}" for kind in kinds)]
    show_table(table(columns, rows, "What was found"))
    say(f"short texts  {record['short_texts']:,} samples have a held-out text of too few words to count")
