"""Finds what `torch.compile` made, which runs a model without calling its hooks."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

from torch import nn

from upop.pruning.again import referring_to, with_subclasses

_EVAL_FRAME = "torch._dynamo.eval_frame"


def all_compiled() -> tuple[list[nn.Module], bool]:
    """Return all wrappers of modules by `torch.compile`, and whether a live compiled function may run a model.

    Everything that lives is looked through for both at once, which takes a tenth of a second or more, unless torch
    knows of no code that it should compile.
    """
    loaded = sys.modules.get(_EVAL_FRAME)
    known = getattr(getattr(loaded, "always_optimize_code_objects", None), "values", True)
    if loaded is None or not known:
        return [], False
    kinds = with_subclasses(loaded.OptimizedModule)
    found = referring_to(*kinds, vars(loaded))  # its functions hold its names
    function = any(
        type(each) is FunctionType
        and each.__code__.co_name == "compile_wrapper"
        and not _is_call(vars(each).get("_torchdynamo_orig_callable"))
        for each in found
    )
    return [each for each in found if type(each) in kinds], function


def _is_call(function: Any) -> bool:
    """Whether a function is the call of a module, as compiled by wrappers and `module.compile()`."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    calls = (nn.Module.__call__, nn.Module._call_impl)
    return isinstance(function, nn.Module) or getattr(function, "__func__", None) in calls


def in_compiled_function() -> bool:
    """Whether the caller is a compiled function that runs eagerly now."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == _EVAL_FRAME:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
