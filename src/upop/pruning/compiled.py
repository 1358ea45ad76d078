"""Finds functions compiled by `torch.compile`, which run a model without calling its hooks."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

from torch import nn

from upop.pruning.again import referring_to

_EVAL_FRAME = "torch._dynamo.eval_frame"


def any_compiled_function() -> bool:
    """Whether any compiled function is alive that may run a model; compiled modules are found elsewhere."""
    if _EVAL_FRAME not in sys.modules:  # without it nothing was compiled
        return False
    return any(
        type(each) is FunctionType
        and each.__code__.co_name == "compile_wrapper"
        and not _is_call(vars(each).get("_torchdynamo_orig_callable"))
        for each in referring_to(vars(sys.modules[_EVAL_FRAME]))  # its functions hold its names
    )


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
