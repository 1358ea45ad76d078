"""Pruning without a search, within a run: calibration samples, the loss, and the groups."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from upop.errors import SettingError
from upop.pruning import find_groups
from upop.runs.devices import autocast_on, to_device
from upop.runs.task import Batch, Task
from upop.settings import RunSettings

SAMPLES = 128
"""Default number of calibration samples."""
TOWERS = {"vision": "vision", "text": "text", "language": "text", "projector": "other", "other": "other"}
"""Name of a tower in `include` -> modality of its groups."""


def calibration_batches(loader: Any, settings: RunSettings) -> list[Batch]:
    """Return batches of samples drawn from the training data; the seed decides which.

    Args:
        loader: of the training data.
        settings: `samples` of them, in batches of `batch_size_train`.
    """
    samples, size = loader.dataset, settings.batch_size_train
    drawn = random.Random(settings.seed).sample(
        range(len(samples)), min(getattr(settings, "samples", SAMPLES), len(samples))
    )
    return [
        loader.collate_fn([samples[number] for number in drawn[start : start + size]])
        for start in range(0, len(drawn), size)
    ]


def loss_of(task: Task[Any], settings: RunSettings) -> Callable[[nn.Module, Batch], Tensor]:
    """Return a function (model, batch) -> the task's loss, a scalar on the model's device."""
    return partial(_loss, task, settings)


def _loss(task: Task[Any], settings: RunSettings, model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    with autocast_on(device, settings):
        return task.loss(model, to_device(batch, device), settings, 0.0)


def towers(model: nn.Module, include: Sequence[str], *, width: bool = False) -> list[str] | None:
    """Return `include` with the names of towers replaced by the names of their groups; None if it is empty.

    Raises:
        SettingError: a tower has no group.
    """
    if not include:
        return None
    found: list[str] = []
    for each in include:
        if each not in TOWERS:
            found.append(each)
            continue
        groups = find_groups(model, width=width)
        names = [group.name for group in groups if group.modality == TOWERS[each]]
        if not names:
            there = sorted({group.modality for group in groups})
            raise SettingError(
                f"--include {each}: the model has no group there. Its groups belong to {', '.join(there)}."
            )
        found += names
    return found
