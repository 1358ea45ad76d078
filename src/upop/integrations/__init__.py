"""UPop inside other training loops: transformers' Trainer and Lightning, as callbacks.

`from upop.integrations import TrainerCallback, LightningCallback`. A loop on Accelerate needs no callback, only
`pruner.step()` between `accelerator.backward` and `optimizer.step`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upop.integrations.lightning import LightningCallback
    from upop.integrations.trainer import TrainerCallback

__all__ = ["LightningCallback", "TrainerCallback"]


def __getattr__(name: str) -> Any:
    # Each callback needs a library of its own, which is only loaded where it is asked for.
    if name == "TrainerCallback":
        from upop.integrations.trainer import TrainerCallback

        return TrainerCallback
    if name == "LightningCallback":
        from upop.integrations.lightning import LightningCallback

        return LightningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
