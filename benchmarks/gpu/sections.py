"""Measurements under a deadline: those that do not fit or fail are reported, with the reason."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Row = dict[str, Any]
Measurement = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
"""What is measured (the first columns of its row), and what measures it (the others)."""


@dataclass
class Section:
    """One table of the report.

    Attributes:
        title: above the table.
        says: describes its columns.
        rows: what was measured.
        skipped: what was not, with the reason.
        failed: what raised, with the error.
        seconds: that it took.
    """

    title: str
    says: str
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, measurements: Iterator[Measurement], until: float, described: Callable[[str], None]) -> None:
        """Measure one after the other until the clock (`time.monotonic`) says `until`; the longest so far must fit."""
        begun = time.monotonic()
        longest = 0.0
        for what, measure in measurements:
            name = ", ".join(str(value) for value in what.values())
            start = time.monotonic()
            if start + longest > until:
                left = max(0.0, until - start)
                self.skipped.append(f"{name}: no time ({left:.0f} s left, the longest took {longest:.0f} s)")
                continue
            described(f"{self.title}: {name}")
            try:
                self.rows.append({**what, **measure()})
            except torch.OutOfMemoryError:
                self.skipped.append(f"{name}: does not fit into the device's memory")
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                first = str(error).splitlines()[0] if str(error) else ""
                self.failed.append(f"{name}: {type(error).__name__}: {first} ({where.filename}:{where.lineno})")
            finally:
                longest = max(longest, time.monotonic() - start)
                _tidy()
        self.seconds = time.monotonic() - begun


def _tidy() -> None:
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def markdown(about: dict[str, Any], sections: list[Section]) -> str:
    """Return the report as Markdown: the machine, and a table for every section."""
    lines = ["# On a GPU", "", "Written by `make gpu`.", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.says, ""]
        columns = list(dict.fromkeys(column for row in section.rows for column in row))
        if columns:
            numbers = [all(isinstance(row.get(column, 0), int | float) for row in section.rows) for column in columns]
            lines.append(f"| {' | '.join(columns)} |")
            lines.append(f"| {' | '.join('---:' if number else '---' for number in numbers)} |")
            lines += [f"| {' | '.join(_cell(row.get(column, '-')) for column in columns)} |" for row in section.rows]
        for title, described in (("Left out", section.skipped), ("Failed", section.failed)):
            if described:
                lines += ["", f"{title}:", "", *(f"- {each}" for each in described)]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "/")
