"""Torch-Pruning's choice of what to cut, for benchmarks/quality.py; it is installed for benchmarks alone.

Torch-Pruning (1.6) traces the model, groups the layers that depend on each other, rates every channel of a group (L2
norm, or first-order Taylor from the gradients of a few batches, averaged over the layers of the group and divided by
their mean: its defaults), and ranks all groups together (`global_pruning=True`). As its examples of transformers
do, `num_heads` names the layers of queries, keys and values, so that head dimensions go alike from all heads, and
layers that write to the residual stream are ignored, so that its width stays, as with all other methods here. The only
number it takes is a share of channels; the share that comes nearest to the asked cost is found by bisection.

Its choice is read from its interactive mode and cut by `upop.shrink`, as for all methods here. That keeps the
softmax scale, which Torch-Pruning's own cut does not, so it can only gain.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import upop
from upop.pruning.costs import channel_costs
from upop.pruning.groups import Group, owner_of

_HALVINGS = 14
_NEAR = 0.02
"""How far the removed share of the cost may be from the asked one."""
_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


class UnsupportedError(Exception):
    """A method cannot cut a model; the text says why."""


def plan_by_torch_pruning(
    model: nn.Module, ratio: float, *, example: Mapping[str, Tensor], by_gradient: bool, cost: str
) -> dict[str, list[int]]:
    """Return the channels that Torch-Pruning keeps of every group when it removes about `ratio` of the cost.

    Args:
        model: the dense model; with gradients where `by_gradient`.
        ratio: share of the groups' cost to remove.
        example: keyword arguments of one forward pass.
        by_gradient: rate by first-order Taylor terms instead of L2 norms.
        cost: what a channel costs.

    Raises:
        UnsupportedError: Torch-Pruning is not installed, fails on this model, or cannot come near the ratio.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise UnsupportedError("torch-pruning is not installed (pip install torch-pruning==1.6.1)") from error
    groups = upop.find_groups(model)
    costs = channel_costs(model, groups, cost, example)
    total = sum(costs[group.name] * group.size for group in groups)
    rows = _rows(model, groups)
    rate = torch_pruning.importance.TaylorImportance if by_gradient else torch_pruning.importance.MagnitudeImportance
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = torch_pruning.pruner.BasePruner(
                model,
                example,
                rate(),
                global_pruning=True,
                ignored_layers=[m for m in model.modules() if isinstance(m, _LAYERS) and m not in rows],
                num_heads={layer: group.heads for layer, (group, _) in rows.items() if group.kind == "attention"},
                forward_fn=lambda model, inputs: model(**inputs),
            )
            nearest, pruned = 0.0, dict[str, set[int]]()
            low, high = 0.0, 1.0
            for _ in range(_HALVINGS):
                share = (low + high) / 2
                marked = _marked(pruner, rows, share)
                removed = sum(costs[group.name] * len(marked.get(group.name, ())) for group in groups) / total
                if abs(removed - ratio) < abs(nearest - ratio):
                    nearest, pruned = removed, marked
                low, high = (share, high) if removed < ratio else (low, share)
    except UnsupportedError:
        raise
    except Exception as error:  # its tracing fails in many ways
        raise UnsupportedError(f"Torch-Pruning fails: {type(error).__name__}: {str(error)[:200]}") from error
    if abs(nearest - ratio) > _NEAR:
        raise UnsupportedError(f"Torch-Pruning removes {nearest:.3f} of the cost where {ratio:.3f} was asked for")
    return {group.name: [n for n in range(group.size) if n not in pruned.get(group.name, ())] for group in groups}


def _rows(model: nn.Module, groups: list[Group]) -> dict[nn.Module, tuple[Group, Tensor]]:
    """Return the layers that produce a group's channels: which group, and to which channel each of their rows
    belongs.
    """
    return {
        owner_of(model, part.tensor)[0]: (group, part.expand(torch.arange(group.size)))
        for group in groups
        for part in group.producers
        if part.tensor.endswith("weight")
    }


def _marked(pruner: Any, rows: Mapping[nn.Module, tuple[Group, Tensor]], share: float) -> dict[str, set[int]]:
    """Return the pruned channels, by group, when Torch-Pruning removes `share` of all channels."""
    pruner.reset()
    pruner.per_step_pruning_ratio = pruner.iterative_pruning_ratio_scheduler(share, 1)
    pruned: dict[str, set[int]] = {}
    for dependencies in pruner.step(interactive=True):
        for dependency, places in dependencies:
            layer = dependency.target.module
            if layer in rows and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                group, channels = rows[layer]
                marked = set(channels[torch.tensor(places)].tolist())
                if pruned.setdefault(group.name, marked) != marked:
                    raise UnsupportedError(f"Torch-Pruning cuts the layers of {group.name} apart")
    return pruned
