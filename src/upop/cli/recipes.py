"""`upop recipes` lists the published runs, and `upop run` starts one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from upop.cli import options as o
from upop.defaults import RECIPES
from upop.plain import as_text
from upop.starting import starting

if TYPE_CHECKING:
    from upop.recipes import Recipe
    from upop.settings import RunSettings

File = Annotated[Path, typer.Option("--recipes", help="YAML file of recipes.")]


def _names() -> Mapping[str, Any]:
    from upop.recipes import read_recipes

    return read_recipes()


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of a recipe; `upop recipes` lists them.",
        autocompletion=o.starting_with(_names),
    ),
]


def recipes(file: File = RECIPES) -> None:
    """List every published run."""
    from upop.recipes import read_recipes

    table = Table(title="Published runs", title_justify="left")
    table.add_column("name", no_wrap=True)
    for heading in ("ratio", "epochs", "the paper's result"):
        table.add_column(heading)
    for script, rows in groupby(read_recipes(file).values(), key=lambda recipe: recipe.script):
        table.add_section()
        table.add_row(as_text(script, "dim"))
        for recipe in rows:
            table.add_row(
                as_text(recipe.name),
                f"{recipe.ratio:g}",
                f"{recipe.searched} + {recipe.retraining}",
                as_text(recipe.paper),
            )
    console = Console()
    console.print(table)
    console.print(
        "epochs: search + retraining, as published; the methods upop and magnitude take as many in all.\n"
        "`upop run NAME` uses the published search; `--method upop` is the default of `upop compress`, and better.",
        highlight=False,
    )


def run(
    context: typer.Context,
    name: RecipeName,
    dry_run: o.DryRun = False,
    only_evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Evaluate the published compressed checkpoint.")
    ] = False,
    pretrained: o.Pretrained = None,
    output_dir: o.OutputDir = None,
    device: o.DeviceName = None,
    fsdp: o.Fsdp = None,
    seed: o.Seed = None,
    amp: o.Amp = None,
    method: o.PublishedMethod = None,
    target: o.Target = None,
    resume: o.Resume = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    file: File = RECIPES,
    assign: o.Set = None,
) -> None:
    """Start a published run, with the published search; `--method upop` is better.

    Under torchrun it runs on all processes.
    """
    with starting():
        from upop.cli.dry import explain
        from upop.recipes import find_recipe
        from upop.runs.verbs import compress, evaluate_checkpoint
        from upop.tasks import find_task

    recipe = find_recipe(name, file)
    task = find_task(recipe.task)
    settings = settings_of(context, recipe, assign, evaluate=only_evaluate, also=o.sharding(fsdp))
    verb = evaluate_checkpoint if only_evaluate else compress
    if dry_run:
        command = f"{recipe.name} is the published command\n  {_command(recipe, evaluate=only_evaluate)}\n"
        explain(task, settings, "evaluate" if only_evaluate else "compress", before=command, paper=recipe.paper)
    else:
        verb(task, settings)


def settings_of(
    context: typer.Context,
    recipe: Recipe,
    assign: Sequence[str] | None,
    *,
    evaluate: bool,
    also: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Return the settings of a published run; flags of the command override them.

    Args:
        context: of the command.
        recipe: of the run.
        assign: of `--set`.
        evaluate: whether to evaluate the published compressed checkpoint.
        also: settings from other parameters.

    Raises:
        SettingError: a setting is not valid; the message says where it is from.
    """
    from upop.tasks import find_task

    beneath: dict[str, Any] = dict(recipe.overrides)
    if context.params.get("target") is not None:
        beneath.pop("ratio", None)  # the target replaces it
    if evaluate:
        beneath["pretrained"] = str(recipe.output_dir / recipe.compressed)
    sources = dict.fromkeys(beneath, f"from the recipe {recipe.name}")
    kind = find_task(recipe.task).settings
    return o.read(
        context, kind, recipe.config, assign, also=also, beneath=beneath, sources=sources, published=not evaluate
    )


def _command(recipe: Recipe, *, evaluate: bool) -> str:
    return recipe.evaluation if evaluate else recipe.command
