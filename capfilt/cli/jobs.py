"""Verbs as jobs of a cluster: sent, watched, listed. `sendable` is what `--address http://...` does to a verb."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.cli.execute import Terminated, execute, read_recipe
from capfilt.cli.options import Debug, Json
from capfilt.cli.tables import print_jobs
from capfilt.cli.terminal import pass_on, say
from capfilt.errors import ClusterError, UsageError
from capfilt.printable import printable_lines

if TYPE_CHECKING:
    from capfilt.cluster.ray_jobs import Jobs
    from capfilt.config import Config
    from capfilt.pipelines.jobs import Order

SECOND_THOUGHTS = 5.0
"""Seconds after a Ctrl-C in which another one stops the job."""

LOOKS = ("status", "verify", "explain")
"""Verbs that look into a run folder, and may do so where it lies."""

_PATHS = {
    "out": "--out", "fork": "--fork", "run": "RUN", "shards": "SHARDS", "urls": "URLS", "model": "MODEL",
    "captioner": "--captioner", "filter_": "--filter", "annotations": "--annotations", "val": "--val",
}  # fmt: skip

Detach = Annotated[bool, typer.Option("--detach", help="With a cluster's http address: do not wait for the job's end.")]
There = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Look there: http://HEAD:8265; RUN is a path of that cluster."),
]
Dashboard = Annotated[str, typer.Option("--address", metavar="URL", help="The dashboard of a Ray head.")]


def jobs(
    job: Annotated[
        str | None, typer.Argument(help="A job to follow from its first line; without it, list all.")
    ] = None,
    address: Dashboard = "http://127.0.0.1:8265",
    stop: Annotated[bool, typer.Option("--stop", help="End the job; what it committed stays.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The commands that a cluster was sent by `--address http://...`: which, since when, how it ended.

    Leaves with the exit code of the job it followed. Ctrl-C leaves, and the job goes on; a second one ends the job.

    Example: `capfilt jobs --address http://head:8265`
    """
    codes: list[int] = []

    def work(_show: object) -> Any:
        from capfilt.cluster.ray_jobs import Jobs
        from capfilt.pipelines import jobs as pipeline

        if job is None:
            if stop:
                raise UsageError("--stop ends one job: name it. `capfilt jobs` lists them.")
            told = pipeline.run(address)
            if not as_json:
                print_jobs(told)
            return told
        cluster = Jobs(address)
        if stop:
            return pipeline.row(cluster.stop(job))
        return _watch(cluster, job, as_json, codes)

    execute(work, as_json, debug, show_result=stop)
    _leave(codes)


