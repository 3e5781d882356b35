"""Runs a verb: prints its result, for a person or as JSON, and turns errors and signals into exit codes."""

from __future__ import annotations

import inspect
import logging
import signal
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from enum import Enum
from typing import TYPE_CHECKING, Any

import typer

from capfilt.api.results import leaves
from capfilt.cli.next_steps import print_steps
from capfilt.cli.tables import in_words
from capfilt.cli.terminal import say, say_json
from capfilt.errors import CapfiltError, ShortfallError
from capfilt.printable import MAX_MESSAGE, MAX_NAME, PrintableFormatter, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from capfilt.cli.next_steps import Step
    from capfilt.runs.progress import Progress


_NAMES = {"sets": "settings", "filter_": "filter", "scored": "scores"}
"""What the public functions call options whose own names are taken, or are plural there."""
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which a batch system sends some seconds before it kills: end as after Ctrl-C."""


def execute(
    work: Callable[[Progress], Any],
    as_json: bool,
    debug: bool,
    show_result: bool = True,
    then: Callable[[Any], Iterable[Step]] | None = None,
) -> Any:
    """Run a verb, print its result, and with `then` what may come next; returns the result. An error that its user can
    fix becomes one line and an exit code."""
    if logging.lastResort is not None:  # through which warnings go to stderr
        logging.lastResort.setFormatter(PrintableFormatter())
    received: list[int] = []
    with _signals(received):
        result, short = _answer(work, as_json, debug, received)
    if as_json:
        say_json(result, indent=1)
    elif show_result:
        for name, value in leaves(in_words(result)):
            text = f"{value:.4f}" if isinstance(value, float) else value
            say(f"{printable(name, MAX_NAME):<27}  {printable(text, MAX_MESSAGE - MAX_NAME - 2)}")
    if then is not None and not short and not as_json:
        with suppress(CapfiltError, OSError, LookupError):  # what is done does not fail by what may come next
            print_steps(list(then(result)))
    if short:
        say(f"error: {short}", err=True)
        raise typer.Exit(ShortfallError.exit_code)
    return result


def call(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    show: Callable[[Any], None] | None = None,
    then: Callable[[Any], Iterable[Step]] | None = None,
) -> None:
    """Call the public function of a verb with the options of its command line, which have the same names, and print
    the result's record, or for a person what `show` makes of the result.

    Args:
        given: the options by name. What is None is left to the function's default; `sets` are its `settings`.
    """
    plain = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
    options = {_NAMES.get(name, name): value for name, value in plain.items() if value is not None}
    as_json, debug = bool(options.pop("as_json")), bool(options.pop("debug"))

    def work(progress: Progress) -> Any:
        if shows := "on_progress" in inspect.signature(function).parameters:
            options["on_progress"] = progress
        verb = function.__name__.partition("_")[0]  # of export_data: export
        with nullcontext() if shows else progress.wait(f"{verb} is at work"):
            result = function(**options)
        if show is not None and not as_json:
            show(result)
        return result.record

    execute(work, as_json, debug, show is None, then)


def _answer(work: Callable[[Progress], Any], as_json: bool, debug: bool, received: list[int]) -> tuple[Any, str]:
    """The result of a verb, and the error message of a result that falls short ("" for none)."""
    from capfilt.runs.locking import lock
    from capfilt.runs.progress import Progress

    # Ray reports dead workers on stdout, where only the result belongs.
    output = redirect_stdout(sys.stderr) if as_json else nullcontext()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPTS)
        with output, lock.driving():
            return work(Progress(quiet=as_json)), ""
    except KeyboardInterrupt:
        say("interrupted: run the same command again to go on", err=True)
        raise typer.Exit(143 if received[:1] == [signal.SIGTERM] else 130) from None
    except CapfiltError as error:
        if isinstance(error, ShortfallError) and error.result is not None:
            return error.result, str(error)
        if debug:
            raise
        say(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:  # a full disk, a folder without permission: not our bug, so it is one line too
        if debug:
            raise
        say(f"error: {error}; nothing that was committed is lost, run the same command again", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _signals(received: list[int]) -> Iterator[None]:
    """SIGINT and SIGTERM interrupt, even if this process was started with them ignored or blocked, as CI runners, a
    shell's `&` and Ray's jobs do. `received` gets their numbers: Ray replaces what was raised by KeyboardInterrupt.
    """

    def interrupt(number: int, _frame: object) -> None:
        received.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if received.count(number) == 1:  # `timeout` and batch systems send it to the process and then to its group
            raise Terminated

    before = {number: signal.signal(number, interrupt) for number in _INTERRUPTS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
