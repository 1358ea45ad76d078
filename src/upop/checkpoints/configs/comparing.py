"""Whether two models compute the same, on inputs that the first is known to take."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from upop.pruning.seen import examples_of
from upop.pruning.verify import Outputs, difference, outputs_of, refuse_unlike, rounding_of


def compared(model: nn.Module, plain: nn.Module) -> tuple[Any, Outputs] | str:
    """Return inputs for which two models compute the same, and what; else what differs."""
    for example in examples_of(model):
        try:
            expected = outputs_of(model, example)
        except Exception:  # what a model raises for inputs that were made up
            continue
        why = differing_from(plain, example, expected)
        return (example, expected) if why is None else why
    return "nothing is known that the model can be called with, so that the two could be compared"


def differing(model: nn.Module, other: nn.Module) -> str | None:
    """Say in what a model does not compute what another one does, on inputs that the first takes."""
    found = compared(model, other)
    return found if isinstance(found, str) else None


def differing_from(model: nn.Module, example: Any, expected: Outputs) -> str | None:
    """Say in what a model does not compute what is expected of it, but for rounding."""
    try:
        found = outputs_of(model, example)
        refuse_unlike(expected, found)
    except Exception as error:  # its own, where sizes do not fit
        return str(error) or type(error).__name__
    precision = next(each.dtype for each in model.parameters() if each.is_floating_point())
    rounding = partial(rounding_of, partial(outputs_of, model, example), outputs=found)
    off = difference(expected, found, rounding, dtype=precision)
    return None if off is None else f"its {off.place} differs by {off.size:.1e} of its largest element"
