"""The three verbs of every task: train a dense model, compress it, evaluate it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from timm.utils.model_ema import ModelEmaV3
from torch import nn

import upop.checkpoints.configs.uniform_sizes  # noqa: F401 - registers sizes for uniform="tower"
from upop.compression import Compression
from upop.pruning import Plan, calibrate, count_parameters, plan_by_magnitude, shrink
from upop.pruning.calibrate import check_budget
from upop.pruning.goal import format_reached
from upop.pruning.masks import unwrapped
from upop.report.results import Results
from upop.runs.adapters import Adapters
from upop.runs.devices import round_to_for
from upop.runs.loaders import first_samples, to_device
from upop.runs.loop import Loop, explain_misfit
from upop.runs.one_shot import calibration_batches, loss_of, towers
from upop.runs.preemption import Preemption
from upop.runs.run import Run
from upop.runs.schedules import ONE_SHOT_METHODS, Phases, check_epochs, compression_rates, decay, phases
from upop.runs.task import Task
from upop.runs.tokens import merge_by_settings, share_budget
from upop.runs.words import parameters_before
from upop.settings import RunSettings

_VERIFIED_SAMPLES = 4


def train(task: Task[Any], settings: RunSettings) -> Results | None:
    """Train or fine-tune a dense model; the best epoch's weights end up in `output_dir/best`.

    Raises:
        UPopError: settings, data, checkpoint, device or run directory are not usable; before any long work.
        PreemptedError: SIGTERM asked the run to end; it can be resumed.
    """
    with Preemption(settings.resume == "auto") as preemption, Run(task, settings, "train") as run:
        settings = run.settings
        if settings.pretrained:
            model, lacking = task.start(run.checkpoint(), settings)
            if lacking:
                run.notify(
                    f"{settings.pretrained} lacks {len(lacking)} tensors, which are newly initialised: "
                    f"{', '.join(lacking[:4])} ..."
                )
            model = run.adapted(model, training=True)
        else:
            model = run.adapted(task.build(settings), training=True)
        run.settle(model)
        merge_by_settings(model, settings)
        with run.training(settings.training_epochs, preemption) as loop:
            average = _average(settings, model.to(run.accelerator.device))
            schedule = decay(settings, run.first_rate(loop), settings.training_epochs, loop.steps_per_epoch)
            keep = run.keep_best(loop, model)
            loop.run(model, "train", settings.training_epochs, schedule, after_epoch=keep, average=average)
            model, metrics = run.best(model)
        return run.finish({"dense": (model, metrics)})


def compress(task: Task[Any], settings: RunSettings) -> Results | None:
    """Compress the dense model in `pretrained`: search, shrink, retrain, evaluate; the result is `output_dir/best`.

    Method "reference" searches as published. "magnitude" cuts once by weight norm instead of searching, and "one-shot"
    once by first-order importance. All methods train for equally many steps.

    Raises:
        UPopError: settings, data, checkpoint, device or run directory are not usable; before any long work.
        PreemptedError: SIGTERM asked the run to end; it can be resumed.
    """
    check_epochs(settings)
    with Preemption(settings.resume == "auto") as preemption, Run(task, settings, "compress") as run:
        settings = run.settings
        model = run.pretrained(training=True)
        run.settle(model)
        dense_model = copy.deepcopy(model)
        budget = share_budget(
            model.to(run.accelerator.device),
            settings,
            task.example(model, 1),
            lambda: calibration_batches(run.loaders["train"], settings),
            loss_of(task, settings),
            run.notify,
            correct=settings.correct,
            importance=settings.importance or "absolute",
        )
        with run.training(settings.all_epochs, preemption) as loop:
            average = _average(settings, model.to(run.accelerator.device))
            planned = phases(settings, loop.steps_per_epoch)
            searching, retraining = compression_rates(settings, run.first_rate(loop), loop.steps_per_epoch)
            # Built first, because it checks the settings against the model before any long work.
            with _compression(run, loop, model, dense_model, average, planned, budget) as compression:
                _evaluate_dense(run, loop, model)
                if (rank := getattr(settings, "lora", None)) is not None:
                    run.adapters = Adapters(model, rank)
                cut = partial(_keep_cut, run, model, average, compression, dense_model)
                loop.run(model, "search", planned.search, searching, compression, cut, average=average)
                keep = run.keep_best(loop, model)
                loop.run(model, "retrain", planned.retrain, retraining, compression, cut, keep, average)
                plan = compression.plan()
            if run.adapters is not None:
                run.adapters.merge()
            model, metrics = run.best(model)
        name = compressed_name(settings, dense_model, model)
        models = {"dense": (dense_model, loop.notes["dense"]), name: (model, metrics)}
        return run.finish(models, plan)


def _compression(
    run: Run,
    loop: Loop,
    model: nn.Module,
    dense_model: nn.Module,
    average: ModelEmaV3 | None,
    planned: Phases,
    budget: dict[str, Any],
) -> Compression:
    """Return the `Compression` of a run; methods without a search have cut the model when it returns."""
    task, settings, device = run.task, run.settings, run.accelerator.device
    averages = [] if average is None else [average]
    verified = task.inputs(to_device(first_samples(run.loaders["train"], _VERIFIED_SAMPLES), device))
    state, resuming = loop.compression_state, loop.compression_state is not None
    shared: dict[str, Any] = {
        "cost": settings.cost,
        "round_to": round_to_for(device, settings),
        "example": task.example(model, 1),
        "uniform": settings.uniform,
        **budget,
    }
    if settings.method != "magnitude":
        include, exclude = (getattr(settings, name, ()) for name in ("include", "exclude"))
        shared |= {"include": towers(model, include, width=settings.width), "exclude": list(exclude) or None}
    if settings.method in ONE_SHOT_METHODS and state is None:
        check_budget(model, depth=settings.depth, width=settings.width, **shared)
        _evaluate_dense(run, loop, model)
        plan = _cut_once(run, model, average, verified, shared)
        state = {"steps_done": 0, "plan": plan.to_json(), "pruner": None}
    with explain_misfit() if resuming else nullcontext():
        compression = Compression(
            model,
            steps=settings.all_epochs * loop.steps_per_epoch,
            search_steps=planned.search_steps or None,
            teacher=dense_model if any(task.distill_options(settings).values()) else False,
            distill=task.distill_options(settings),
            averages=averages,
            verify=verified,
            resume=state,
            **shared,
            **_search_settings(task, settings),
        )
    if settings.method in ONE_SHOT_METHODS and not resuming:
        _keep_cut(run, model, None, compression, dense_model, run.before_retraining(model))
    return compression


def _cut_once(run: Run, model: nn.Module, average: ModelEmaV3 | None, verified: Any, shared: dict[str, Any]) -> Plan:
    """Cut a model and its average before training; return the plan."""
    settings = run.settings
    if settings.method == "magnitude":
        plan = plan_by_magnitude(model, **shared)
        shrink(model, plan, verify=verified)
    else:
        batches, loss = calibration_batches(run.loaders["train"], settings), loss_of(run.task, settings)
        options = {"importance": settings.importance or "absolute", "correct": settings.correct, "verify": verified}
        options |= {"depth": settings.depth, "width": settings.width, "rotate": settings.rotate}
        plan = calibrate(model, batches, loss=loss, **options, **shared)
    if average is not None:
        shrink(average.module, plan, verify=verified)
        average.set(model)
    return plan


def _search_settings(task: Task[Any], settings: RunSettings) -> dict[str, Any]:
    """Return the arguments of `Compression` that select the search of a method."""
    if settings.method == "upop":
        searched = {"progress": "stages", "importance": settings.importance, "correct": settings.correct}
        searched |= {"rotate": settings.rotate}
        return searched | ({"depth": True} if settings.depth else {}) | ({"width": True} if settings.width else {})
    if settings.method == "reference":
        first = task.update_first_step
        return {"progress": "soft", "importance": "signed", "interval": settings.interval, "update_first_step": first}
    return {}


def _evaluate_dense(run: Run, loop: Loop, model: nn.Module) -> None:
    """Evaluate the dense model and store its metrics, once in a run."""
    if "dense" not in loop.notes:
        loop.notes["dense"] = run.evaluate(model)
        run.notify("dense  " + run.format_scores(loop.notes["dense"]))


def _keep_cut(
    run: Run,
    model: nn.Module,
    average: ModelEmaV3 | None,
    compression: Compression,
    dense_model: nn.Module,
    before_retraining: str = "",
) -> None:
    """Save importance, plan and model right after the cut."""
    if average is not None and run.settings.method == "upop" and run.settings.correct:
        average.set(model)  # its weights date from before the correction
    if compression.pruner is not None:
        run.folder.save_scores(compression.pruner.scores)
    plan = compression.plan()
    run.folder.save_plan(plan)
    run.folder.save_model("last", model)
    reached = format_reached(plan.settings)
    if "macs" not in plan.settings.get("reached", {}) and run.settings.sharding == "none":
        dense, left = (1e9 * run.task.counts(each)["gmacs"] for each in (dense_model, unwrapped(model)))
        reached += f", {left:,.0f} of {dense:,.0f} multiply-adds ({dense / (left or 1):.3g}x)"
    run.notify(f"cut; the outputs equal those of the masked model: {reached}{before_retraining}")


def evaluate_checkpoint(task: Task[Any], settings: RunSettings) -> Results | None:
    """Evaluate the checkpoint in `pretrained`, dense or compressed, on the validation and test splits.

    Raises:
        UPopError: settings, data, checkpoint, device or run directory are not usable.
    """
    with Run(task, settings, "evaluate") as run:
        model = run.pretrained(training=False).to(run.accelerator.device)
        metrics = run.evaluate(model)
        return run.finish({Path(str(settings.pretrained)).name: (model, metrics)})


def compressed_name(settings: RunSettings, dense: nn.Module, model: nn.Module) -> str:
    """Return the compressed model's name in tables: the method, and how many times fewer parameters it has."""
    return f"{method_name(settings)} {parameters_before(dense) / count_parameters(model):.3g}x"


def method_name(settings: RunSettings) -> str:
    """Return the display name of a run's method, such as "UPop" or "magnitude"."""
    return {"upop": "UPop"}.get(settings.method, settings.method)


def _average(settings: RunSettings, model: nn.Module) -> ModelEmaV3 | None:
    return None if settings.ema_decay is None else ModelEmaV3(model, decay=settings.ema_decay)
