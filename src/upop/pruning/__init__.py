"""The method: unified and progressive pruning. Knows nothing of tasks, files or commands."""

from upop.pruning.calibrate import calibrate
from upop.pruning.costs import count_macs, count_parameters
from upop.pruning.distill import Distillation, distill
from upop.pruning.known import Survey, remember
from upop.pruning.magnitude import plan_by_magnitude
from upop.pruning.masks import unmask
from upop.pruning.plan import Plan
from upop.pruning.pruner import Pruner
from upop.pruning.scores import SCORES
from upop.pruning.sharded import skeleton
from upop.pruning.shrink import shrink
from upop.pruning.stated import UnitSpec
from upop.pruning.surveys import find_units, survey
from upop.pruning.units import Attribute, Skipped, Slice, Swap, Unit
from upop.pruning.whole import gather

__all__ = [
    "SCORES",
    "Attribute",
    "Distillation",
    "Plan",
    "Pruner",
    "Skipped",
    "Slice",
    "Survey",
    "Swap",
    "Unit",
    "UnitSpec",
    "calibrate",
    "count_macs",
    "count_parameters",
    "distill",
    "find_units",
    "gather",
    "plan_by_magnitude",
    "remember",
    "shrink",
    "skeleton",
    "survey",
    "unmask",
]
