"""Magnitude pruning, the usual baseline: prunes the channels with the smallest weights, without a search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.costs import Cost, channel_costs, current_cost
from upop.pruning.deprecated import renamed_arguments
from upop.pruning.goal import Goal
from upop.pruning.groups import Group, tensor_of
from upop.pruning.latency import Profile
from upop.pruning.plan import Plan
from upop.pruning.prunable import groups_to_search
from upop.pruning.round_to import RoundTo, check_round_to
from upop.pruning.sharded import refuse_sharded
from upop.pruning.targets import Target
from upop.pruning.uniform import Uniform, check_uniform, to_keep_alike


@renamed_arguments(align="round_to")
def plan_by_magnitude(
    model: nn.Module,
    ratio: float | None = None,
    *,
    target: Target | None = None,
    profile: Profile | None = None,
    cost: Cost = "params",
    round_to: RoundTo | str = 1,
    example: Any = None,
    uniform: Uniform | None = None,
) -> Plan:
    """Return the plan that removes the channels with the smallest L2 norm of all weights they own.

    Norms are standardised per structure and ranked under one budget exactly as `Pruner` ranks its scores, so the two
    differ in the scores alone. Arguments are those of `Pruner`.

    Raises:
        SettingError: a setting is out of range, or the ratio or the target cannot be reached.
        LayoutError: the model has no group, or its weights are sharded over processes.
    """
    goal, round_to, cost = Goal(ratio, target, profile), check_round_to(round_to), current_cost(cost)
    refuse_sharded(model, "plan_by_magnitude()")
    check_uniform(uniform)
    groups, towers, _ = to_keep_alike(model, groups_to_search(model, example), uniform)
    costs = channel_costs(model, groups, cost, example)
    goal.begin(model, groups, costs, round_to, example, towers)
    scores = {group.name: -_norms(model, group) for group in groups}
    marked = goal.select(groups, scores, costs, 1.0, round_to).marked
    kept = {name: (~pruned).nonzero().flatten().tolist() for name, pruned in marked.items()}
    cost_name = cost if isinstance(cost, str) else "given"
    described = goal.described({name: len(channels) for name, channels in kept.items()})
    described |= {"uniform": uniform} if uniform else {}
    return Plan.of(groups, kept, method="magnitude", **described, cost=cost_name, round_to=round_to)


@torch.no_grad()
def _norms(model: nn.Module, group: Group) -> Tensor:
    total = torch.zeros(group.size, dtype=torch.float64)
    for part in group.online:
        squares = tensor_of(model, part.tensor).double().square()
        others = [dim for dim in range(squares.dim()) if dim != part.dim]
        total += part.reduce(squares.sum(others) if others else squares, silent=True).cpu()
    return total.sqrt()
