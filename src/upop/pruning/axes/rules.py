"""What every tensor operation does to axes: one short rule for each kind of operation."""

from __future__ import annotations

from typing import Any

import torch

from upop.pruning.axes import products  # noqa: F401 - its rules are registered
from upop.pruning.axes.mode import name_of
from upop.pruning.axes.moving import elementwise
from upop.pruning.axes.rule import RULES, unknown
from upop.pruning.axes.trace import Trace


def follow(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Label the outputs of an operation, and tie the axes that it couples."""
    name = name_of(func)
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if rule is None:
        tags = getattr(func, "tags", ())
        rule = elementwise if torch.Tag.pointwise in tags else unknown
    rule(trace, args, kwargs, result, name)
