"""Verbs as jobs of a cluster: send, follow, list. `sendable` adds `--address http://...` to a verb."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capfilt.api.arguments import POLICY_OPTIONS, policy, read_recipe
from capfilt.cli.execute import Terminated, execute
from capfilt.cli.options import Debug, Json
from capfilt.cli.tables import print_jobs
from capfilt.cli.terminal import pass_on, say
from capfilt.errors import ClusterError, UsageError
from capfilt.printable import printable_lines

if TYPE_CHECKING:
    from capfilt.cluster.ray_jobs import Jobs
    from capfilt.config import Config
    from capfilt.pipelines.jobs import JobRequest

STOP_SECONDS = 5.0
"""Seconds after a Ctrl-C in which a second one stops the job."""

INSPECTING = ("status", "verify", "explain")
"""Verbs that only read a run folder; on a cluster their output is all that is shown."""

HERE = ("jobs", "init", "estimate", "doctor")
"""Verbs with an `--address` that are never sent as jobs: they are about this machine, or ask the cluster themselves."""

_PATH_OPTIONS = {
    "out": "--out", "fork": "--fork", "run": "RUN", "shards": "SHARDS", "urls": "URLS", "files": "FILES",
    "images": "--images", "model": "MODEL", "source": "MODEL|DATA", "captioner": "--captioner", "filter_": "--filter",
    "annotations": "--annotations", "val": "--val", "without": "--without", "embeddings": "EMBEDDINGS",
    "scored": "--scores", "against": "--against", "data": "DATA",
}  # fmt: skip

Detach = Annotated[
    bool, typer.Option("--detach", help="With a cluster's http address: do not wait until the job ends.")
]
There = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="Read it on a cluster: http://HEAD:8265; RUN is a path there."),
]
Dashboard = Annotated[str, typer.Option("--address", metavar="URL", help="The dashboard of a Ray head.")]


def jobs(
    job: Annotated[
        str | None, typer.Argument(help="A job to follow from its first line; without it, list all.")
    ] = None,
    address: Dashboard = "http://127.0.0.1:8265",
    stop: Annotated[bool, typer.Option("--stop", help="Stop the job; what it committed stays.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the commands that were sent to a cluster by `--address http://...`, or follow one.

    Exits with the exit code of the job it followed. After Ctrl-C the job goes on; a second Ctrl-C stops it.

    Example: `capfilt jobs --address http://head:8265`
    """
    codes: list[int] = []

    def work(_show: object) -> Any:
        from capfilt.cluster.ray_jobs import Jobs
        from capfilt.pipelines import jobs as pipeline

        if job is None:
            if stop:
                raise UsageError("--stop ends one job: name it. `capfilt jobs` lists them.")
            result = pipeline.run(address)
            if not as_json:
                print_jobs(result)
            return result
        cluster = Jobs(address)
        if stop:
            return pipeline.job_record(cluster.stop(job))
        return _watch(cluster, job, as_json, codes)

    execute(work, as_json, debug, show_result=stop)
    _leave(codes)


def sendable(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, sent to a cluster as a Ray job if `--address` is the http address of its dashboard.

    A verb with a parameter `context` gets the context of its command line.
    """
    signature = inspect.signature(verb, eval_str=True)
    name = verb.__name__
    options: dict[str, tuple[Any, Any]]
    """The options added to the verb's: their types and defaults, by name."""
    if name in INSPECTING:
        options = {"address": (There, None)}
    elif "address" in signature.parameters and name not in HERE:
        options = {"detach": (Detach, False)}
    else:
        return verb

    @functools.wraps(verb)
    def here_or_there(context: typer.Context, **given: Any) -> None:
        address = str(given.get("address") or "")
        if not address.startswith(("http://", "https://")):
            if given.get("detach") or (name in INSPECTING and address):
                what = "--detach" if given.get("detach") else f"--address {address}"
                raise typer.BadParameter(f"{what}: it goes with the address of a cluster, http://HEAD:8265.", context)
            wants = {"context": context} if "context" in signature.parameters else {}
            verb(**wants, **{key: value for key, value in given.items() if key not in options})
            return
        _send(context, name, address)

    kind = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter("context", kind, annotation=typer.Context)]
    added += [inspect.Parameter(key, kind, annotation=of, default=value) for key, (of, value) in options.items()]
    kept = [each.replace(kind=kind) for name, each in signature.parameters.items() if name != "context"]
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

        request = _request(context, verb)
        cluster = Jobs(address)
        id, new = pipeline.send(cluster, request)
        if given.get("detach"):
            if not as_json:
                say(id)
            return {"job": id, "address": cluster.address}
        if verb not in INSPECTING:
            _say(f"job {id} {'is sent' if new else 'is at work already'}; from anywhere: {_again(cluster, id)}")
        return _watch(cluster, id, as_json, codes, quiet=verb in INSPECTING)

    execute(work, as_json, bool(given["debug"]), show_result=False)
    _leave(codes)


