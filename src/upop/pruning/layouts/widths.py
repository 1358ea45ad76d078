"""Forwards that take the width of the heads from the width of their input: the same forwards, without that."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from types import FunctionType

from torch import nn

from upop.pruning.layouts.source import methods_of

# Per library and class: what its methods say of the width of the heads, and what says the same of the tensor at hand.
_REWRITES: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {}


@cache
def without_input_width(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return a subclass of `kind` whose forward works at any width of the heads; None if none is known."""
    return None
