"""How much a model keeps, read off the model itself, and how a dense one is brought to such sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any

from torch import nn

from upop.checkpoints.fitting.fit import kept_sizes
from upop.checkpoints.fitting.meta import outline
from upop.errors import CheckpointError, PlanError, nearest
from upop.pruning import Attribute, Group, Plan, find_groups, find_prunable, remember
from upop.pruning.known import remembered, sized
from upop.pruning.shrink import cut
from upop.values import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sizes = dict[str, tuple[int, int]]
"""Group -> (kept channels, channels of the dense model), of the groups that lost some."""


def dense_meta_copy(model: PreTrainedModel) -> nn.Module:
    """Return the dense model that `model` was cut from, as its configuration describes it, without weights.

    What is known of the groups of `model` is known of it.
    """
    dense = outline(lambda: type(model)(copy.deepcopy(model.config)))
    found = remembered(model)
    if found is not None:
        remember(dense, found)
    return dense


def sizes_of(model: nn.Module, dense: nn.Module) -> Sizes:
    """Return what `model` keeps of `dense`, which has the same modules.

    Raises:
        CheckpointError: a tensor has no size that cutting `dense` can give it.
    """
    groups = find_prunable(dense).groups
    kept = kept_sizes(groups, model.state_dict(), type(model).__name__)
    return {
        group.name: (kept[group.name], group.size) for group in groups if kept.get(group.name, group.size) < group.size
    }


def resize(
    model: nn.Module, sizes: Mapping[str, tuple[int, int]], written: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Cut a dense model to sizes, whichever channels go: its weights are to be replaced.

    Args:
        model: the dense model.
        sizes: group -> (kept channels, channels of the dense model).
        written: group -> all that a cut of it takes, as JSON values; without it the groups are found.

    Raises:
        PlanError: the model has no such group, or one of another size.
    """
    if not sizes:
        return
    if written:
        kept = {name: tuple(range(left)) for name, (left, _) in sizes.items()}
        plan = Plan(kept, {name: size for name, (_, size) in sizes.items()}, slices=written)
        cut(model, plan.check(model), plan, fold=False)  # what else the model has is not written here
        return
    groups = {group.name: group for group in find_groups(model)}
    wrong = [
        f"{name}: the model has no such group{nearest(name, list(groups))}"
        if name not in groups
        else f"{name}: {kept} of {size} channels were kept, the model has {groups[name].size}"
        for name, (kept, size) in sizes.items()
        if name not in groups or groups[name].size != size
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise PlanError(
            f"What was kept of another model does not fit {type(model).__name__}: {'; '.join(wrong[:5])}{more}. "
            "Load the folder with the class and the configuration that it was saved with."
        )
    found = find_prunable(model)
    chosen = {group.name: _natural(model, group) for group in groups.values() if group.name in sizes}
    cut(model, list(chosen.values()), {name: range(left) for name, (left, _) in sizes.items()}, fold=False)
    remember(model, replace(found, groups=tuple(chosen.get(group.name, group) for group in found.groups)))


def sizes_before(groups: Sequence[Group], dense: nn.Module) -> dict[str, int]:
    """Return group -> channels in the dense model, of the groups of a model that may be cut.

    The dense model is read only where the lengths of its tensors do not say it.
    """
    whole = {group.name: sized(dense, group) for group in groups if not any(part.gaps for part in group.slices)}
    found = {name: group.size for name, group in whole.items() if group is not None}
    return found if len(found) == len(groups) else {group.name: group.size for group in find_prunable(dense).groups}


def _natural(model: nn.Module, group: Group) -> Group:
    """Return a group whose softmax scale follows the size of the heads: so are weights written that say nothing of it.

    Where the scale is a number that a module keeps, and a group of today leaves it alone, it is set again.
    """
    if group.channel != "dimension" or any(part.power and (part.query_groups or part.queries) for part in group.slices):
        return group
    described = {(each.module, each.name) for each in group.attributes}
    scales = [
        Attribute(group.name, name, None)
        for name, value in vars(model.get_submodule(group.name)).items()
        if isinstance(value, float) and abs(value * group.size**0.5 - 1) < 1e-6 and (group.name, name) not in described
    ]
    return replace(group, attributes=(*group.attributes, *scales))


def sizes_from_json(value: Any, source: str) -> Sizes:
    """Return sizes as JSON holds them: group -> [kept, size].

    Raises:
        CheckpointError: the value is something else.
    """
    try:
        sizes = {str(name): (index(kept), index(size)) for name, (kept, size) in value.items()}
    except (AttributeError, TypeError, ValueError):
        sizes = {"": (1, 0)}
    wrong = next((name for name, (kept, size) in sizes.items() if not 0 <= kept <= size), None)
    if wrong is not None:
        found = f"{wrong}: {value[wrong]}" if wrong else shortened(value)
        raise CheckpointError(
            f"{source} should say of every group how many channels it keeps of how many, [kept, size]; found {found}. "
            "Write the model again."
        )
    return sizes


def plan_for(plan: Plan, groups: Iterable[Group]) -> Plan:
    """Return the part of a plan that is about groups as they are: others went when whole layers were dropped."""
    present = {group.name: group.size for group in groups}
    kept = {name: channels for name, channels in plan.kept.items() if present.get(name) == len(channels)}
    slices = {name: group for name, group in plan.slices.items() if name in kept}
    return Plan(kept, {name: plan.sizes[name] for name in kept}, plan.settings, slices)