def sendable(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb that is sent to a cluster, as a Ray Job, where `--address` is the http address of its dashboard."""
    signature = inspect.signature(verb, eval_str=True)
    name = verb.__name__
    own: dict[str, tuple[Any, Any]]
    if name in LOOKS:
        own = {"address": (There, None)}
    elif "address" in signature.parameters and verb is not jobs:
        own = {"detach": (Detach, False)}
    else:
        return verb

    @functools.wraps(verb)
    def here_or_there(context: typer.Context, **given: Any) -> None:
        address = str(given.get("address") or "")
        if not address.startswith(("http://", "https://")):
            if given.get("detach") or (name in LOOKS and address):
                raise typer.BadParameter("it goes with a cluster's address, http://HEAD:8265.", context)
            verb(**{key: value for key, value in given.items() if key not in own})
            return
        _send(context, name, address)

    kind = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter("context", kind, annotation=typer.Context)]
    added += [inspect.Parameter(key, kind, annotation=of, default=value) for key, (of, value) in own.items()]
    kept = [parameter.replace(kind=kind) for parameter in signature.parameters.values()]
    here_or_there.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    here_or_there.__annotations__ = {each.name: each.annotation for each in [*kept, *added]}
    return here_or_there


def _send(context: typer.Context, verb: str, address: str) -> None:
    given = context.params
    as_json = bool(given["as_json"])
    codes: list[int] = []

    def work(_show: object) -> Any:
        from capfilt.cluster.ray_jobs import Jobs
        from capfilt.pipelines import jobs as pipeline

        order = _order(context, verb)
        cluster = Jobs(address)
        id, new = pipeline.send(cluster, order)
        if given.get("detach"):
            if not as_json:
                say(id)
            return {"job": id, "address": cluster.address}
        if verb not in LOOKS:
            _say(f"job {id} {'is sent' if new else 'is at work already'}; from anywhere: {_again(cluster, id)}")
        return _watch(cluster, id, as_json, codes, quiet=verb in LOOKS)

    execute(work, as_json, bool(given["debug"]), show_result=False)
    _leave(codes)


def _order(context: typer.Context, verb: str) -> Order:
    """What the command line asks for, with every path checked and the recipe resolved on this machine."""
    from capfilt.pipelines import jobs as pipeline

    given = context.params
    if "out" in given and given["out"] is None:
        raise UsageError("--out is needed: a job's paths are the cluster's. Give one that every machine there sees.")
    if given.get("watch"):
        raise UsageError(
            "--watch looks at a folder that this machine sees. With an http address look once, or follow the job: "
            "`capfilt jobs ID`."
        )
    pipeline.check_places({_PATHS[name]: given[name] for name in _PATHS if given.get(name)})
    recipe = None
    if given.get("recipe") is not None:
        recipe = _recipe(verb, given)
        pipeline.check_places(pipeline.places(recipe))
    words = _words(context, {"address", "detach", *(("recipe", "sets", "rounds") if recipe else ())})
    if verb not in LOOKS:
        words = ["--address", "auto", *words]
    if recipe is not None:
        named = {parameter.name: parameter.param_type_name for parameter in context.command.params}["recipe"]
        words = [*words, pipeline.RECIPE] if named == "argument" else ["--recipe", pipeline.RECIPE, *words]
    return pipeline.Order(verb, tuple(words), str(given.get("fork") or given.get("out") or ""), recipe)


def _recipe(verb: str, given: dict[str, Any]) -> Config:
    from capfilt.pipelines.inspect import show

    own = [] if given.get("rounds") is None else [f"rounds={given['rounds']}"]
    return read_recipe(verb, given["recipe"], show.KINDS[verb][0], [*(given["sets"] or ()), *own])


def _words(context: typer.Context, without: set[str]) -> list[str]:
    """The command line again, options first, less what is left out and what was not given."""
    options: list[str] = []
    arguments: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name in without or source is None or source.name == "DEFAULT":
            continue
        value = context.params[name]
        values = [str(each) for each in (value if isinstance(value, list | tuple) else [value])]
        if parameter.param_type_name == "argument":
            arguments += values
        elif getattr(parameter, "is_flag", False):
            options += [parameter.opts[0]] if value else []
        else:
            options += [word for each in values for word in (parameter.opts[0], each)]
    return [*options, *(["--"] if any(word.startswith("-") for word in arguments) else []), *arguments]


def _watch(cluster: Jobs, id: str, as_json: bool, codes: list[int], quiet: bool = False) -> Any:
    """Show a job's log until it ends; what it printed as its result, and in `codes` the code to leave with.

    `quiet`: only what the command itself said, in the end.
    """
    from capfilt.pipelines import jobs as pipeline

    log: list[str] = []
    try:
        for text in cluster.follow(id, _say):
            log.append(text)
            if not quiet:
                pass_on(text)
    except KeyboardInterrupt as interrupt:
        codes.append(143 if isinstance(interrupt, Terminated) else 130)
        if isinstance(interrupt, Terminated) or not _stopped(cluster, id):
            _say(f"{id} goes on; {_again(cluster, id)} follows it again")
        raise typer.Exit(codes[0]) from None
    if quiet and not as_json:
        pass_on(pipeline.own_words(log))
    job = cluster.get(id)
    if job.state == "stopped":
        _say(f"{id} was stopped: the same command goes on from what it committed")
        codes.append(143)
    elif job.code is None:
        raise ClusterError(f"{id} {job.state}: {job.message} The same command goes on from what it committed.")
    else:
        codes.append(job.code if job.code >= 0 else 128 - job.code)
    result = pipeline.result_of(log) if as_json else None
    if as_json and result is None:
        if quiet:
            typer.echo(printable_lines(pipeline.own_words(log)).strip(), err=True)
        else:
            _say(f"{id} was sent without --json, or came to no result")
        raise typer.Exit(codes[0])
    return result


def _stopped(cluster: Jobs, id: str) -> bool:
    """Whether a second Ctrl-C came, which stops the job."""
    try:  # the second may come while this is being said
        _say(f"Ctrl-C again within {SECOND_THOUGHTS:.0f} s stops {id}; else it goes on without you")
        time.sleep(SECOND_THOUGHTS)
    except Terminated:
        return False
    except KeyboardInterrupt:
        _say(f"stopping {id}")
        _say(f"{id} {cluster.stop(id).state}: the same command goes on from what it committed")
        return True
    return False


def _again(cluster: Jobs, id: str) -> str:
    return f"`capfilt jobs {id} --address {cluster.address}`"


def _say(text: str) -> None:
    say(text, err=True)


def _leave(codes: Iterable[int]) -> None:
    for code in codes:
        if code:
            raise typer.Exit(code)
