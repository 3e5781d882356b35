"""The options that verbs share: one name, one meaning, one help text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from capfilt import presets

Out = Annotated[
    str,
    typer.Option("--out", help="The run folder, or its URL (s3://...). The same command on the same folder resumes."),
]
Fork = Annotated[
    str | None,
    typer.Option(
        "--fork", metavar="NEW_OUT", help="Begin a new run there that takes over from --out whatever is still valid."
    ),
]


def setting(help: str, form: str = "a.b=c") -> Any:
    """`--set`, which may be repeated; `help` says what may be set."""
    return typer.Option("--set", metavar=form, help=help)


Sets = Annotated[list[str] | None, setting("Override a key of the recipe.")]
Shards = Annotated[
    list[str],
    typer.Argument(help="Tars, or Parquet, pictures, datasets, JSON (docs/shards.md); folders, globs, URLs."),
]
_ADDRESSES = (
    "start: a new Ray on this machine; auto, HOST:PORT or ray://...: a running one; local: this process, no Ray;"
    " http://HEAD:8265: a cluster, as a job that outlives this command."
)
Address = Annotated[str, typer.Option(help=_ADDRESSES)]
SizedAddress = Annotated[
    str, typer.Option("--address", help=f"by-size: local where the work is small, else start; {_ADDRESSES}")
]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Number of workers; 0: as many as fit.")]
Cpus = Annotated[
    float | None, typer.Option("--cpus", min=0.01, help="CPUs of each worker [default: 1; with local, all].")
]
MinSuccess = Annotated[
    float,
    typer.Option(
        "--min-success", min=0, max=1, help="Exit with 1 if a smaller share of the samples succeeds, or if none does."
    ),
]
Price = Annotated[
    str | None,
    typer.Option(
        "--price",
        metavar="gpu=3.0,cpu=0.05",
        help="USD of a GPU-hour and of a CPU-hour: also say what it costs. Either may be left out; it is kept nowhere.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, to stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def recipe_of(verb: str) -> Any:
    """The argument that names a recipe of a verb."""
    return typer.Argument(help=f"A preset of pipelines/{verb}/, or a YAML.", autocompletion=preset_names(verb))


def preset_names(*folders: str) -> Callable[[str], list[str]]:
    """What a shell completes a recipe to: the presets of these folders of `pipelines/`, or of `models/`."""

    def complete(incomplete: str) -> list[str]:
        recipes = (name.partition("/") for name in presets.names("pipelines"))
        known = [short for folder, _, short in recipes if folder in folders]
        known += presets.names("models") if "models" in folders else []
        return [name for name in known if name.startswith(incomplete)]

    return complete
