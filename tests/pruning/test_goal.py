"""A target is reached closely by the ranking alone, whatever its blocks are."""

from __future__ import annotations

from typing import Any

import timm
import torch

import upop
from upop.pruning.costs import channel_costs
from upop.pruning.goal import Goal

_SIZES: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 2,
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 10,
}


def test_a_wide_channel_gives_way_to_small_ones_where_it_would_overshoot() -> None:
    """A channel of this residual stream is about 4 % of the model, and neurons that went earlier cannot come back."""
    model = timm.create_model("vit_tiny_patch16_224", **_SIZES)
    groups = upop.find_groups(model, width=True)
    costs = channel_costs(model, groups, "params")
    for seed in range(12):
        draw = torch.Generator().manual_seed(seed)
        scores = {group.name: torch.rand(group.size, generator=draw) for group in groups}
        for group in groups:  # what went in an earlier stage
            scores[group.name][: int(torch.randint(group.size // 2, (1,), generator=draw))] = torch.inf
        share = 0.2 + 0.5 * float(torch.rand(1, generator=draw))
        goal = Goal(None, {"params": share})
        goal.begin(model, groups, costs, 1, None)
        marked = goal.select(groups, scores, costs, 1.0, standardised=False).marked
        kept = {name: each.numel() - int(each.sum()) for name, each in marked.items()}
        reached = goal.described(kept)["reached"]["params"]
        assert share - 0.01 <= reached["left"] / reached["dense"] <= share
