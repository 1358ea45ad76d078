"""Callbacks for transformers' Trainer and Lightning.

`from upop.integrations import TrainerCallback, LightningCallback`. A loop with Accelerate needs no callback:
`upop.Compression` works in it as in any other loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upop.integrations.lightning import LightningCallback
    from upop.integrations.trainer import TrainerCallback

__all__ = ["LightningCallback", "TrainerCallback"]


def __getattr__(name: str) -> Any:
    # Each callback imports its library on first use.
    if name == "TrainerCallback":
        from upop.integrations.trainer import TrainerCallback

        return TrainerCallback
    if name == "LightningCallback":
        from upop.integrations.lightning import LightningCallback

        return LightningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
