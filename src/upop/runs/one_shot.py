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
"""Calibration samples, if no setting gives their number."""
TOWERS = {"vision": "vision", "text": "text", "language": "text", "projector": "other", "other": "other"}
"""What `include` calls the parts of a model -> the modality of their groups."""


def calibration_batches(loader: Any, settings: RunSettings) -> list[Batch]:
    """Return batches of samples that are drawn from the training data, the same ones for the same seed.

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
    """Return (model, batch) -> the task's loss, on the device of the model."""
    return partial(_loss, task, settings)


def _loss(task: Task[Any], settings: RunSettings, model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    with autocast_on(device, settings):
        return task.loss(model, to_device(batch, device), settings, 0.0)


def towers(model: nn.Module, include: Sequence[str], *, width: bool = False) -> list[str] | None:
    """Return the names and patterns of groups that `include` stands for, towers by their names; None for all.

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
            raise SettingError(f"--include {each}: the model has no group there; its groups are of {', '.join(there)}.")
        found += names
    return found
