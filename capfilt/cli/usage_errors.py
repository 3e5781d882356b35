"""What typer's parser has against a command line, in one line as all other errors have it.

Typer carries a copy of click whose classes are private, so an error is known by the name of its class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from capfilt.errors import did_you_mean
from capfilt.printable import MAX_NAME, printable


def is_usage_error(error: Exception) -> bool:
    """Whether an exception is one of the parser's, for a person to read."""
    return hasattr(error, "format_message") and hasattr(error, "show")


def usage_line(error: Any, words: Sequence[str], program: str) -> str:
    """What was found, what is allowed, what to do; `words` is the command line after the program's name."""
    context = getattr(error, "ctx", None)
    where = program if context is None else context.command_path
    sentence = _sentence(error, context, [word.replace("_", "-") for word in words]).rstrip(".")
    end = "" if sentence.endswith("?") else "."
    return f"{sentence}{end} `{where} --help` lists what is allowed."


def _sentence(error: Any, context: Any, words: Sequence[str]) -> str:
    kind, message = type(error).__name__, str(error.format_message())
    if kind == "NoSuchOption":
        options = [option for param in context.command.params for option in param.opts if option.startswith("--")]
        return f"there is no option {printable(error.option_name, MAX_NAME)}.{did_you_mean(error.option_name, options)}"
    if match := re.match(r"No such command '(.*?)'\.", message):
        commands = [*context.command.commands]
        name = printable(match[1], MAX_NAME)
        return f"there is no command '{name}'.{did_you_mean(name, commands)} There are: {', '.join(commands)}"
    if kind == "MissingParameter" and error.param is not None:
        help_text = " ".join(str(error.param.help or "").split())
        return f"{_name(error.param)} is missing{f': {help_text}' if help_text else ''}"
    if kind == "BadOptionUsage" and "requires an argument" in message:
        return f"{error.option_name} is without a value"
    if kind == "BadParameter" and error.param is not None:
        return _of_value(error, words)
    if match := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", message):
        return f"{printable(match[1], MAX_NAME)!r} is more than the arguments that it takes"
    message = message.removeprefix("Invalid value: ")
    return message[:1].lower() + message[1:]


def _of_value(error: Any, words: Sequence[str]) -> str:
    """`--captions is 0: Input should be greater than or equal to 1`, as errors of recipes have it."""
    name, message = _name(error.param), str(error.message).removeprefix("Value error, ")
    given = _given(error.param.opts, words)
    if match := re.fullmatch(r"'(.*)' is not one of (.*?)\.?", message):
        given, allowed = match[1], re.findall(r"'([^']*)'", match[2])
        message = f"allowed is {' or '.join(allowed)}.{did_you_mean(match[1], allowed)}"
    if given is None:
        return f"{name}: {message}"
    shown = printable(given, MAX_NAME)
    return f"{name} is {shown if re.fullmatch(r'[-+.0-9]+', shown) else repr(shown)}: {message}"


def _name(param: Any) -> str:
    options = [option for option in param.opts if option.startswith("-")]
    return options[0] if options else str(param.name).upper()


def _given(options: Sequence[str], words: Sequence[str]) -> str | None:
    """The value of an option as it was written, the last one where there are several; None for an argument's."""
    value = None
    for i, word in enumerate(words):
        option, equals, text = word.partition("=")
        if option in options and option.startswith("-"):
            value = text if equals else words[i + 1] if i + 1 < len(words) else None
    return value
