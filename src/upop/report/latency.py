"""How long a forward pass takes, with all models measured side by side."""

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

    The models take turns (A B A B ...), so that a drift of the machine (heat, neighbours) hits all alike.

    Args:
        models: name -> model, all on one device.
        inputs: what every model is run on, as `upop.pruning.costs.call` takes it, on the models' device.
        repeats: timed passes per model.
        warmup: passes per model before those, not timed.
        clock: seconds; `time.process_time` leaves out what other programs take of a busy CPU, and counts all threads.
        summary: of the passes of a model; the least one is what a machine disturbs the least.

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
        torch.cuda.synchronize()  # earlier work must not be counted here
    start = clock()
    call(model, inputs)
    if on_cuda:
        torch.cuda.synchronize()
    return 1000 * (clock() - start)
