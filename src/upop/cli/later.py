"""Lazily imported commands: help and typos load no deep learning library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import typer
from typer.main import get_command

from upop.cli.help import Command, Group


@dataclass(frozen=True)
class Later:
    """A command that is imported when it is called.

    Attributes:
        module: of the function, which has the command's name.
        summary: the first sentence of the function's docstring, for the list of commands.
        example: a call, for the end of its help.
    """

    module: str
    summary: str
    example: str

    def command(self, name: str) -> Any:
        """Import the command and return it."""
        alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        function = getattr(import_module(self.module), name)
        alone.command(name, cls=Command, epilog=f"Example: {self.example}")(function)
        return get_command(alone)


class _Commands(MutableMapping[str, Any]):
    """Name -> command; a lookup imports the command, listing the names imports nothing."""

    def __init__(self, later: Mapping[str, Later], known: Mapping[str, Any]) -> None:
        self._held: dict[str, Any] = {**later, **known}

    def __getitem__(self, name: str) -> Any:
        found = self._held[name]
        if isinstance(found, Later):
            found = self._held[name] = found.command(name)
        return found

    def __setitem__(self, name: str, command: Any) -> None:
        self._held[name] = command

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class LaterGroup(Group):
    """A group with lazily imported commands."""

    later: ClassVar[Mapping[str, Later]] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands(self.later, self.commands)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        del ctx
        return list(self.commands)

    def summary(self, name: str) -> str:
        """Return the summary of a command in the list of commands."""
        return self.later[name].summary if name in self.later else super().summary(name)
