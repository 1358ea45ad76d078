"""Momentum encoders (He et al., 2020): modules that a moving average of their weights follows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from upop.pruning.deprecated import outside_upop, warn_renamed

_OLD, _NEW = "momentum_twins", "momentum_encoders"


def momentum_encoders(model: nn.Module) -> Mapping[str, str]:
    """Return the `momentum_encoders` of a model: module or parameter name -> name of its copy; may be empty."""
    found: Mapping[str, str] | None = getattr(model, _NEW, None)
    if found is None and (found := getattr(model, _OLD, None)) is not None:
        kind = type(model).__name__
        warn_renamed(f"{kind}.{_OLD}", f"{kind}.{_NEW}", stacklevel=outside_upop())
    return found or {}
