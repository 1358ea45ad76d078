"""The phases of a compression, and learning rates per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from upop.compression import steps_of_search
from upop.errors import SettingError
from upop.settings import RunSettings

Schedule = Callable[[int], float]
ONE_SHOT_METHODS = ("magnitude", "one-shot")
"""Methods that cut once, before training."""
_POWER = 0.9  # of the published polynomial schedule
_WARMUP = 0.05
"""Share of all steps for the warm-up, if search and retraining share one schedule."""


@dataclass(frozen=True)
class Phases:
    """The phases of a compression.

    Attributes:
        search_steps: number of search steps, after which the model is cut.
        search: epochs of a separate search, as published; 0 if the search is the beginning of `retrain`.
        retrain: the other epochs.
    """

    search_steps: int
    search: int
    retrain: int


def check_epochs(settings: RunSettings) -> None:
    """Raise a `SettingError` if a compression has too few epochs to search and to retrain."""
    if settings.all_epochs < 2 and settings.method not in ONE_SHOT_METHODS:
        raise SettingError(
            f"epochs: {settings.all_epochs} is too few for method {settings.method}, which searches, cuts the model "
            "and retrains it for at least one epoch. Give 2 or more (--epochs 2)."
        )


def phases(settings: RunSettings, steps_per_epoch: int) -> Phases:
    """Return the phases of a compression; their total of epochs does not depend on the method."""
    epochs = settings.all_epochs
    if settings.method in ONE_SHOT_METHODS:
        return Phases(0, 0, epochs)
    if settings.method == "reference":
        return Phases(
            settings.searching_epochs * steps_per_epoch, settings.searching_epochs, settings.retraining_epochs
        )
    total = epochs * steps_per_epoch
    steps = min(
        steps_of_search(total, settings.search_share), total - steps_per_epoch
    )  # leaves at least one epoch of retraining
    return Phases(steps, 0, epochs)


def first_rate(settings: RunSettings, samples: int) -> float:
    """Return `init_lr`, scaled to the samples per step of all processes."""
    return settings.init_lr if settings.lr_batch is None else settings.init_lr * samples / settings.lr_batch


def compression_rates(settings: RunSettings, highest: float, steps_per_epoch: int) -> tuple[Schedule, Schedule]:
    """Return the learning rate schedules of the search and of retraining.

    The published recipe searches at a constant rate, and decays it in retraining. Other methods have one schedule, with
    one warm-up and one decay.
    """
    planned = phases(settings, steps_per_epoch)
    if settings.method == "reference":
        rate = highest if settings.search_lr is None else settings.search_lr
        return lambda _step: rate, decay(settings, highest, planned.retrain, steps_per_epoch)
    whole = decay(settings, highest, planned.retrain, steps_per_epoch, warmup=_WARMUP)
    return whole, whole


def decay(settings: RunSettings, highest: float, epochs: int, steps_per_epoch: int, warmup: float = 0.0) -> Schedule:
    """Return the schedule of the settings, a warm-up and a decay from `highest` to `min_lr`.

    Args:
        settings: of the run.
        highest: learning rate after the warm-up.
        epochs: length of the schedule.
        steps_per_epoch: optimizer steps.
        warmup: share of all steps for the warm-up, if the settings give none.
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
