"""Formats `--help`: flags, defaults and examples without truncation, in at most 80 columns."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_WIDEST, _NARROWEST = 80, 40
_COLUMN = 26
"""Column of the descriptions; below a longer flag they start on a new line."""


class InterruptedCommandError(Exception):
    """Ctrl-C ended a command; the message, if any, says what was saved."""


class Command(TyperCommand):
    """A command of upop."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; turn an interrupt into an error that keeps its message, which typer would drop."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise InterruptedCommandError(*error.args) from error

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the usage line after the command's name."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def get_help(self, ctx: Any) -> str:
        """Return the help."""
        return _help(self, ctx)


class Group(TyperGroup):
    """A group of commands."""

    def summary(self, name: str) -> str:
        """Return the summary of a command in the list of commands."""
        return _first_sentence(self.commands[name])

    def get_help(self, ctx: Any) -> str:
        """Return the help."""
        return _help(self, ctx)


def _help(command: Command | Group, context: typer.Context) -> str:
    records: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            records[parameter.param_type_name].append(record)
    commands = [(name, command.summary(name)) for name in command.commands] if isinstance(command, Group) else []
    parts = [
        command.get_usage(context),
        "\n\n".join(_wrapped(" ".join(text.split()), "  ") for text in _paragraphs(command.help)),
        *_sections({"Arguments": records["argument"], "Options": records["option"], "Commands": commands}),
        "\n".join(_wrapped(line, "  ", "      ") for line in _lines(command.epilog)),
    ]
    return "\n\n".join(part for part in parts if part)


def _sections(tables: dict[str, list[tuple[str, str]]]) -> Iterator[str]:
    for heading, rows in tables.items():
        if rows:
            yield "\n".join([f"{heading}:", *(_row(name, meaning) for name, meaning in rows)])


def _row(name: str, meaning: str) -> str:
    start = f"  {name}"
    if len(start) + 2 <= _COLUMN:
        return _wrapped(meaning, start.ljust(_COLUMN), " " * _COLUMN)
    return f"{_wrapped(start.strip(), '  ', '    ')}\n{_wrapped(meaning, ' ' * _COLUMN)}"


def _wrapped(text: str, first: str, rest: str | None = None) -> str:
    """Wrap a text into lines; words are not broken at hyphens, which flags and paths contain."""
    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size((_WIDEST, 24)).columns))
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=first if rest is None else rest,
        break_on_hyphens=False,
        break_long_words=False,
    ).rstrip()


def _first_sentence(command: Any) -> str:
    text = " ".join(next(iter(_paragraphs(command.help)), "").split())
    return text.partition(". ")[0].rstrip(".")


def _paragraphs(text: str | None) -> Sequence[str]:
    return inspect.cleandoc(text).split("\n\n") if text else []


def _lines(text: str | None) -> Sequence[str]:
    return inspect.cleandoc(text).splitlines() if text else []
