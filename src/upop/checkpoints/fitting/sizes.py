"""Reads how many channels each group of a model keeps, and cuts a dense model to such sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any

from torch import nn

from upop.checkpoints.fitting.fit import kept_sizes
from upop.checkpoints.fitting.meta import meta_model
from upop.errors import CheckpointError, PlanError, nearest
from upop.pruning import Attribute, Group, Plan, find_groups, find_prunable, remember
from upop.pruning.known import remembered, sized
from upop.pruning.shrink import cut
from upop.values import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sizes = dict[str, tuple[int, int]]
"""Group -> (kept channels, channels of the dense model), for groups that were pruned."""


def dense_meta_copy(model: PreTrainedModel) -> nn.Module:
    """Return the dense model that the configuration of `model` describes, on the meta device.

    Groups that are cached for `model` are cached for it.
    """
    dense = meta_model(lambda: type(model)(copy.deepcopy(model.config)))
    found = remembered(model)
    if found is not None:
        remember(dense, found)
    return dense


def sizes_of(model: nn.Module, dense: nn.Module) -> Sizes:
    """Return the sizes of a model cut from `dense`.

    Raises:
        CheckpointError: a tensor has a shape that no cut of `dense` gives.
    """
    groups = find_prunable(dense).groups
    kept = kept_sizes(groups, model.state_dict(), type(model).__name__)
    return {
        group.name: (kept[group.name], group.size) for group in groups if kept.get(group.name, group.size) < group.size
    }


def resize(
    model: nn.Module, sizes: Mapping[str, tuple[int, int]], written: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Cut a dense model to given sizes; which channels are kept does not matter, since weights are loaded afterwards.

    Args:
        model: the dense model.
        sizes: group -> (kept channels, channels of the dense model).
        written: group -> its JSON form; without it, the model is traced for its groups.

    Raises:
        PlanError: the model has no such group, or one of another size.
    """
    if not sizes:
        return
    if written:
        kept = {name: tuple(range(left)) for name, (left, _) in sizes.items()}
        plan = Plan(kept, {name: size for name, (_, size) in sizes.items()}, slices=written)
        cut(model, plan.check(model), plan, fold=False)  # other groups of the model are not in `written`
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
            f"The recorded sizes do not fit {type(model).__name__}: {'; '.join(wrong[:5])}{more}. "
            "Load the folder with the class and the configuration that it was saved with."
        )
    found = find_prunable(model)
    chosen = {group.name: _natural(model, group) for group in groups.values() if group.name in sizes}
    cut(model, list(chosen.values()), {name: range(left) for name, (left, _) in sizes.items()}, fold=False)
    remember(model, replace(found, groups=tuple(chosen.get(group.name, group) for group in found.groups)))


def sizes_before(groups: Sequence[Group], dense: nn.Module) -> dict[str, int]:
    """Return group -> channels of the dense model.

    The dense model is traced only if the shapes of its tensors do not determine them.
    """
    whole = {group.name: sized(dense, group) for group in groups if not any(part.gaps for part in group.slices)}
    found = {name: group.size for name, group in whole.items() if group is not None}
    return found if len(found) == len(groups) else {group.name: group.size for group in find_prunable(dense).groups}


def _natural(model: nn.Module, group: Group) -> Group:
    """Return a group whose softmax scale follows head_dim, as older files without a record of it assume.

    A scale that a module stores as a number, and that the group does not set today, is added to it.
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
    """Read sizes from JSON: group -> [kept, size].

    Raises:
        CheckpointError: the value has another form.
    """
    try:
        sizes = {str(name): (index(kept), index(size)) for name, (kept, size) in value.items()}
    except (AttributeError, TypeError, ValueError):
        sizes = {"": (1, 0)}
    wrong = next((name for name, (kept, size) in sizes.items() if not 0 <= kept <= size), None)
    if wrong is not None:
        found = f"{wrong}: {value[wrong]}" if wrong else shortened(value)
        raise CheckpointError(
            f"{source} should give [kept, size] for every group; found {found}. Write the model again."
        )
    return sizes


def plan_for(plan: Plan, groups: Iterable[Group]) -> Plan:
    """Return the part of a plan whose groups still exist at that size, after whole layers were removed."""
    present = {group.name: group.size for group in groups}
    kept = {name: channels for name, channels in plan.kept.items() if present.get(name) == len(channels)}
    slices = {name: group for name, group in plan.slices.items() if name in kept}
    return Plan(kept, {name: plan.sizes[name] for name in kept}, plan.settings, slices)
