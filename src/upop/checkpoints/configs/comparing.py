"""Compares the outputs of two models on inputs that the first is known to accept."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from upop.pruning.seen import examples_of
from upop.pruning.verify import Outputs, difference, outputs_of, refuse_unlike, rounding_of


def compared(model: nn.Module, plain: nn.Module) -> tuple[Any, Outputs] | str:
    """Return inputs and the first model's outputs if both models agree on them; otherwise the difference, as text."""
    for example in examples_of(model):
        try:
            expected = outputs_of(model, example)
        except Exception:  # generated inputs may not suit the model
            continue
        why = differing_from(plain, example, expected)
        return (example, expected) if why is None else why
    return "no inputs are known that the model accepts, so the two models cannot be compared"


def differing(model: nn.Module, other: nn.Module) -> str | None:
    """Return how the outputs of two models differ, as text; None if they agree but for rounding."""
    found = compared(model, other)
    return found if isinstance(found, str) else None


def differing_from(model: nn.Module, example: Any, expected: Outputs) -> str | None:
    """Return how a model's outputs differ from the expected ones, as text; None if by no more than rounding."""
    try:
        found = outputs_of(model, example)
        refuse_unlike(expected, found)
    except Exception as error:  # raised by the model where sizes do not fit
        return str(error) or type(error).__name__
    precision = next(each.dtype for each in model.parameters() if each.is_floating_point())
    rounding = partial(rounding_of, partial(outputs_of, model, example), outputs=found)
    off = difference(expected, found, rounding, dtype=precision)
    return None if off is None else f"its {off.place} differs by {off.size:.1e} of its largest element"
