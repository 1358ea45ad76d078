"""Reading units off what a model computes: trace, follow, group, settle, prove."""

from upop.pruning.axes.examples import example_for
from upop.pruning.axes.reader import read
from upop.pruning.axes.settle import SWAPS
from upop.pruning.axes.stated import with_stated
from upop.pruning.axes.twins import with_twins

__all__ = ["SWAPS", "example_for", "read", "with_stated", "with_twins"]
