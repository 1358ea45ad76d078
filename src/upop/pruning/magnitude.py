"""The usual baseline: cut at once what has the smallest weights, without any search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.align import Align, check_align
from upop.pruning.costs import Cost, entry_costs
from upop.pruning.goal import Goal
from upop.pruning.latency import Profile
from upop.pruning.plan import Plan
from upop.pruning.sharded import refuse_sharded
from upop.pruning.surveys import units_to_search
from upop.pruning.targets import Target
from upop.pruning.uniform import Uniform, check_uniform, to_keep_alike
from upop.pruning.units import Unit, tensor_of


def plan_by_magnitude(
    model: nn.Module,
    ratio: float | None = None,
    *,
    target: Target | None = None,
    profile: Profile | None = None,
    cost: Cost = "params",
    align: Align | str = 1,
    example: Any = None,
    uniform: Uniform | None = None,
) -> Plan:
    """Return the plan that removes the entries with the smallest L2 norm of all weights they own.

    Norms are standardised per structure and ranked under one budget exactly as `Pruner` ranks its scores, so the two
    differ in the scores alone. Arguments are those of `Pruner`.

    Raises:
        SettingError: a setting is out of range, or the ratio or the target cannot be reached.
        LayoutError: the model has no unit, or its weights are sharded over processes.
    """
    goal, align = Goal(ratio, target, profile), check_align(align)
    refuse_sharded(model, "plan_by_magnitude()")
    check_uniform(uniform)
    units, towers, _ = to_keep_alike(model, units_to_search(model, example), uniform)
    costs = entry_costs(model, units, cost, example)
    goal.begin(model, units, costs, align, example, towers)
    scores = {unit.name: -_norms(model, unit) for unit in units}
    marked = goal.select(units, scores, costs, 1.0, align).marked
    kept = {name: (~gone).nonzero().flatten().tolist() for name, gone in marked.items()}
    described = cost if isinstance(cost, str) else "given"
    told = goal.told({name: len(entries) for name, entries in kept.items()})
    told |= {"uniform": uniform} if uniform else {}
    return Plan.of(units, kept, method="magnitude", **told, cost=described, align=align)


@torch.no_grad()
def _norms(model: nn.Module, unit: Unit) -> Tensor:
    total = torch.zeros(unit.size, dtype=torch.float64)
    for part in unit.online:
        squares = tensor_of(model, part.tensor).double().square()
        others = [dim for dim in range(squares.dim()) if dim != part.dim]
        total += part.reduce(squares.sum(others) if others else squares, silent=True).cpu()
    return total.sqrt()
