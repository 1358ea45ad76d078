"""`--dry-run`: prints what a command would do: resolved settings, steps, required files, and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from upop.checkpoints.files.hub import is_hub_name, is_remote
from upop.errors import UPopError
from upop.plain import as_text
from upop.runs.task import Task
from upop.settings import LanguageSettings, RunSettings
from upop.tasks.row_settings import RowSettings

Verb = Literal["train", "compress", "evaluate"]


def explain(task: Task[Any], settings: RunSettings, verb: Verb, *, before: str = "", paper: str = "") -> None:
    """Print what a command would do, and whether the files that it needs exist.

    Args:
        task: of the command.
        settings: as resolved.
        verb: of the command.
        before: text to print first.
        paper: the published result, if any.
    """
    console = Console(soft_wrap=True, highlight=False)
    if before:
        console.print(as_text(before))
    console.print(as_text(f"Settings as resolved:\n{settings.to_yaml()}"))
    if verb != "evaluate":
        console.print(as_text(f"Steps: {_steps(task, settings, verb)}; evaluate.\n"))
    console.print("Required files:")
    pretrained = None if settings.pretrained is None else str(settings.pretrained)
    fetched = pretrained is not None and _is_fetched(pretrained)
    if fetched:
        console.print(as_text(f"  remote   {pretrained}"))
    tokenizer = [Path(settings.tokenizer)] if isinstance(settings, LanguageSettings) else []
    model = [] if fetched or pretrained is None else [Path(pretrained)]
    words = [] if settings.vocabulary is None else [Path(settings.vocabulary)]
    for path in dict.fromkeys([*model, *settings.data_folders.values(), *tokenizer, *words]):
        console.print(as_text(f"  {'found  ' if path.exists() else 'missing'}  {path}"))
    try:
        if words:
            from upop.checkpoints.configs.vocabulary import read_vocabulary

            read_vocabulary(words[0])
        for split in (*(() if verb == "evaluate" else ("train",)), *task.evaluated(settings)):
            for note in getattr(task.dataset(settings, split), "notes", ()):
                console.print(as_text(f"  {note}"))
    except UPopError as error:
        console.print(as_text(f"The data are not usable yet: {error}"))
    else:
        console.print("The data are readable.")
        if verb != "evaluate" and isinstance(settings, RowSettings):
            console.print(as_text(_memory(task, settings)))
    if paper:
        console.print(as_text(f"The paper's result: {paper}"))


def _is_fetched(pretrained: str) -> bool:
    return is_remote(pretrained) or (not Path(pretrained).exists() and is_hub_name(pretrained))


def _memory(task: Task[Any], settings: RowSettings) -> str:
    from upop.tasks.estimate import estimate

    try:
        return f"\nMemory:\n{estimate(task, settings).described()}"
    except UPopError as error:
        return f"The memory cannot be estimated: {error}"


def _steps(task: Task[Any], settings: RunSettings, verb: Verb) -> str:
    best = f"keeping the best epoch by {task.metric}"
    if verb == "train":
        return f"train for {settings.training_epochs} epochs, {best}"
    return f"evaluate the dense model; {_cutting(settings)}, {best}"


def _cutting(settings: RunSettings) -> str:
    """Return how the method of a run removes a share of the cost, and how it uses its epochs."""
    share, epochs = f"{100 * settings.ratio:g} % of the cost", settings.all_epochs
    if settings.target is not None:
        share = f"down to {settings.target}"
    if settings.method == "magnitude":
        return f"cut by weight magnitude, {share}; retrain for {epochs} epochs"
    if settings.method == "one-shot":
        samples = f"{settings.samples} samples" if isinstance(settings, RowSettings) else "some samples"
        return f"cut by first-order importance on {samples}, {share}; retrain for {epochs} epochs"
    if settings.method == "reference":
        return (
            f"search for {settings.searching_epochs} epochs at a constant learning rate, masking {share}; cut; "
            f"retrain for {settings.retraining_epochs} epochs"
        )
    return (
        f"search in the first {100 * settings.search_share:g} % of {epochs} epochs, masking {share} in stages; "
        "cut; train on, with one learning rate schedule"
    )
