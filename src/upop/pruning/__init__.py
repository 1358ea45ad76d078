"""The method, unified and progressive pruning; independent of tasks, teachers, files and commands."""

from upop.pruning.calibrate import calibrate
from upop.pruning.costs import count_macs, count_parameters
from upop.pruning.deprecated import older_names
from upop.pruning.groups import Attribute, Group, Skipped, Slice, Swap
from upop.pruning.known import Prunable, remember
from upop.pruning.magnitude import plan_by_magnitude
from upop.pruning.masks import unmask
from upop.pruning.plan import Plan
from upop.pruning.prunable import find_groups, find_prunable
from upop.pruning.pruner import Pruner
from upop.pruning.scores import SCORES
from upop.pruning.sharded import meta_copy
from upop.pruning.shrink import shrink
from upop.pruning.stated import GroupSpec
from upop.pruning.traits import ModelTraits
from upop.pruning.whole import full_copy

__getattr__ = older_names(__name__)


__all__ = [
    "SCORES",
    "Attribute",
    "Group",
    "GroupSpec",
    "ModelTraits",
    "Plan",
    "Prunable",
    "Pruner",
    "Skipped",
    "Slice",
    "Swap",
    "calibrate",
    "count_macs",
    "count_parameters",
    "find_groups",
    "find_prunable",
    "full_copy",
    "meta_copy",
    "plan_by_magnitude",
    "remember",
    "shrink",
    "unmask",
]
