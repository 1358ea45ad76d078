"""What a model may declare because tracing one call does not show it: one protocol, and how its members are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from upop.pruning.deprecated import outside_upop, warn_renamed
from upop.pruning.errors import LayoutError


class ModelTraits(Protocol):
    """Optional attributes of a model, independent of each other.

    A model may have them by name alone, or derive from this class, which gives those it does not set:

        class Contrast(nn.Module, upop.ModelTraits):
            momentum_encoders = {"encoder": "slow_encoder"}
    """

    momentum_encoders: Mapping[str, str] = {}
    """Name of a module or parameter -> name of its momentum encoder (MoCo, He et al., 2020): a copy that training moves
    towards it. `find_prunable` cuts the copy with what it copies, and proves that it computes the same. Targets and
    reports count no parameters and multiply-adds of copies; `count_parameters` counts all that there are."""

    read_by_others: Sequence[str] = ()
    """Names of modules whose weights another module's forward reads. FSDP keeps these weights whole."""

    def replay_arguments(self) -> Mapping[str, Any]:
        """Return the arguments that repeat the last forward pass: name -> value, in place of what the call was given.

        A model that draws samples in its forward pass returns what it drew. The teacher of `distill` and the observers
        of the search are then given the same.
        """
        return {}


_OLDER = {
    "momentum_encoders": "momentum_twins",
    "read_by_others": "read_across",
    "replay_arguments": "for_teacher",
}
"""Member -> what it was called before."""


def momentum_encoders(model: nn.Module) -> Mapping[str, str]:
    """Return a model's `ModelTraits.momentum_encoders`; empty without any.

    Raises:
        LayoutError: it is no mapping.
    """
    found = _trait(model, "momentum_encoders") or {}
    if not isinstance(found, Mapping):
        raise LayoutError(
            f"{type(model).__name__}.momentum_encoders must map names to names of momentum encoders, such as "
            f"{{'encoder': 'slow_encoder'}}; found {found!r}."
        )
    return found


def momentum_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of all that lies in a momentum encoder begin with."""
    return tuple(f"{copy}." for copy in momentum_encoders(model).values())


def read_by_others(model: nn.Module) -> Sequence[str]:
    """Return a model's `ModelTraits.read_by_others`; empty without any."""
    return _trait(model, "read_by_others") or ()


def replay_arguments(model: nn.Module) -> Mapping[str, Any]:
    """Return what a model's `ModelTraits.replay_arguments` returns; empty without the method."""
    found = _trait(model, "replay_arguments")
    return found() if callable(found) else {}


def _trait(model: nn.Module, name: str) -> Any:
    found = getattr(model, name, None)
    if found is None and (found := getattr(model, _OLDER[name], None)) is not None:
        kind = type(model).__name__
        warn_renamed(f"{kind}.{_OLDER[name]}", f"{kind}.{name}", stacklevel=outside_upop())
    return found
