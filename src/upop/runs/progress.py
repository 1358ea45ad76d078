"""What a person sees of a run while it runs: one bar with the time left for all of it, and a line per epoch."""

from __future__ import annotations

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


class RunProgress:
    """A bar over all steps of all phases; silent on processes other than the main one."""

    def __init__(self, total: int, main: bool) -> None:
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
        """Take the bar away."""
        self._bar.stop()

    def start_at(self, steps: int) -> None:
        """Count steps that were taken before; the time left follows from those that are still to come."""
        self._bar.reset(self._task, completed=steps)  # an update would count as speed

    def advance(self, description: str) -> None:
        """Count one step."""
        self._bar.update(self._task, advance=1, description=description)

    def notify(self, line: str, style: str = "") -> None:
        """Print a line above the bar, in a style of rich; nothing in the line itself is one."""
        self.console.print(as_text(line, style))
