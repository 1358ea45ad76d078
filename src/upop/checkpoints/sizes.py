"""How much a model keeps, read off the model itself, and how a dense one is brought to such sizes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, Any

from torch import nn

from upop.checkpoints.blank import outline
from upop.checkpoints.fit import kept_sizes
from upop.errors import CheckpointError, PlanError, nearest
from upop.pruning import Attribute, Plan, Unit, find_units, remember, survey
from upop.pruning.known import remembered, sized
from upop.pruning.shrink import cut
from upop.values import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sizes = dict[str, tuple[int, int]]
"""Unit -> (kept entries, entries of the dense model), of the units that lost some."""


def dense_skeleton(model: PreTrainedModel) -> nn.Module:
    """Return the dense model that `model` was cut from, as its configuration describes it, without weights.

    What is known of the units of `model` is known of it.
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
    units = survey(dense).units
    kept = kept_sizes(units, model.state_dict(), type(model).__name__)
    return {unit.name: (kept[unit.name], unit.size) for unit in units if kept.get(unit.name, unit.size) < unit.size}


def resize(
    model: nn.Module, sizes: Mapping[str, tuple[int, int]], written: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Cut a dense model to sizes, whichever entries go: its weights are to be replaced.

    Args:
        model: the dense model.
        sizes: unit -> (kept entries, entries of the dense model).
        written: unit -> all that a cut of it takes, as JSON values; without it the units are found.

    Raises:
        PlanError: the model has no such unit, or one of another size.
    """
    if not sizes:
        return
    if written:
        kept = {name: tuple(range(left)) for name, (left, _) in sizes.items()}
        plan = Plan(kept, {name: size for name, (_, size) in sizes.items()}, slices=written)
        cut(model, plan.check(model), plan, fold=False)  # what else the model has is not written here
        return
    units = {unit.name: unit for unit in find_units(model)}
    wrong = [
        f"{name}: the model has no such unit{nearest(name, list(units))}"
        if name not in units
        else f"{name}: {kept} of {size} entries were kept, the model has {units[name].size}"
        for name, (kept, size) in sizes.items()
        if name not in units or units[name].size != size
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise PlanError(
            f"What was kept of another model does not fit {type(model).__name__}: {'; '.join(wrong[:5])}{more}. "
            "Load the folder with the class and the configuration that it was saved with."
        )
    found = survey(model)
    chosen = {unit.name: _natural(model, unit) for unit in units.values() if unit.name in sizes}
    cut(model, list(chosen.values()), {name: range(left) for name, (left, _) in sizes.items()}, fold=False)
    remember(model, replace(found, units=tuple(chosen.get(unit.name, unit) for unit in found.units)))


def sizes_before(units: Sequence[Unit], dense: nn.Module) -> dict[str, int]:
    """Return unit -> entries in the dense model, of the units of a model that may be cut.

    The dense model is read only where the lengths of its tensors do not say it.
    """
    whole = {unit.name: sized(dense, unit) for unit in units if not any(part.gaps for part in unit.slices)}
    found = {name: unit.size for name, unit in whole.items() if unit is not None}
    return found if len(found) == len(units) else {unit.name: unit.size for unit in survey(dense).units}


def _natural(model: nn.Module, unit: Unit) -> Unit:
    """Return a unit whose softmax scale follows the size of the heads: so are weights written that say nothing of it.

    Where the scale is a number that a module keeps, and a unit of today leaves it alone, it is set again.
    """
    if unit.entry != "dimension" or any(part.power and (part.query_groups or part.queries) for part in unit.slices):
        return unit
    told = {(each.module, each.name) for each in unit.attributes}
    scales = [
        Attribute(unit.name, name, None)
        for name, value in vars(model.get_submodule(unit.name)).items()
        if isinstance(value, float) and abs(value * unit.size**0.5 - 1) < 1e-6 and (unit.name, name) not in told
    ]
    return replace(unit, attributes=(*unit.attributes, *scales))


def sizes_from_json(value: Any, source: str) -> Sizes:
    """Return sizes as JSON holds them: unit -> [kept, size].

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
            f"{source} should say of every unit how many entries it keeps of how many, [kept, size]; found {found}. "
            "Write the model again."
        )
    return sizes


def plan_for(plan: Plan, units: Iterable[Unit]) -> Plan:
    """Return the part of a plan that is about units as they are: others went when whole layers were dropped."""
    present = {unit.name: unit.size for unit in units}
    kept = {name: entries for name, entries in plan.kept.items() if present.get(name) == len(entries)}
    slices = {name: unit for name, unit in plan.slices.items() if name in kept}
    return Plan(kept, {name: plan.sizes[name] for name in kept}, plan.settings, slices)
