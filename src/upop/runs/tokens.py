"""Fewer image tokens in a run: as many as the settings ask for, or as share one budget with the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from upop.errors import SettingError
from upop.pruning.calibrate import Loss
from upop.settings import AUTO, RunSettings
from upop.tokens.budget import Goal, best_of, find_shares, goal_of, split
from upop.tokens.encoders import merge_again, merge_tokens

_SHARES = (0.0, 0.25, 0.5, 0.75)
"""What tokens may take of a budget in a run that searches for weights too."""


def merge_as_asked(model: nn.Module, settings: RunSettings) -> nn.Module:
    """Have a model merge image tokens as the settings say; without a number it stays as it is.

    Raises:
        LayoutError: it cannot merge any.
        SettingError: not so many are there.
    """
    if settings.tokens is None:
        return model
    if isinstance(settings.tokens, str):
        raise SettingError(
            f"tokens={AUTO} shares out the target of a compression, and nothing is compressed here. Give a number of "
            "tokens for every layer, or the share of the encoder's multiply-adds to save."
        )
    return merge_tokens(model, settings.tokens)


def share_budget(
    model: nn.Module,
    settings: RunSettings,
    example: Any,
    batches: Callable[[], Sequence[Any]],
    loss: Loss,
    notify: Callable[[str], None],
    **calibration: Any,
) -> dict[str, Any]:
    """Have a model merge tokens before its weights are cut, and return the budget of those.

    A target of multiply-adds is one of the model with all tokens.

    Args:
        model: dense; it is changed in place.
        settings: of the run.
        example: inputs for one forward pass.
        batches: makes calibration batches, for tokens=auto.
        loss: of a batch.
        notify: is told what was decided.
        calibration: arguments of `upop.calibrate`.
    """
    budget = settings.budget
    if settings.tokens is None:
        return budget
    counts_macs = settings.target is not None and "macs" in settings.target
    goal: Goal | None = goal_of(model, settings.target, example) if counts_macs and settings.target else None
    if isinstance(settings.tokens, str):
        assert goal is not None
        ranking, held = split(list(batches()))
        found = find_shares(model, ranking, held, goal, loss=loss, shares=_SHARES, **calibration)
        chosen = best_of(found, goal)
        losses = ", ".join(f"{each.share:.0%}: {'-' if each.loss is None else f'{each.loss:.4g}'}" for each in found)
        notify(f"of the multiply-adds that go, tokens take {chosen.share:.0%} (held-out loss by share {losses})")
        if any(map(any, chosen.removed)):
            merge_again(model, chosen.removed)
    else:
        merge_tokens(model, settings.tokens)
    return budget if goal is None else {**budget, "target": goal.of_weights}
