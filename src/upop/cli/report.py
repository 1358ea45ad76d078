"""`upop report`: a run, or several side by side, as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from upop.errors import SettingError
from upop.plain import as_text
from upop.report.page import write_comparison_page, write_run_page
from upop.report.run import read_run

PAGE = "report.html"
COMPARISON = Path("comparison.html")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folder, finished or not.")],
    compare: Annotated[bool, typer.Option("--compare", help="Put several runs side by side.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help=f"File to write; RUN/{PAGE} if not given, with --compare ./{COMPARISON}."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file of that name that is no report, too.")
    ] = False,
) -> None:
    """Write one HTML file of a run: results, what every layer keeps, curves, examples, settings.

    It needs no network and no other file. With --compare it shows several runs side by side.
    """
    if len(runs) > 1 and not compare:
        raise SettingError(f"{len(runs)} runs were given. Add --compare for a page of all, or give one of them.")
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
