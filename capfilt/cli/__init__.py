"""The command line: one function for each verb, which calls the public function of the same name.

torch and ray are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from capfilt import __version__
from capfilt.cli import data, first_hour, jobs, models, near, pipelines, run_folder
from capfilt.cli.terminal import say
from capfilt.cli.usage_errors import is_usage_error, usage_line

app = typer.Typer(
    name="capfilt",
    help="CapFilt (BLIP, 2022): clean web image-text pairs with the model being trained, in rounds, on Ray.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["--help", "-h"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

VERBS = (
    first_hour.init,
    first_hour.estimate,
    first_hour.doctor,
    pipelines.bootstrap,
    data.download,
    data.convert,
    data.pack,
    near.embed,
    near.dedup,
    near.index,
    near.retrieve,
    near.decontaminate,
    pipelines.pretrain,
    pipelines.finetune,
    pipelines.annotate,
    pipelines.select,
    models.evaluate,
    models.show,
    run_folder.report,
    run_folder.review,
    models.export,
    models.bench,
    models.world,
    jobs.jobs,
    run_folder.status,
    run_folder.verify,
    run_folder.explain,
)
"""In the order in which `--help` lists them."""

_SETTINGS = {
    "help_option_names": ["--help", "-h"],
    "token_normalize_func": lambda word: word.replace("_", "-"),  # users of img2dataset write --url_col
}

for _verb in VERBS:
    app.command(context_settings=_SETTINGS)(jobs.sendable(_verb))


@app.callback(invoke_without_command=True)
def _capfilt(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:  # an error of the argument parser is one line; without a verb it is the help
        if not is_usage_error(error):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
        else:
            say(f"error: {usage_line(error, sys.argv[1:], str(app.info.name))}", err=True)
        code = getattr(error, "exit_code", 2)
    sys.exit(code or 0)
