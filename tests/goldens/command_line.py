"""What the command line offers, prints and ends with. As a program it prints the help of every verb."""

from __future__ import annotations

import io
import re
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from typing import Any

USAGE = (
    "", "--version", "--help", "annotat", "show", "show demi", "show demo --set sede=1", "show demo --set seed",
    "show demo --set rounds=many", "show demo extra", "show absent.yaml", "bootstrap --ruonds 1",
    "bootstrap --rounds -1", "pretrain blip-tiny", "pretrain --no-such-option", "select s --annotations a",
    "annotate s --captioner c --filter f --out o --workers -2", "evaluate m s --out o --cpus 0",
    "download l --out o --workers -2", "status absent", "verify absent", "explain absent key", "report absent",
    "export absent --out x", "bench nothing",
)  # fmt: skip
"""They end before any work. What each says may be worded anew, its exit code may not change."""


def pages() -> str:
    """`--help` of the program and of every verb, without the frames around it."""
    result = []
    for verb in ("", *_commands()):
        lines = [re.sub(r"  +", "  ", line.strip(" │╭╮╰╯─")) for line in run(verb, "--help")[1].splitlines()]
        page = "".join(f"{line}\n" for line in lines if line)
        result.append(f"$ {' '.join(['capfilt', *[verb] * bool(verb), '--help'])}\n{page}")
    return "".join(result)


def options() -> str:
    """Every argument and option of every verb: what scripts rely on, without the prose."""
    return "".join(
        f"capfilt {verb} {_option(param)}\n" for verb, command in _commands().items() for param in command.params
    )


def exit_codes() -> str:
    """The exit code of command lines that end before any work, and where they say why."""
    lines = []
    for line in USAGE:
        with tempfile.TemporaryDirectory() as empty, chdir(empty):
            code, out, err = run(*line.split())
        where = "+".join([*["stdout"] * bool(out), *["stderr"] * bool(err)])
        lines.append(f"{code} {where:<6} capfilt {line}".rstrip())
    return "".join(f"{line}\n" for line in lines)


def run(*words: str) -> tuple[int, str, str]:
    """How `capfilt WORDS` ends, and what it prints, as its entry point would."""
    from capfilt.cli import main

    before, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["capfilt", *(word for word in words if word)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as left:
        return int(left.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the entry point came back")


def _commands() -> dict[str, Any]:
    from typer.main import get_command

    from capfilt.cli import app

    commands: dict[str, Any] = vars(get_command(app))["commands"]
    return commands


def _option(param: Any) -> str:
    annotation = param.type_descriptor.annotation
    kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if members := getattr(annotation, "__members__", None):
        kind = "|".join(str(member.value) for member in members.values())
    facts = {
        "required": param.required,
        "default": getattr(param.default, "value", param.default),
        "min": param.min,
        "max": param.max,
        "multiple": param.multiple or param.nargs == -1,
        "envvar": param.envvar,
        "hidden": getattr(param, "hidden", False),
    }
    answer = [f"{name}={value}" for name, value in facts.items() if value is not None and value is not False]
    return " ".join(["/".join([*param.opts, *param.secondary_opts]), kind, *answer])


if __name__ == "__main__":
    sys.stdout.write(pages())