def _request(context: typer.Context, verb: str) -> JobRequest:
    """The command line as a request, with every path checked and the recipe resolved on this machine."""
    from capfilt.pipelines import jobs as pipeline

    given = context.params
    if "out" in given and given["out"] is None and verb not in INSPECTING:
        raise UsageError("--out is needed: a job's paths are the cluster's. Give one that every machine there sees.")
    if given.get("watch"):
        raise UsageError(
            "--watch looks at a folder that this machine sees. With an http address leave it out, or follow the job: "
            "`capfilt jobs ID`."
        )
    pipeline.check_absolute({_PATH_OPTIONS[name]: given[name] for name in _PATH_OPTIONS if given.get(name)})
    pipeline.check_absolute(_paths_of_scores(given))
    recipe = None
    if given.get("recipe") is not None:
        recipe = _recipe(verb, given)
        pipeline.check_absolute(pipeline.external_paths(recipe))
    resolved = ("recipe", "sets", "rounds", *(POLICY_OPTIONS if verb == "select" else ()))
    words = words_of(context, {"address", "detach", *(resolved if recipe else ())})
    if verb not in INSPECTING:
        words = ["--address", "auto", *words]
    if recipe is not None:
        named = {parameter.name: parameter.param_type_name for parameter in context.command.params}["recipe"]
        words = [*words, pipeline.RECIPE] if named == "argument" else ["--recipe", pipeline.RECIPE, *words]
    return pipeline.JobRequest(verb, tuple(words), str(given.get("fork") or given.get("out") or ""), recipe)


def _paths_of_scores(given: dict[str, Any]) -> dict[str, list[str]]:
    from capfilt.inference.scores.spec import paths_of

    options = {"--scores": given.get("scores"), "--add-score": given.get("add_score")}
    return {option: [path for text in texts for path in paths_of(text)] for option, texts in options.items() if texts}


def _recipe(verb: str, given: dict[str, Any]) -> Config:
    from capfilt.pipelines.inspect import show

    if verb == "select":
        options = {key: given[key] for key in POLICY_OPTIONS}
        calibration = (given["val"], given["filter_"])
        return policy(given["recipe"], options, given["sets"] or (), given["calibrate"] is not None, calibration)
    rounds = [] if given.get("rounds") is None else [f"rounds={given['rounds']}"]
    return read_recipe(verb, given["recipe"], show.KINDS[verb][0], [*(given["sets"] or ()), *rounds])


def words_of(context: typer.Context, without: set[str]) -> list[str]:
    """The words of the command line again, options first, without the options in `without`."""
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
    """Show a job's log until it ends; returns the result it printed, and adds the exit code to `codes`.

    With `quiet` only the command's own output is shown, at the end.
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
        pass_on(pipeline.command_output(log))
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
            typer.echo(printable_lines(pipeline.command_output(log)).strip(), err=True)
        else:
            _say(f"{id} was sent without --json, or came to no result")
        raise typer.Exit(codes[0])
    return result


def _stopped(cluster: Jobs, id: str) -> bool:
    """Wait for a second Ctrl-C, which stops the job; returns whether it came."""
    try:  # it may come while the line is printed
        _say(f"Ctrl-C again within {STOP_SECONDS:.0f} s stops {id}; else it goes on without you")
        time.sleep(STOP_SECONDS)
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
