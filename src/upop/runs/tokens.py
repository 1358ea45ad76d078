"""Fewer image tokens in a run: as many as the settings ask for, or as share one budget with the weights."""

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


def check_shared_budget(model: nn.Module, settings: RunSettings, example: Any, **calibration: Any) -> None:
    """Raise the errors of `share_budget`, and those of `calibrate` for what it leaves, before any long computation.

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
            merge_share(model, goal, _SHARES[-1])  # more tokens leave more for weights
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
    """Return what a target of multiply-adds leaves of a model with all tokens; None where tokens have no part in it."""
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
    """Have a model merge tokens before its weights are cut, and return the budget of those.

    A target of multiply-adds is one of the model with all tokens. All processes call this together, and the main one
    decides.

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
    goal = _goal(model, settings, example)
    if isinstance(settings.tokens, str):
        assert goal is not None
        ranking, held = split(list(batches()))
        found = find_shares(model, ranking, held, goal, loss=loss, shares=_SHARES, **calibration)
        decided = [best_of(found, goal)]
        broadcast_object_list(decided)  # losses that differ in a last bit may decide differently
        (chosen,) = decided
        losses = ", ".join(f"{each.share:.0%}: {'-' if each.loss is None else f'{each.loss:.4g}'}" for each in found)
        notify(f"of the multiply-adds that go, tokens take {chosen.share:.0%} (held-out loss by share {losses})")
        if any(map(any, chosen.removed)):
            merge_again(model, chosen.removed)
    else:
        merge_tokens(model, settings.tokens)
    return budget if goal is None else {**budget, "target": goal.of_weights}
