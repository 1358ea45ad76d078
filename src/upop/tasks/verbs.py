"""What one can do with a task: train a dense model, compress one, evaluate one. The same for every task."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from timm.utils.model_ema import ModelEmaV3
from torch import nn

import upop.checkpoints.speaking  # noqa: F401 - a search with uniform="tower" asks libraries
from upop.pruning import Plan, Pruner, count_parameters, plan_by_magnitude, shrink
from upop.pruning.goal import told_reached
from upop.report.results import Results
from upop.settings import RunSettings
from upop.tasks.run import Run
from upop.training.devices import align_for
from upop.training.loaders import first_records, to_device
from upop.training.loop import Loop
from upop.training.preemption import Preemption
from upop.training.schedules import Phases, Schedule, check_epochs, compression_rates, falling, phases
from upop.training.task import Task

_VERIFIED_RECORDS = 4


def train(task: Task[Any], settings: RunSettings) -> Results | None:
    """Train or fine-tune a dense model; the best epoch's weights end up in `output_dir/best`.

    Raises:
        UPopError: settings, data, checkpoint, device or run folder are not usable; before any long work.
        PreemptedError: the run was asked to end (SIGTERM), and can be resumed.
    """
    with Preemption(settings.resume == "auto") as preemption, Run(task, settings, "train") as run:
        settings = run.settings
        if settings.pretrained:
            model, lacking = task.start(run.checkpoint(), settings)
            if lacking:
                run.say(
                    f"{settings.pretrained} lacks {len(lacking)} tensors, which start afresh: "
                    f"{', '.join(lacking[:4])} ..."
                )
            model = run.adapted(model, training=True)
        else:
            model = task.build(settings)
        run.settle(model)
        with run.training(settings.training_epochs, preemption) as loop:
            average = _average(settings, model.to(run.accelerator.device))
            schedule = falling(settings, run.first_rate(loop), settings.training_epochs, loop.steps_per_epoch)
            keep = run.keep_best(loop, model, None)
            loop.run(model, "train", settings.training_epochs, schedule, after_epoch=keep, average=average)
            model, metrics = run.best(model)
        return run.finish({"dense": (model, metrics)})


def compress(task: Task[Any], settings: RunSettings) -> Results | None:
    """Compress the dense model in `pretrained`: search, shrink, retrain, evaluate; the result is `output_dir/best`.

    With method "reference" it searches as published; with "magnitude" one cut by weight norm takes the place of the
    search. All three take equally many steps.

    Raises:
        UPopError: settings, data, checkpoint, device or run folder are not usable; before any long work.
        PreemptedError: the run was asked to end (SIGTERM), and can be resumed.
    """
    check_epochs(settings)
    with Preemption(settings.resume == "auto") as preemption, Run(task, settings, "compress") as run:
        settings = run.settings
        model = run.pretrained(training=True)
        run.settle(model)
        dense_model = copy.deepcopy(model)
        teacher = dense_model if settings.teaching else None
        epochs = settings.all_epochs
        with run.training(epochs, preemption) as loop:
            # Made before anything long runs: it checks the settings of the method against the model.
            average = _average(settings, model.to(run.accelerator.device))
            planned = phases(settings, loop.steps_per_epoch)
            searching, retraining = compression_rates(settings, run.first_rate(loop), loop.steps_per_epoch)
            if "plan" in loop.notes:  # resumed after the cut
                plan = Plan.from_json(loop.notes["plan"])
                # Verified when it was cut; its weights come with the state of the loop.
                shrink(model, plan, verify=False)
                if average is not None:
                    shrink(average.module, plan, verify=False)
            else:
                plan = _find_plan(run, loop, model, average, teacher, planned, searching)
                loop.notes["plan"] = plan.to_json()
            keep = run.keep_best(loop, model, plan)
            loop.run(model, "retrain", planned.retrain, retraining, after_epoch=keep, average=average, teacher=teacher)
            model, metrics = run.best(model)
        name = compressed_name(settings, dense_model, model)
        models = {"dense": (dense_model, loop.notes["dense"]), name: (model, metrics)}
        return run.finish(models, plan)


def _find_plan(
    run: Run,
    loop: Loop,
    model: nn.Module,
    average: ModelEmaV3 | None,
    teacher: nn.Module | None,
    planned: Phases,
    schedule: Schedule,
) -> Plan:
    """Return what the method keeps of the model, which is cut, and so is its average."""
    settings, device = run.settings, run.accelerator.device
    pruner = _pruner(run.task, settings, model, planned.search_steps)
    try:
        if "dense" not in loop.notes:
            loop.notes["dense"] = run.evaluate(model)
        run.say("dense  " + run.told(loop.notes["dense"]))
        verified = run.task.inputs(to_device(first_records(run.loaders["train"], _VERIFIED_RECORDS), device))
        if pruner is not None:
            loop.run(model, "search", planned.search, schedule, pruner, average=average, teacher=teacher)
            plan = pruner.plan()
            run.folder.save_scores(pruner.scores)
            pruner.shrink(verify=verified)
        else:
            example = run.task.example(model, 1)
            plan = plan_by_magnitude(
                model,
                **settings.budget,
                cost=settings.cost,
                align=align_for(device, settings),
                example=example,
                uniform=settings.uniform,
            )
            shrink(model, plan, verify=verified)
    finally:  # a run that ends early leaves no hook on the model, and no code uncompiled
        if pruner is not None:
            pruner.remove()
    if average is not None:
        shrink(average.module, plan, verify=verified)
        if settings.method == "upop" and settings.correct:
            average.set(model)  # what it remembers are layers from before they were corrected
    run.folder.save_plan(plan)
    run.folder.save_model("last", model, plan)
    # After a search, its last evaluation has told how good this very function is.
    told = run.told_of(model) if pruner is None else ""
    left = told_reached(plan.settings)
    run.say(f"cut for real, and it computes what the masked model did: {left}{told}")
    return plan


def evaluate_checkpoint(task: Task[Any], settings: RunSettings) -> Results | None:
    """Evaluate the checkpoint in `pretrained`, dense or compressed, on the validation and test splits.

    Raises:
        UPopError: settings, data, checkpoint, device or run folder are not usable.
    """
    with Run(task, settings, "evaluate") as run:
        model = run.pretrained(training=False).to(run.accelerator.device)
        metrics = run.evaluate(model)
        return run.finish({Path(str(settings.pretrained)).name: (model, metrics)})


def compressed_name(settings: RunSettings, dense: nn.Module, model: nn.Module) -> str:
    """Return what the tables call the compressed model, by how many times fewer parameters the whole of it has."""
    return f"{method_name(settings)} {count_parameters(dense) / count_parameters(model):.3g}x"


def method_name(settings: RunSettings) -> str:
    """Return what people call the method of a run: "UPop", "reference", "magnitude"."""
    return {"upop": "UPop"}.get(settings.method, settings.method)


def _pruner(task: Task[Any], settings: RunSettings, model: nn.Module, steps: int) -> Pruner | None:
    if settings.method == "magnitude":
        return None
    shared: dict[str, Any] = {
        **settings.budget,
        "cost": settings.cost,
        "align": align_for(next(model.parameters()).device, settings),
        "example": task.example(model, 1),
        "uniform": settings.uniform,
    }
    if settings.method == "upop":
        return Pruner(model, steps=steps, progress="stages", score=settings.score, correct=settings.correct, **shared)
    first = task.update_first_step
    return Pruner(
        model,
        steps=steps,
        interval=settings.interval,
        progress="soft",
        score="signed",
        update_first_step=first,
        **shared,
    )


def _average(settings: RunSettings, model: nn.Module) -> ModelEmaV3 | None:
    return None if settings.ema_decay is None else ModelEmaV3(model, decay=settings.ema_decay)
