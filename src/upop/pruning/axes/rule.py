"""The registry of rules, each of which describes what a tensor operation does to axes, and their helpers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from upop.pruning.axes.axis import Dim, fix
from upop.pruning.axes.label import Label
from upop.pruning.axes.mode import tensors_in
from upop.pruning.axes.trace import Trace

Rule = Callable[[Trace, tuple[Any, ...], dict[str, Any], Any, str], None]
RULES: dict[str, Rule] = {}
"""By the name of the operation, as ATen calls it."""

CONSTANT = "it meets numbers of that shape which are no parameters"


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule for operations of these names."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


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
    past = 0
    for label in labels:
        past |= label.past
    return past


def attends_of(labels: Sequence[Label]) -> Dim:
    """Return the axes over which queries and keys were contracted, if any tensor holds attention scores."""
    return next((label.attends for label in labels if label.attends), ())
