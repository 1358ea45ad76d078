"""The registry of rules, each of which describes what a tensor operation does to axes, and their helpers.

The rules are in `moving` and `products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Any

import torch

from upop.pruning.axes.axis import Dim, fix
from upop.pruning.axes.label import Label
from upop.pruning.axes.mode import name_of, tensors_in

if TYPE_CHECKING:
    from upop.pruning.axes.trace import Trace

Rule = Callable[["Trace", tuple[Any, ...], dict[str, Any], Any, str], None]
RULES: dict[str, Rule] = {}
"""By the name of the operation, as ATen calls it."""

CONSTANT = "it meets numbers of that shape which are no parameters"


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register the rule for operations of these names, which spaces separate."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return register


def follow(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Label the outputs of an operation, and tie the axes that it couples."""
    name = name_of(func)
    elementwise = torch.Tag.pointwise in getattr(func, "tags", ())
    rule = RULES.get(name) or RULES.get(name.removesuffix("_")) or (RULES["mul"] if elementwise else unknown)
    rule(trace, args, kwargs, result, name)


def argument(args: Any, kwargs: Any, place: int, name: str, default: Any) -> Any:
    """Return an argument of an operation, given by place or by name."""
    return args[place] if len(args) > place else kwargs.get(name, default)


def like(label: Label, dims: Sequence[Dim]) -> Label:
    """Return a label like another one, with new dimensions."""
    return replace(label, dims=list(dims))


def unknown(trace: Trace, args: Any, kwargs: Any, result: Any, name: str) -> None:
    """Fix all inputs of an operation without a rule."""
    for tensor in tensors_in((args, kwargs)):
        for dim in trace.label(tensor).dims:
            fix(dim, f"no rule follows it through {name}")


def past_of(labels: Sequence[Label]) -> int:
    """Return the parameters that tensors depend on, as bits."""
    return reduce(or_, (label.past for label in labels), 0)


def attends_of(labels: Sequence[Label]) -> Dim:
    """Return the axes over which queries and keys were contracted, if any tensor holds attention scores."""
    return next((label.attends for label in labels if label.attends), ())
