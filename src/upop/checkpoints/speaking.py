"""Has a uniform search ask a model's library what its configurations can say; imported before anything searches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from upop.pruning import Group, uniform


def _said(model: nn.Module, groups: Sequence[Group]) -> uniform.Said | None:
    from upop.checkpoints import plain  # which imports much

    return plain.read_sayable(model, groups)


uniform.register(_said)
