"""Other pruning methods, written from their papers, for benchmarks/real/compare.py.

A method is an importance per channel (low ones are pruned first), how channels of different groups are compared, and
how consumers are corrected. All methods observe the dense model once, on the same batches, and remove the same cost.

- magnitude: L2 norms of all weights of a channel (`upop.pruning.plan_by_magnitude`).
- first-order: |sum of gradient times weight| of each batch, one ranking of all channels, one cut.
- Wanda, structured (arXiv 2306.11695 in the form of arXiv 2312.11983): the norm of an input times the norm of its
  weights in the consumer, the same share of every group.
- FLAP (arXiv 2312.11983): the variance of an input times the squared norm of its weights in the consumer, standardised
  by group, one ranking; the mean contribution of pruned channels is added to the consumer's bias.
- variance: that of an input alone, standardised by group, one ranking, and the same shift by the mean.
- closed form (as CORP does, without labels): the energy that an input contributes to the outputs, the same share of
  every group, and a ridge regression of pruned on kept channels, with a bias.
- depth: whole layers whose outputs resemble their inputs most (arXiv 2403.03853).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upop
from upop.pruning import budget
from upop.pruning.groups import Group, tensor_of
from upop.pruning.moments import consumers
from upop.pruning.scores import signed

Kept = dict[str, list[int]]
_RIDGE = 1e-2
"""Of the mean square of an input; that of the closed form."""


@dataclass(frozen=True)
class Seen:
    """Statistics of the dense model from one pass over the batches.

    Attributes:
        first_order: group's name -> sum over the batches of |gradient times weight| of every channel, [size].
        moments: group's name -> mean of `x x^T` of its consumer's inputs, with a 1 appended to x, [n + 1, n + 1];
            float64.
        likeness: mean cosine similarity of the input and output of every layer of the stack, [layers].
    """

    first_order: dict[str, Tensor]
    moments: dict[str, Tensor]
    likeness: Tensor

    @classmethod
    def of(
        cls,
        model: nn.Module,
        groups: list[Group],
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        counted: Callable[[Any, Group], Tensor | None],
        stack: Iterable[nn.Module],
    ) -> Seen:
        """Observe a model.

        Args:
            model: the dense one, in evaluation mode.
            groups: of the model.
            batches: to observe it on.
            loss: (model, batch) -> loss.
            counted: (batch, group) -> which input tokens of the group's consumer are not padding, bool, [tokens];
                None counts all.
            stack: layers whose outputs are compared with their inputs.
        """
        masks: dict[str, Tensor | None] = {}
        moments: dict[str, Tensor] = {}
        first_order = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        likeness: dict[int, list[Tensor]] = {}

        def look(name: str, inputs: Tensor) -> None:
            rows, mask = inputs.detach().flatten(0, -2), masks[name]
            rows = rows if mask is None else rows[mask]
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            product = (rows.t() @ rows).double()
            moments[name] = moments[name] + product if name in moments else product

        def compare(number: int, inputs: Tensor, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            likeness.setdefault(number, []).append(F.cosine_similarity(inputs, states, dim=-1).mean().detach())

        hooks = [
            consumers(model, group)[0].register_forward_pre_hook(lambda _, args, name=group.name: look(name, args[0]))
            for group in groups
        ]
        hooks += [
            layer.register_forward_hook(lambda _, args, out, number=number: compare(number, args[0], out))
            for number, layer in enumerate(stack)
        ]
        for batch in batches:
            masks = {group.name: counted(batch, group) for group in groups}
            model.zero_grad()
            loss(model, batch).backward()
            for group in groups:
                parts = [(part, tensor_of(model, part.tensor)) for part in group.producers]
                rows = [part.reduce(_signed(weight.detach(), weight.grad)) for part, weight in parts]
                first_order[group.name] += torch.stack(rows).sum(0).abs().double()
        model.zero_grad()
        for hook in hooks:
            hook.remove()
        tokens = {name: float(each[-1, -1]) for name, each in moments.items()}
        means = [torch.stack(likeness[number]).mean() for number in sorted(likeness)]
        return cls(
            first_order,
            {name: each / tokens[name] for name, each in moments.items()},
            torch.stack(means) if means else torch.empty(0),
        )


def _signed(weight: Tensor, gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return signed(weight.unsqueeze(1), gradient.unsqueeze(1)) if weight.dim() == 1 else signed(weight, gradient)


@dataclass(frozen=True)
class Way:
    """A pruning method.

    Attributes:
        score: (moments [n + 1, n + 1] of a consumer's inputs, its weight [outputs, n]) -> a score for each
            of the n; None is the first-order score of the channels.
        compared: "raw" scores of all groups in one ranking, "standardised" in each group first, or a "uniform" share of
            every group.
        makes_up: "mean" adds to the bias, "ridge" solves for the kept weights, None does nothing.
        mlp_alone: attention stays whole.
    """

    score: Callable[[Tensor, Tensor], Tensor] | None
    compared: Literal["raw", "standardised", "uniform"]
    makes_up: Literal["mean", "ridge"] | None = None
    mlp_alone: bool = False


def _variance(moments: Tensor) -> Tensor:
    variance: Tensor = moments.diagonal()[:-1] - moments[-1, :-1].square()
    return variance


def _wanda(moments: Tensor, weight: Tensor) -> Tensor:
    norms: Tensor = weight.norm(dim=0)
    return moments.diagonal()[:-1].sqrt() * norms


def _flap(moments: Tensor, weight: Tensor) -> Tensor:
    return _variance(moments) * weight.square().sum(0)


def _variances(moments: Tensor, weight: Tensor) -> Tensor:
    del weight
    return _variance(moments)


def _energy(moments: Tensor, weight: Tensor) -> Tensor:
    return moments.diagonal()[:-1] * weight.square().sum(0)


WAYS: dict[str, Way] = {
    "first-order, one cut": Way(None, "raw"),
    "Wanda, structured": Way(_wanda, "uniform"),
    "Wanda, structured, MLPs alone": Way(_wanda, "uniform", mlp_alone=True),
    "FLAP": Way(_flap, "standardised", "mean"),
    "FLAP, MLPs alone": Way(_flap, "standardised", "mean", mlp_alone=True),
    "variance, mean shift": Way(_variances, "standardised", "mean"),
    "closed form": Way(_energy, "uniform", "ridge"),
}


def kept_by(way: Way, model: nn.Module, groups: list[Group], costs: dict[str, float], seen: Seen, ratio: float) -> Kept:
    """Return the channels that a method keeps of every group when it removes `ratio` of the cost of all groups."""
    ranked = [group for group in groups if group.kind == "mlp" or not way.mlp_alone]
    scores = {}
    for group in ranked:
        if way.score is None:
            score = seen.first_order[group.name]
        else:
            weight = consumers(model, group)[0].weight.detach().double()
            score = group.online[-1].reduce(way.score(seen.moments[group.name], weight))
        if way.compared == "standardised":
            score = (score - score.mean()) / score.std()
        elif way.compared == "uniform":
            score = (score.argsort().argsort() + 0.5) / group.size
        scores[group.name] = -score
    whole, here = (sum(costs[group.name] * group.size for group in which) for which in (groups, ranked))
    marked = budget.select(ranked, scores, costs, ratio * whole / here, standardised=False).marked
    return {name: (~pruned).nonzero().flatten().tolist() for name, pruned in marked.items()}


@torch.no_grad()
def cut(model: nn.Module, groups: list[Group], kept: Kept, seen: Seen | None, makes_up: str | None) -> nn.Module:
    """Return a smaller copy of a model, with its consumers corrected by the method."""
    small = copy.deepcopy(model)
    for group in groups:
        if group.name not in kept or makes_up is None:
            continue
        assert seen is not None
        layer, moments = consumers(small, group)[0], seen.moments[group.name]
        stay = torch.tensor(kept[group.name])
        go = torch.tensor(sorted(set(range(group.size)) - set(kept[group.name])), dtype=torch.long)
        ours, theirs = (group.online[-1].index(each, group.size) for each in (stay, go))
        lost = layer.weight.double()[:, theirs].t()
        if makes_up == "mean":
            shift = moments[-1, theirs] @ lost
        else:
            places = torch.cat([ours, ours.new_tensor([len(moments) - 1])])
            held = torch.zeros(len(places), dtype=torch.float64)
            held[:-1] = _RIDGE * moments.diagonal()[ours].mean()
            change = torch.linalg.solve(moments[places][:, places] + held.diag(), moments[places][:, theirs] @ lost)
            layer.weight[:, ours] += change[:-1].t().to(layer.weight)
            shift = change[-1]
        old = layer.bias if layer.bias is not None else torch.zeros(layer.out_features)
        layer.bias = nn.Parameter((old + shift.to(old)).detach().to(layer.weight))
    return upop.shrink(small, kept)


def without_layers(model: nn.Module, stacks: Iterable[str], seen: Seen, ratio: float, costs: float) -> nn.Module:
    """Return a copy without the layers whose outputs resemble their inputs most, though not without all of a stack.

    The most similar are removed first. A layer is skipped if removing it would lead farther from the ratio.

    Args:
        model: the dense one.
        stacks: names of lists of layers, in the order in which `seen` compared them.
        seen: what the dense model showed.
        ratio: share of the cost to remove.
        costs: of all that can be pruned, in parameters.
    """
    small: Any = copy.deepcopy(model)
    layers = [(stack, n) for stack in stacks for n in range(len(small.get_submodule(stack)))]
    stay, gone = dict.fromkeys(layers), 0.0
    for place in seen.likeness.argsort(descending=True).tolist():
        stack, number = layers[place]
        size = sum(each.numel() for each in small.get_submodule(stack)[number].parameters())
        last = sum(name == stack for name, _ in stay) == 1
        if not last and abs(gone + size - ratio * costs) < abs(gone - ratio * costs):
            del stay[layers[place]]
            gone += size
    for stack in stacks:
        parent, _, name = stack.rpartition(".")
        owner = small.get_submodule(parent)
        kept = [number for other, number in stay if other == stack]
        setattr(owner, name, nn.ModuleList(getattr(owner, name)[number] for number in kept))
        owner.config.num_hidden_layers = len(kept)
        for number, layer in enumerate(getattr(owner, name)):
            for module in layer.modules():  # attention finds its place in the cache by its number
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number
    whole: nn.Module = small
    return whole
