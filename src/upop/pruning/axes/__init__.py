"""Reading groups off what a model computes: trace, follow, group, settle, prove."""

from upop.pruning.axes import moving, products  # noqa: F401 - their rules are registered
from upop.pruning.axes.examples import example_for
from upop.pruning.axes.momentum import with_momentum_encoders
from upop.pruning.axes.reader import read
from upop.pruning.axes.settle import SWAPS
from upop.pruning.axes.stated import with_stated
from upop.pruning.axes.streams import with_streams

__all__ = ["SWAPS", "example_for", "read", "with_momentum_encoders", "with_stated", "with_streams"]
