"""The phases of a compression, and learning rates per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from upop.compression import search_steps
from upop.errors import SettingError
from upop.settings import RunSettings

Schedule = Callable[[int], float]
AT_ONCE = ("magnitude", "one-shot")
"""Methods that cut before anything is trained."""
_POWER = 0.9  # of the published polynomial schedule
_WARMUP = 0.05
"""Share of all steps in which the rate climbs, where search and retraining have one schedule."""


@dataclass(frozen=True)
class Phases:
    """The phases of a compression.

    Attributes:
        search_steps: number of search steps, after which the model is cut.
        search: epochs of a separate search, as published; otherwise the search is the beginning of `retrain`.
        retrain: all other epochs.
    """

    search_steps: int
    search: int
    retrain: int


def check_epochs(settings: RunSettings) -> None:
    """Raise a `SettingError` if a compression has too few epochs to search and to retrain."""
    if settings.all_epochs < 2 and settings.method not in AT_ONCE:
        raise SettingError(
            f"epochs: {settings.all_epochs} is too few for method {settings.method}, which searches, cuts the model, "
            "and retrains it for one epoch at least. Give 2 or more (--epochs 2)."
        )


def phases(settings: RunSettings, steps_per_epoch: int) -> Phases:
    """Return the phases of a compression; they take equally many epochs in all, whatever the method."""
    epochs = settings.all_epochs
    if settings.method in AT_ONCE:
        return Phases(0, 0, epochs)
    if settings.method == "reference":
        return Phases(
            settings.searching_epochs * steps_per_epoch, settings.searching_epochs, settings.retraining_epochs
        )
    total = epochs * steps_per_epoch
    steps = min(
        search_steps(total, settings.search_share), total - steps_per_epoch
    )  # one epoch at least is left to retrain
    return Phases(steps, 0, epochs)


def first_rate(settings: RunSettings, samples: int) -> float:
    """Return `init_lr`, scaled to the samples per step of all processes."""
    return settings.init_lr if settings.lr_batch is None else settings.init_lr * samples / settings.lr_batch


def compression_rates(settings: RunSettings, highest: float, steps_per_epoch: int) -> tuple[Schedule, Schedule]:
    """Return the schedules of a search that is a training of its own, and of the other epochs.

    The published recipe searches at a constant rate, and lets that of retraining fall; other methods have one training,
    whose rate warms up and falls once.
    """
    planned = phases(settings, steps_per_epoch)
    if settings.method == "reference":
        rate = highest if settings.search_lr is None else settings.search_lr
        return lambda _step: rate, falling(settings, highest, planned.retrain, steps_per_epoch)
    whole = falling(settings, highest, planned.retrain, steps_per_epoch, warmup=_WARMUP)
    return whole, whole


def falling(settings: RunSettings, highest: float, epochs: int, steps_per_epoch: int, warmup: float = 0.0) -> Schedule:
    """Return the schedule from `highest` down to `min_lr` that the settings choose, after a warm-up.

    Args:
        settings: of the run.
        highest: learning rate after the warm-up.
        epochs: that it spans.
        steps_per_epoch: optimizer steps.
        warmup: share of all steps that warm up, where the settings do not say how many.
    """
    by_epoch = settings.schedule == "epoch"
    total = epochs if by_epoch else epochs * steps_per_epoch
    lowest = min(settings.min_lr, highest)
    warm = (settings.warmup_steps or 0) + settings.warmup_epochs * steps_per_epoch
    if settings.warmup_steps is None and not settings.warmup_epochs:
        warm = round(warmup * epochs * steps_per_epoch)

    def rate(step: int) -> float:
        place = (step // steps_per_epoch if by_epoch else step) / total
        polynomial = settings.schedule == "polynomial"
        share = (1 - place) ** _POWER if polynomial else (1 + math.cos(math.pi * place)) / 2
        value = lowest + (highest - lowest) * share
        return value * min(1.0, (step + 1) / warm) if warm else value

    return rate
