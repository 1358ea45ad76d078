"""`upop report`: writes an HTML report of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from upop.plain import as_text
from upop.starting import starting

PAGE = "report.html"
COMPARISON = Path("comparison.html")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directory, finished or not.")],
    compare: Annotated[bool, typer.Option("--compare", help="Show several runs side by side.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help=f"File to write. [default: RUN/{PAGE}, or ./{COMPARISON} with --compare]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Also replace a file that is not a report.")] = False,
) -> None:
    """Write an HTML report of a run: results, kept channels, curves, examples, settings.

    The file is self-contained. With --compare it shows several runs side by side.
    """
    with starting():
        from upop.errors import SettingError
        from upop.report.page import write_comparison_page, write_run_page
        from upop.report.run import read_run

    if len(runs) > 1 and not compare:
        raise SettingError(f"{len(runs)} runs were given. Add --compare for one page of all, or give only one.")
    found = [read_run(path) for path in runs]
    if compare:
        to = out if out is not None else COMPARISON
        write_comparison_page(found, to, overwrite=overwrite)
    else:
        to = out if out is not None else runs[0] / PAGE
        write_run_page(found[0], to, overwrite=overwrite)
    console = Console(highlight=False, soft_wrap=True)
    for run in found:
        for note in run.missing:
            console.print(as_text(f"{run.path}: {note}"))
    console.print(as_text(f"Written to {to}"))
