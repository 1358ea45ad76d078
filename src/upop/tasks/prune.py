"""Pruning without training: calibration samples rank the channels, and their consumers are corrected."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import upop.checkpoints.configs.uniform_sizes  # noqa: F401 - registers sizes for uniform="tower"
from upop.checkpoints import Checkpoint, open_checkpoint, save
from upop.checkpoints.saving.card import write_card
from upop.errors import CheckpointError, SettingError
from upop.files import check_folder
from upop.machine import machine
from upop.pruning import calibrate, count_parameters
from upop.pruning.beforehand import lost_parameters
from upop.report.results import ModelResult, Results
from upop.runs.devices import make_accelerator, round_to_for
from upop.runs.evaluation import evaluate
from upop.runs.loaders import make_loader
from upop.runs.memory import explained_memory
from upop.runs.one_shot import calibration_batches, loss_of, towers
from upop.runs.run import with_lost
from upop.runs.story import story_of
from upop.runs.task import Task
from upop.runs.tokens import check_shared_budget, share_budget
from upop.runs.words import FOLDER, FewerWords, parameters_before, without_words
from upop.tasks import TASKS
from upop.tasks.estimate import check_memory
from upop.tasks.row_settings import RowSettings


def task_for(checkpoint: Checkpoint) -> Task[Any]:
    """Return the task of a model, by its class: chat, image-classification or dual-encoder.

    Args:
        checkpoint: a folder of transformers or open_clip, or an output of upop.

    Raises:
        CheckpointError: the class belongs to none of these tasks.
    """
    from upop.checkpoints.pretrained import class_named, classes_of

    if checkpoint.library == "open_clip":
        return TASKS["dual-encoder"]
    name = class_named(checkpoint)
    for task in (TASKS[each] for each in ("chat", "image-classification", "dual-encoder")):
        if name in classes_of(task.autos):  # type: ignore[attr-defined]
            return task
    raise CheckpointError(
        f"{checkpoint.path} holds a {name}, which is not a generative model, an image classifier or a dual encoder. "
        "Use upop.calibrate in Python, with your own loss."
    )


def prune(
    task: Task[Any],
    settings: RowSettings,
    *,
    overwrite: bool = False,
    command: str = "",
    notify: Callable[[str], None] = lambda _: None,
) -> Results:
    """Prune the model in `pretrained` by some samples of `data`, evaluate it before and after, and save it.

    Args:
        task: of the model.
        settings: of the task; `samples` samples of `data` are for calibration, val_data or a share of `data`
            (`hold_out`) for evaluation, and the model is saved to `output_dir`.
        overwrite: whether to replace a folder that upop wrote and that was changed since.
        command: the command line, for the model card.
        notify: called with lines for the user.

    Raises:
        UPopError: settings, data, checkpoint, device or folder are not usable; before any long work.
    """
    check_folder(settings.output_dir, "model", overwrite=overwrite)
    with ExitStack() as stack:
        words = None
        if settings.vocabulary is not None:
            folder = Path(stack.enter_context(TemporaryDirectory())) / FOLDER
            words = without_words(task, settings.model_copy(update={"pretrained": str(_path(settings))}), folder)
            notify(words.note)
        return _prune(task, settings, words, overwrite, command, notify)


def _prune(
    task: Task[Any],
    given: RowSettings,
    words: FewerWords | None,
    overwrite: bool,
    command: str,
    notify: Callable[[str], None],
) -> Results:
    settings = given if words is None else words.applied(given)
    check_memory(task, settings, trained=False, notify=notify)
    accelerator = make_accelerator(settings)
    loaders = {split: make_loader(task, settings, split) for split in ("train", *task.evaluated(settings))}
    for loader in loaders.values():
        for note in getattr(loader.dataset.samples, "notes", ()):  # type: ignore[attr-defined]
            notify(note)
    batches = calibration_batches(loaders.pop("train"), settings)
    model, _ = task.adapt(task.load(_path(settings), settings), settings, training=False)
    model = model if words is None else words.marked(model)
    names = towers(model, settings.include, width=settings.width)
    shared: dict[str, Any] = {
        "include": names,
        "exclude": list(settings.exclude) or None,
        "uniform": settings.uniform,
        "depth": settings.depth,
        "width": settings.width,
        "cost": settings.cost,
        "example": task.example(model, 1),
        **settings.budget,
    }
    # Checked before the evaluation of the dense model, which may take long.
    choice = {name: value for name, value in shared.items() if name not in ("example", *settings.budget)}
    check_shared_budget(
        model, settings, shared["example"], round_to=round_to_for(accelerator.device, settings), **choice
    )
    prepared = {split: accelerator.prepare(loader) for split, loader in loaders.items()}
    device = accelerator.device
    model.to(device)

    def evaluated(name: str, lost: int = 0) -> ModelResult:
        metrics = {
            task.splits[split]: evaluate(accelerator, task, settings, model, loader)[0]
            for split, loader in prepared.items()
        }
        # No latency: the model is pruned in place, and measurements at different times are not comparable.
        return ModelResult(name=name, metrics=metrics, **with_lost(task.counts(model), lost))

    before = parameters_before(model)
    dense = evaluated("dense", lost_parameters(model))
    budget = share_budget(
        model,
        settings,
        task.example(model, 1),
        lambda: batches,
        loss_of(task, settings),
        notify,
        correct=settings.correct,
        **choice,
    )
    notify(f"calibrating on {len(batches)} batches of {settings.batch_size_train} samples")
    with explained_memory(settings, device, saved=False):
        plan = calibrate(
            model,
            batches,
            loss=loss_of(task, settings),
            round_to=round_to_for(device, settings),
            correct=settings.correct,
            rotate=settings.rotate,
            **{**shared, **budget, "example": task.example(model, 1)},
        )
    pruned = evaluated(f"one-shot {before / count_parameters(model):.3g}x")
    results = Results(
        models=(dense, pruned), shown=task.shown, batch_size=settings.latency_batch, machine=machine(device)
    )
    save(model.cpu(), settings.output_dir, plan, tokenizer=task.tokenizer(settings), overwrite=overwrite)
    write_card(settings.output_dir, story_of(task, given, results, command, trained=False))
    return results


def _path(settings: RowSettings) -> Path:
    if not settings.pretrained:
        raise SettingError("No model to prune is given. Give a folder or a name on the hub.")
    return open_checkpoint(settings.pretrained).path
