"""Registers the sizes that configurations of libraries have, for `uniform="tower"`; import it before a search."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from upop.pruning import Group, uniform


def _config_sizes(model: nn.Module, groups: Sequence[Group]) -> uniform.ConfigSizes | None:
    from upop.checkpoints import plain  # imports libraries, so only when a uniform search asks

    return plain.config_sizes(model, groups)


uniform.register(_config_sizes)
