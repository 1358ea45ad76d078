"""Tables for the terminal that are transposed if they are too wide, so that no text is truncated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

from upop.plain import as_text


@dataclass(frozen=True)
class FittingTable:
    """A table that is transposed if it is too wide for the terminal.

    Attributes:
        title: above the table.
        corner: heading of the column of names.
        rows: name -> heading -> cell.
        caption: below the table.
    """

    title: str
    corner: str
    rows: Mapping[str, Mapping[str, str]]
    caption: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, transposed if needed."""
        wide = self._drawn(self.rows)
        needed = Measurement.get(console, options.update(max_width=10_000), wide).maximum
        if needed <= options.max_width:
            yield wide
        else:
            headings = dict.fromkeys(heading for row in self.rows.values() for heading in row)
            yield self._drawn(
                {heading: {name: row.get(heading, "") for name, row in self.rows.items()} for heading in headings}
            )

    def _drawn(self, rows: Mapping[str, Mapping[str, str]]) -> Table:
        table = Table(title=as_text(self.title), title_justify="left", header_style="bold", caption_justify="left")
        table.caption = as_text(self.caption) if self.caption else None
        table.add_column("" if rows is not self.rows else self.corner, overflow="fold")
        for heading in next(iter(rows.values()), {}):
            table.add_column(as_text(heading), justify="right", overflow="fold")
        for name, row in rows.items():
            table.add_row(as_text(name), *map(as_text, row.values()))
        return table
