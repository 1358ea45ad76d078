"""Warnings of a search or of a one-shot cut."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

from torch import nn

from upop.pruning.coverage import coverage
from upop.pruning.errors import some_of
from upop.pruning.prunable import find_prunable


def warn_of_skipped(skipped: int, steps: int) -> None:
    """Warn of skipped steps."""
    warnings.warn(
        f"{skipped} of {steps} search steps had gradients that are not finite and were left out.",
        stacklevel=6,  # the caller of step(): no_grad adds a frame
    )


def warn_of_early_end(done: int, steps: int, reached: float, asked: str) -> None:
    """Warn that a search is cut before its last step."""
    warnings.warn(
        f"The search is cut after {done} of {steps} steps: it removed {reached:.0%} of the cost instead of {asked}.",
        stacklevel=5,
    )


def warn_of_unscored(unscored: list[str], groups: int, steps: int) -> None:
    """Warn of groups that the loss did not depend on."""
    warnings.warn(
        f"{len(unscored)} of {groups} groups had no gradient in {steps} search steps, so their importance is unknown "
        f"and most of their channels are pruned ({some_of(unscored)}). Give a loss that depends on them, or exclude "
        "them.",
        stacklevel=7,  # the caller of step(): no_grad adds a frame
    )


def warn_of_none(corrected: Sequence[bool], advice: str, *, stacklevel: int) -> None:
    """Warn if no layer that lost inputs was corrected.

    Args:
        corrected: whether each layer was corrected.
        advice: what to do about it.
        stacklevel: that of the user's call.
    """
    if corrected and not any(corrected):
        warnings.warn(
            "The correction changed nothing: on samples that it was not fitted on, it improved no consumer of pruned "
            f"channels. {advice} The cut itself is not affected.",
            stacklevel=stacklevel,
        )


_COVERED = 0.6


def warn_of_uncovered(model: nn.Module) -> None:
    """Warn if groups cover less than 60 % of the parameters in a model's blocks."""
    found = find_prunable(model)
    covered = coverage(model, found.groups, found.skipped)
    if covered.of_blocks >= _COVERED:
        return
    reason, _ = Counter(covered.reasons.values()).most_common(1)[0]
    first = next(name for name, each in covered.reasons.items() if each == reason)
    warnings.warn(
        f"{100 * covered.of_blocks:.0f} % of the parameters in the blocks of this {type(model).__name__} are in "
        f"groups; the others stay whole ({len(covered.reasons)} weights, such as {first}: {reason}). "
        "upop.find_prunable(model).coverage.reasons lists all reasons; groups=[upop.GroupSpec(...)] states groups "
        "that you know.",
        stacklevel=6,
    )
