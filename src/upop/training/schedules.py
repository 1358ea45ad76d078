"""Learning rates by optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable

from upop.settings import RunSettings

Schedule = Callable[[int], float]
_POWER = 0.9  # of the published polynomial schedule


def first_rate(settings: RunSettings, records: int) -> float:
    """Return `init_lr` for steps over so many records, of all processes together."""
    return settings.init_lr if settings.lr_batch is None else settings.init_lr * records / settings.lr_batch


def constant(settings: RunSettings, highest: float) -> Schedule:
    """Return the search's schedule: the same rate throughout, `search_lr`, or else `highest`."""
    rate = highest if settings.search_lr is None else settings.search_lr
    return lambda _step: rate


def falling(settings: RunSettings, highest: float, epochs: int, steps_per_epoch: int) -> Schedule:
    """Return the schedule from `highest` down to `min_lr` that the settings choose, after a warm-up."""
    by_epoch = settings.schedule == "epoch"
    total = epochs if by_epoch else epochs * steps_per_epoch
    lowest = min(settings.min_lr, highest)
    warmup = settings.warmup_steps + settings.warmup_epochs * steps_per_epoch

    def rate(step: int) -> float:
        place = (step // steps_per_epoch if by_epoch else step) / total
        polynomial = settings.schedule == "polynomial"
        share = (1 - place) ** _POWER if polynomial else (1 + math.cos(math.pi * place)) / 2
        value = lowest + (highest - lowest) * share
        return value * min(1.0, (step + 1) / warmup) if warmup else value

    return rate
