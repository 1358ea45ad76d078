"""Inspection of a model by modality: groups, parameters and multiply-adds, before and after a budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning import Group, Plan, Skipped, find_prunable
from upop.pruning.costs import channel_costs, macs_by_module
from upop.pruning.coverage import Coverage, coverage
from upop.pruning.goal import Goal
from upop.pruning.groups import tensor_of
from upop.pruning.round_to import RoundTo, channels_in_block, check_round_to
from upop.pruning.shrink import apply_plan
from upop.pruning.traits import momentum_prefixes
from upop.report.shares import GroupShare, Panel, panels

SHARED = "shared"
"""The modality of modules that belong to several: heads, projections to a common space, temperatures."""


@dataclass(frozen=True)
class Part:
    """The sizes of one modality.

    Attributes:
        modality: "vision", "text", "other", or `SHARED`.
        parameters: their number; shared tensors count once, momentum encoders not at all.
        prunable: parameters that the channels of groups own.
        macs: multiply-adds of one forward pass; None without inputs.
    """

    modality: str
    parameters: int
    prunable: int
    macs: int | None


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_model`.

    Attributes:
        panels: the groups, by structure, with the channels that they keep of the dense model's.
        parts: one per modality.
        skipped: structures that look prunable but are in no group, with reasons.
        group_parameters: group -> parameters that its channels own.
        coverage: shares of the model that are in groups, skipped, or neither.
    """

    panels: tuple[Panel, ...]
    parts: tuple[Part, ...]
    skipped: tuple[Skipped, ...]
    group_parameters: Mapping[str, int]
    coverage: Coverage

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, without momentum encoders."""
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int | None:
        """Multiply-adds of one forward pass of the whole model; None without inputs."""
        counts = [part.macs for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)


def inspect_model(model: nn.Module, inputs: Any = None, dense: Mapping[str, int] | None = None) -> Inspection:
    """Inspect a model, dense or compressed, without changing it.

    Args:
        model: the model.
        inputs: for one forward pass that counts multiply-adds (a tensor, a tuple of arguments, a mapping of keyword
            arguments, or a function of the model); None skips it. Errors that the model raises are passed on.
        dense: group -> channels of the dense model, if the model is compressed and they are known.
    """
    found = find_prunable(model)
    where = _Modalities(found.groups)
    parameters: dict[str, int] = {}
    copies = momentum_prefixes(model)
    for name, parameter in model.named_parameters():
        if not name.startswith(copies):
            modality = where.of(name)
            parameters[modality] = parameters.get(modality, 0) + parameter.numel()
    left = [group for group in found.groups if group.size]  # a branch may be pruned entirely
    costs = channel_costs(model, left, "params") if left else {}
    by_group = {group.name: round(costs.get(group.name, 0) * group.size) for group in found.groups}
    own = macs_by_module(model, inputs) if inputs is not None else None
    macs = _macs(own, where) if own is not None else {}
    held = {name for counts in (parameters, macs) for name, count in counts.items() if count}
    order = sorted(held, key=lambda name: (name == SHARED, name != "vision", name))
    parts = tuple(
        Part(
            modality,
            parameters.get(modality, 0),
            _prunable(model, [group for group in found.groups if group.modality == modality]),
            macs.get(modality, 0) if inputs is not None else None,
        )
        for modality in order
    )
    shares = [
        GroupShare(
            group.name, group.modality, group.kind, max(group.size, (dense or {}).get(group.name, 0)), group.size
        )
        for group in found.groups
    ]
    covered = coverage(model, found.groups, found.skipped, own)
    return Inspection(tuple(panels(shares)), parts, found.skipped, by_group, covered)


def _prunable(model: nn.Module, groups: Sequence[Group]) -> int:
    """Return how many parameters the channels of some groups own; a weight between two groups counts once."""
    cut: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        for part in group.slices:
            inside = part.channels(group.size) >= 0
            dims = cut.setdefault(part.tensor, {})
            dims[part.dim] = inside | dims.get(part.dim, torch.zeros_like(inside))
    names = {id(each): name for name, each in model.named_parameters()}
    count = 0
    for name, dims in cut.items():
        tensor = tensor_of(model, name)
        if names.get(id(tensor)) == name:
            rest = (size - int(dims[at].sum()) if at in dims else size for at, size in enumerate(tensor.shape))
            count += tensor.numel() - math.prod(rest)
    return count


def after_budget(
    model: nn.Module, goal: Goal, round_to: RoundTo | str = 1, example: Any = None
) -> tuple[nn.Module, Plan]:
    """Return a copy of a model with the same share of every group's channels removed, and its plan.

    A search distributes the same budget unevenly. That hardly changes the number of parameters left, and changes the
    multiply-adds a little.

    Args:
        model: unchanged.
        goal: the share of the groups' cost to remove, or a target for the whole model.
        round_to: kept channels are multiples of this, in groups that are large enough.
        example: inputs of the forward pass for the target.

    Raises:
        SettingError: `round_to` is out of range, or the goal cannot be reached.
    """
    round_to = check_round_to(round_to)
    smaller = copy.deepcopy(model)
    groups = list(find_prunable(smaller).groups)
    ratio = goal.ratio
    if ratio is None:
        goal.begin(smaller, groups, channel_costs(smaller, groups, "params"), round_to, example)
        ratio = goal.share(lambda share: {group.name: _kept(group, share, round_to) for group in groups})
    kept = {group.name: range(_kept(group, ratio, round_to)) for group in groups}
    about = goal.described({name: len(channels) for name, channels in kept.items()})
    plan = Plan.of(groups, kept, **about, round_to=round_to)
    if groups:
        apply_plan(smaller, plan, verify=False)
    return smaller, plan


def _kept(group: Group, ratio: float, round_to: RoundTo) -> int:
    block = channels_in_block(group, round_to)
    blocks = max(1, round(group.size * (1 - ratio) / block))
    return min(group.size, blocks * block)


class _Modalities:
    """The modality of a module or parameter: that of the groups with the longest common path."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._known: dict[str, set[str]] = {}
        for group in groups:
            path = group.name
            while path:
                self._known.setdefault(path, set()).add(group.modality)
                path = path.rpartition(".")[0]
        self._all = {group.modality for group in groups}

    def of(self, name: str) -> str:
        path = name
        while path and path not in self._known:
            path = path.rpartition(".")[0]
        found = self._known[path] if path else self._all
        return next(iter(found)) if len(found) == 1 else SHARED


def _macs(own: Mapping[str, int], where: _Modalities) -> dict[str, int]:
    result: dict[str, int] = {}
    for path, count in own.items():
        modality = where.of(path)
        result[modality] = result.get(modality, 0) + count
    return result
