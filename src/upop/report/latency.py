"""Latency of forward passes, with all models measured alternately."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from upop.errors import SettingError
from upop.pruning.costs import call, evaluating

Clock = Callable[[], float]


def measure_latency(
    models: Mapping[str, nn.Module],
    inputs: Any,
    *,
    repeats: int = 30,
    warmup: int = 5,
    clock: Clock = time.perf_counter,
    summary: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Return the (median) milliseconds of one forward pass per model, in evaluation mode without gradients.

    The models alternate (A B A B ...), so that a drift of the machine (heat, other processes) affects all equally.

    Args:
        models: name -> model, all on one device.
        inputs: of every model, on its device, in a form that `upop.pruning.costs.call` takes.
        repeats: timed passes per model.
        warmup: untimed passes per model before those.
        clock: returns seconds; `time.process_time` excludes other programs on a busy CPU, and counts all threads.
        summary: of a model's passes; the minimum is least affected by other programs.

    Raises:
        SettingError: there is no model, or `repeats` or `warmup` is out of range.
    """
    if not models:
        raise SettingError("measure_latency was given no model.")
    if repeats < 1 or warmup < 0:
        raise SettingError(
            f"repeats must be at least 1 and warmup at least 0; found repeats={repeats}, warmup={warmup}."
        )
    milliseconds: dict[str, list[float]] = {name: [] for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for _ in range(warmup + repeats):
            for name, model in models.items():
                milliseconds[name].append(_milliseconds(model, inputs, clock))
    return {name: summary(values[warmup:]) for name, values in milliseconds.items()}


def _milliseconds(model: nn.Module, inputs: Any, clock: Clock) -> float:
    on_cuda = any(parameter.is_cuda for parameter in model.parameters())
    if on_cuda:
        torch.cuda.synchronize()  # finish earlier work first
    start = clock()
    call(model, inputs)
    if on_cuda:
        torch.cuda.synchronize()
    return 1000 * (clock() - start)
