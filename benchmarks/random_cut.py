"""Models with random cuts like those of a search, for measurements that depend only on sizes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from upop.pruning import budget, find_groups, shrink
from upop.pruning.costs import channel_costs

LEVELS = 0.7
"""How far the layers' levels of scores lie apart, in standard deviations of the scores of one layer."""
_KERNELS = ("flash", "efficient", "cudnn", "math")


def compressed(model: nn.Module, ratio: float, round_to: int) -> nn.Module:
    """Return a copy of `model` that keeps what a search could have kept."""
    model = copy.deepcopy(model)
    groups = find_groups(model)
    generator = torch.Generator().manual_seed(0)
    scores = {
        group.name: torch.randn(group.size, generator=generator) + LEVELS * torch.randn(1, generator=generator)
        for group in groups
    }
    marked = budget.select(groups, scores, channel_costs(model, groups, "params"), ratio, round_to).marked
    return shrink(model, {name: (~pruned).nonzero().flatten().tolist() for name, pruned in marked.items()})


def attention_kernel(model: nn.Module, inputs: Any) -> str:
    """Return the name of the attention function that a forward pass really ran."""
    on_cuda = next(model.parameters()).is_cuda
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with torch.inference_mode(), profile(activities=kinds) as profiler:
        model(**inputs)
    ran = [event.key for event in profiler.key_averages()]
    names = [
        key for key in ran if "attention" in key and any(kernel in key for kernel in _KERNELS) and "backward" not in key
    ]
    return ", ".join(sorted(set(names))) or "none of torch's"
