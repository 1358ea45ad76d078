"""`upop recipes` lists the published runs, and `upop run` starts one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from upop.checkpoints.hub import is_hub_name
from upop.checkpoints.remote import is_remote
from upop.cli import options as o
from upop.errors import UPopError
from upop.plain import as_text
from upop.recipes import RECIPES, Recipe, find_recipe, read_recipes
from upop.runs.task import Task
from upop.runs.verbs import compress, evaluate_checkpoint
from upop.settings import LanguageSettings, RunSettings
from upop.tasks import find_task

File = Annotated[Path, typer.Option("--recipes", help="YAML file of recipes.")]
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of a recipe; `upop recipes` lists them.",
        autocompletion=o.starting_with(read_recipes),
    ),
]


def recipes(file: File = RECIPES) -> None:
    """List every published run."""
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
        "epochs: of search + retraining as published; the methods upop and magnitude take as many in all.\n"
        "`upop run NAME` does what was published; `--method upop` is what `upop compress` does by default, and better.",
        highlight=False,
    )


def run(
    context: typer.Context,
    name: RecipeName,
    dry_run: Annotated[bool, typer.Option("--dry-run", "--dry_run", help="Only say what would be done.")] = False,
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
    resume: o.Resume = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    file: File = RECIPES,
    assign: o.Set = None,
) -> None:
    """Start a published run, as published; `--method upop` is better. Under torchrun it runs on all processes."""
    recipe = find_recipe(name, file)
    task = find_task(recipe.task)
    settings = settings_of(context, recipe, assign, evaluate=only_evaluate, also=o.sharding(fsdp))
    verb = evaluate_checkpoint if only_evaluate else compress
    if dry_run:
        _explain(recipe, task, settings, evaluate=only_evaluate)
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
    """Return the settings of a published run, under the flags of the command.

    Args:
        context: of the command.
        recipe: of the run.
        assign: of `--set`.
        evaluate: whether its published compressed checkpoint is evaluated.
        also: settings that other parameters stand for.

    Raises:
        SettingError: a setting cannot be used; the message says where it is from.
    """
    beneath: dict[str, Any] = dict(recipe.overrides)
    if evaluate:
        beneath["pretrained"] = str(recipe.output_dir / recipe.compressed)
    sources = dict.fromkeys(beneath, f"from the recipe {recipe.name}")
    kind = find_task(recipe.task).settings
    return o.read(
        context, kind, recipe.config, assign, also=also, beneath=beneath, sources=sources, published=not evaluate
    )


def _explain(recipe: Recipe, task: Task[Any], settings: RunSettings, *, evaluate: bool) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(as_text(f"{recipe.name} stands for the published command\n  {_command(recipe, evaluate=evaluate)}\n"))
    console.print(as_text(f"Settings as resolved:\n{settings.to_yaml()}"))
    if not evaluate:
        console.print(
            f"Steps: evaluate the dense model; {_cutting(settings)}, keeping the best epoch by {task.metric}; "
            "evaluate.\n"
        )
    console.print("What it needs:")
    pretrained = str(settings.pretrained)
    fetched = is_remote(pretrained) or is_hub_name(pretrained)
    if fetched:
        console.print(as_text(f"  fetched  {pretrained}"))
    tokenizer = [Path(settings.tokenizer)] if isinstance(settings, LanguageSettings) else []
    needs = [*(() if fetched else (Path(pretrained),)), *settings.data_folders.values(), *tokenizer]
    for path in dict.fromkeys(needs):
        console.print(as_text(f"  {'found  ' if path.exists() else 'missing'}  {path}"))
    try:
        for split in (*(() if evaluate else ("train",)), *task.evaluated(settings)):
            for note in getattr(task.dataset(settings, split), "notes", ()):
                console.print(as_text(f"  {note}"))
    except UPopError as error:
        console.print(as_text(f"The data cannot be used yet: {error}"))
    else:
        console.print("The data can be read.")
    if recipe.paper:
        console.print(as_text(f"The paper's result: {recipe.paper}"))


def _cutting(settings: RunSettings) -> str:
    """Return how the method of a run takes a share of the cost away, and what it does with its epochs."""
    share, epochs = f"{100 * settings.ratio:g} % of the cost", settings.all_epochs
    if settings.method == "magnitude":
        return f"cut the smallest weights, {share}; retrain for {epochs} epochs"
    if settings.method == "reference":
        return (
            f"search for {settings.search_epochs} epochs at a constant learning rate, masking up to {share}; cut; "
            f"retrain for {settings.retraining_epochs} epochs"
        )
    return (
        f"search in the first {100 * settings.search_share:g} % of {epochs} epochs, masking {share} stage by stage; "
        "cut; go on training, under one learning rate schedule"
    )


def _command(recipe: Recipe, *, evaluate: bool) -> str:
    return recipe.evaluation if evaluate else recipe.command
