"""Messages for invalid command lines: the problem, the nearest flag or command, and where to find help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from upop.plain import plain


def print_misuse(error: typer.TyperException) -> int:
    """Print the problem of a command line to standard error; return the exit code."""
    context: typer.Context | None = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command prints its help
        print(error.format_message())
        return 0
    print(plain(f"Error: {_message(error, context)}"), file=sys.stderr)
    usage = f"{context.get_usage()}\n" if context is not None else ""
    path = context.command_path if context is not None else Path(sys.argv[0]).name
    print(f"{usage}Try '{path} --help'.", file=sys.stderr)
    return error.exit_code


def _message(error: typer.TyperException, context: typer.Context | None) -> str:
    from upop.errors import nearest

    message = error.format_message().replace("Value error, ", "").rstrip(".")
    parameter: Any = getattr(error, "param", None)
    unknown = getattr(error, "option_name", None)
    if context is not None and unknown is not None and message.startswith("No such option"):
        known = [flag for other in context.command.params for flag in _flags(other) if not _hidden(other)]
        return f"No such option: {unknown}{nearest(unknown, known)}."
    if message.startswith("Missing") and getattr(parameter, "help", None):
        return f"{message}. {parameter.help}"
    typed = _typed(parameter)
    return f"{message}; found {typed!r}." if typed is not None and repr(typed) not in message else f"{message}."


def _typed(parameter: Any) -> str | None:
    """Return the value after a flag on the command line, if found."""
    for place, word in enumerate(sys.argv):
        flag, equals, value = word.partition("=")
        if flag in _flags(parameter):
            return value if equals else next(iter(sys.argv[place + 1 :]), None)
    return None


def _flags(parameter: Any) -> list[str]:
    return [flag for flag in getattr(parameter, "opts", ()) if flag.startswith("-")]


def _hidden(parameter: Any) -> bool:
    return bool(getattr(parameter, "hidden", False))
