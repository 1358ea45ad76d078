"""Token merging in a run: a fixed number of image tokens, or a share of one budget with the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from upop.errors import SettingError
from upop.pruning.calibrate import Loss, check_budget
from upop.settings import AUTO, RunSettings
from upop.tokens.budget import Goal, best_of, find_shares, goal_of, merge_share, split
from upop.tokens.encoders import merge_again, merge_tokens, removed_tokens

_SHARES = (0.0, 0.25, 0.5, 0.75)
"""Shares of the budget that `tokens=auto` tries for token merging; weights take the rest."""


def merge_by_settings(model: nn.Module, settings: RunSettings) -> nn.Module:
    """Turn on token merging by the settings, in place; without `tokens` the model is unchanged.

    Raises:
        LayoutError: the model cannot merge tokens.
        SettingError: it has fewer tokens than that, or `tokens` is "auto".
    """
    if settings.tokens is None:
        return model
    if isinstance(settings.tokens, str):
        raise SettingError(
            f"tokens={AUTO} divides the target of a compression between tokens and weights, and nothing is compressed "
            "here. Give the number of tokens to merge per layer, or the share of the encoder's multiply-adds to save."
        )
    return merge_tokens(model, settings.tokens)


def check_shared_budget(model: nn.Module, settings: RunSettings, example: Any, **calibration: Any) -> None:
    """Raise the errors of `share_budget`, and of `calibrate` for the weights' share, before any long computation.

    Args:
        model: dense; it is left as it is.
        settings: of the run.
        example: inputs for one forward pass.
        calibration: arguments of `upop.pruning.calibrate.check_budget`, without the budget.
    """
    budget, goal, merging = settings.budget, _goal(model, settings, example), removed_tokens(model)
    if settings.tokens is None:
        check_budget(model, example=example, **budget, **calibration)
        return
    try:
        if isinstance(settings.tokens, str):
            assert goal is not None
            merge_share(model, goal, _SHARES[-1])  # the largest share leaves the weights the most
        else:
            merge_tokens(model, settings.tokens)
        if goal is not None:
            budget = {**budget, "target": goal.of_weights}
        check_budget(model, example=example, **budget, **calibration)
    finally:
        merge_tokens(model, 0)
        if merging is not None:
            merge_again(model, merging)


def _goal(model: nn.Module, settings: RunSettings, example: Any) -> Goal | None:
    """Return the goal of a target of multiply-adds for the model with all tokens; None if tokens do not share it."""
    target = settings.target
    if settings.tokens is None or target is None or "macs" not in target:
        return None
    return goal_of(model, target, example)


def share_budget(
    model: nn.Module,
    settings: RunSettings,
    example: Any,
    batches: Callable[[], Sequence[Any]],
    loss: Loss,
    notify: Callable[[str], None],
    **calibration: Any,
) -> dict[str, Any]:
    """Turn on token merging before the weights are cut, and return the remaining budget for the weights.

    A target of multiply-adds refers to the model with all tokens. All processes call this together; the main one
    decides.

    Args:
        model: dense; it is changed in place.
        settings: of the run.
        example: inputs for one forward pass.
        batches: makes calibration batches, for tokens=auto.
        loss: of a batch.
        notify: called with a line about the decision.
        calibration: arguments of `upop.calibrate`.
    """
    budget = settings.budget
    if settings.tokens is None:
        return budget
    goal = _goal(model, settings, example)
    if isinstance(settings.tokens, str):
        assert goal is not None
        ranking, held = split(list(batches()))
        found = find_shares(model, ranking, held, goal, loss=loss, shares=_SHARES, **calibration)
        decided = [best_of(found, goal)]
        broadcast_object_list(decided)  # losses may differ in the last bit between processes
        (chosen,) = decided
        losses = ", ".join(f"{each.share:.0%}: {'-' if each.loss is None else f'{each.loss:.4g}'}" for each in found)
        notify(f"token merging saves {chosen.share:.0%} of the removed multiply-adds (held-out loss by share {losses})")
        if any(map(any, chosen.removed)):
            merge_again(model, chosen.removed)
    else:
        merge_tokens(model, settings.tokens)
    return budget if goal is None else {**budget, "target": goal.of_weights}
