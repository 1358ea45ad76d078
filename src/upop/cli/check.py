"""`upop check`: checks that the data and checkpoint of a published run are present and intact."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from upop.cli import options as o
from upop.cli.recipes import File, RecipeName, settings_of
from upop.defaults import RECIPES
from upop.plain import as_text
from upop.starting import starting

if TYPE_CHECKING:
    from upop.runs.check import Finding

_STYLES = {"right": "green", "wrong": "red", "unknown": "yellow"}


def _count(text: str) -> int | None:
    from upop.errors import SettingError

    if text == "all":
        return None
    if not text.isascii() or not text.isdigit():
        raise SettingError(f"--decode takes a number of images, or all; found {text!r}.")
    return int(text)


def check(
    context: typer.Context,
    name: RecipeName,
    only_evaluate: Annotated[
        bool,
        typer.Option("--evaluate", help="Check the needs of an evaluation of the published compressed checkpoint."),
    ] = False,
    decode: Annotated[str, typer.Option(help="Number of images of every split to decode, or all.")] = "64",
    any_count: Annotated[bool, typer.Option("--any-count", help="Accept any number of samples.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    pretrained: o.Pretrained = None,
    allow_outside: o.AllowOutside = None,
    file: File = RECIPES,
    assign: o.Set = None,
) -> None:
    """Check the data, the checkpoint and the tokenizer of a published run; exit code 1 if something is wrong."""
    with starting():
        from upop.published_data import published_data
        from upop.recipes import find_recipe
        from upop.runs.check import check as check_run
        from upop.tasks import find_task

    recipe = find_recipe(name, file)
    task = find_task(recipe.task)
    count = _count(decode)
    settings = settings_of(context, recipe, assign, evaluate=only_evaluate)
    counts = None if any_count else published_data(recipe.task, settings)
    findings: list[Finding] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("images", total=None)

        def advance(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        findings += check_run(task, settings, counts, decoded=count, evaluate=only_evaluate, advance=advance)
    if as_json:
        print(json.dumps({"run": name, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        Console(highlight=False).print(_table(name, findings))
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)


def _table(name: str, findings: list[Finding]) -> Table:
    table = Table(title=f"What {name} needs", title_justify="left", show_lines=True)
    for heading in ("part", "state", "found"):
        table.add_column(heading)
    for finding in findings:
        table.add_row(as_text(finding.part), as_text(finding.state, _STYLES[finding.state]), as_text(finding.message))
    return table
