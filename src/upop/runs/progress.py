"""Progress of a run: a bar with the remaining time, and lines of text.

The logger `upop.runs` gets every line, at level INFO or WARNING. A higher level silences the console too.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from upop.plain import as_text

LOGGER = logging.getLogger("upop.runs")
LOGGER.addHandler(logging.NullHandler())  # the console shows the lines; Python would print warnings a second time
LOGGER.setLevel(logging.INFO)


class RunProgress:
    """A bar over all steps of all phases; silent on processes other than the main one."""

    def __init__(self, total: int, main: bool) -> None:
        self._main = main
        self.console = Console(quiet=not main)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not main or total == 0,
            refresh_per_second=2,
        )
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def start_at(self, steps: int) -> None:
        """Start at a number of earlier steps, which do not count for the remaining time."""
        self._bar.reset(self._task, completed=steps)  # an update would count as speed

    def advance(self, description: str) -> None:
        """Count one step."""
        self._bar.update(self._task, advance=1, description=description)

    def notify(self, line: str, style: str = "") -> None:
        """Log a line and print it above the bar, on the main process.

        Args:
            line: plain text; markup is not interpreted.
            style: one of rich's, for the console. A line with a style is a warning.
        """
        level = logging.WARNING if style else logging.INFO
        if self._main and LOGGER.isEnabledFor(level):
            self.console.print(as_text(line, style))
            LOGGER.log(level, line)
