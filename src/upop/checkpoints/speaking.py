"""Has a uniform search ask a model's library what its configurations can say; imported before anything searches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from upop.pruning import Unit, uniform


def _said(model: nn.Module, units: Sequence[Unit]) -> uniform.Said | None:
    from upop.checkpoints import plain  # which imports much

    return plain.read_sayable(model, units)


uniform.register(_said)
