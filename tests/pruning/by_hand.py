"""What masking and cutting have to agree on, worked out beside the library: rows are set to zero by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import upop
from upop.pruning.groups import Group, tensor_of


def spread(model: nn.Module) -> nn.Module:
    """Move all weights off what they begin with: zeros and ones hide differences."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model.eval()


def called(model: nn.Module, example: Any) -> list[Tensor]:
    """Return all tensors that a call gives; what is drawn at random is drawn alike."""
    torch.manual_seed(5)
    with torch.no_grad():
        result = model(*example) if isinstance(example, tuple) else model(example)
    tensors = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each.is_floating_point()]
    assert tensors
    return tensors


def uneven(groups: Sequence[Group], seed: int) -> dict[str, list[int]]:
    """Return channels to keep: one, half, or any number of them."""
    draw = random.Random(seed)
    counts = {each.name: draw.choice([1, max(1, each.size // 2), draw.randint(1, each.size)]) for each in groups}
    return {each.name: sorted(draw.sample(range(each.size), counts[each.name])) for each in groups}


def silenced(model: nn.Module, groups: Sequence[Group], plan: dict[str, list[int]]) -> nn.Module:
    """Set the rows that open what goes to zero."""
    with torch.no_grad():
        for group in groups:
            for part in group.slices:
                tensor, at = tensor_of(model, part.tensor), 0
                gaps = part.gaps or (0,) * (part.outer + 1)
                for block, rows in enumerate(part.inners):
                    at += gaps[block]
                    for channel in range(group.size):
                        if part.produces and block not in part.silent and channel not in plan[group.name]:
                            tensor.narrow(part.dim, at, rows).zero_()
                        at += rows
                assert at + gaps[-1] == tensor.shape[part.dim]
    return model


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return how far outputs are apart, relative to the largest element."""
    assert [each.shape for each in one] == [each.shape for each in other]
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        finite = a.isfinite()
        assert torch.equal(finite, b.isfinite())
        if finite.any():
            worst = max(worst, float((a - b)[finite].abs().max() / a[finite].abs().max().clamp_min(1e-9)))
    return worst


def check(
    model: nn.Module, example: Any, folder: Path, attentions: int, mlps: int, tolerance: float = 1e-10
) -> tuple[list[Group], nn.Module, nn.Module]:
    """Read a model, cut it, save it and load it; return its groups, the masked model and the cut one.

    Args:
        model: any; its weights are changed.
        example: what a call is given: one tensor, or a tuple of arguments.
        folder: to save to.
        attentions: how many attentions there have to be, at least.
        mlps: the same for MLPs.
        tolerance: of outputs, relative to the largest element.
    """
    spread(model)
    groups = list(upop.find_prunable(model, example).groups)
    kinds = [group.kind for group in groups]
    assert kinds.count("attention") >= attentions and kinds.count("mlp") >= mlps, kinds
    for seed in (0, 1):
        plan = uneven(groups, seed)
        masked, cut = silenced(copy.deepcopy(model), groups, plan), copy.deepcopy(model)
        upop.shrink(cut, upop.Plan.of(groups, plan))
        assert difference(called(masked, example), called(cut, example)) <= tolerance
    assert upop.count_parameters(cut) < upop.count_parameters(model)
    upop.save(cut, folder / "cut")
    again = upop.load_into(copy.deepcopy(model), folder / "cut").eval()
    assert difference(called(cut, example), called(again, example)) == 0
    return groups, masked, cut
