"""Registers which sizes a model's configuration has, for `uniform="tower"`; import this before a search.

The import takes torch alone; the rest is imported when a uniform search asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from upop.pruning import Group, uniform

if TYPE_CHECKING:
    from upop.checkpoints.configs.builders import Builder


def config_sizes(model: nn.Module, groups: Sequence[Group]) -> uniform.ConfigSizes | None:
    """Return the groups whose sizes are fields of a dense model's configuration; None if it has no configuration."""
    from upop.checkpoints.configs.builders import builder_of
    from upop.checkpoints.configs.size_fields import size_fields

    builder = builder_of(model)
    if builder is None:
        return None
    found = size_fields(model, groups, builder)
    return uniform.ConfigSizes(
        tuple(uniform.Tower(each.groups, each.sizes) for each in found),
        builder.by,
        partial(_counted_layers, model, groups, builder),
    )


def _counted_layers(model: nn.Module, groups: Sequence[Group], builder: Builder) -> dict[str, tuple[str, ...]]:
    from upop.checkpoints.configs.layers import stacks

    return {
        f"{stack.path}.{place}": names
        for stack in stacks(model, groups, builder)
        for place, names in stack.layers.items()
    }


uniform.register(config_sizes)
