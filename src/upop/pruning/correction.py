"""Least-squares correction: consumers of pruned channels reconstruct their outputs from the kept ones.

Kept channels partly carry what a pruned channel contributed to its consumer. The second moments of the consumer's
inputs give the change of its weights that minimises the squared error of its outputs, without any gradient. The
strength of the ridge is chosen layer by layer by cross-validation between two parts of the samples; a layer whose
correction does not help on samples that it was not fitted on is left unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.groups import Group
from upop.pruning.least_squares import PARTS, ConsumerInputs, Rows, Squares, Trial, precision
from upop.pruning.moments import Correct, Moments, consumers
from upop.pruning.precision import accumulator
from upop.pruning.sharded import is_sharded_tensor
from upop.pruning.width import stream_of, with_readers

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Strengths of the ridge that are tried, as shares of the inputs' mean square."""
_FIRST = 1.0
"""The strength that is tried first."""
_OUTPUTS = 64
"""Most outputs, or random sums of outputs, that the choice among these is based on."""
_LEAST = 0.01
"""Share of what is lost that a change must make up for on samples that it was not made from."""


@dataclass(frozen=True)
class Choice:
    """The correction chosen for a layer.

    Attributes:
        ridge: strength of the ridge penalty; None means no correction.
        left: share of the squared error that remains on held-out samples; 1 without a correction, or if unknown.
    """

    ridge: float | None
    left: float = 1.0


def correct_consumers(
    moments: Moments,
    model: nn.Module,
    groups: Iterable[Group],
    active: Mapping[str, Tensor],
    pruned: Mapping[str, Tensor],
    correct: Correct = "auto",
    ridge: float | None = None,
) -> dict[str, Choice]:
    """Correct the consumers of groups that lose channels, by the inputs that all processes observed.

    Args:
        moments: observed the model.
        model: masked or not, and not cut; it may be sharded over processes. All of them call this at the same time.
        groups: of the model, in forward order.
        active: per group, [size], bool: channels that are not pruned yet.
        pruned: per group, [size], bool: channels to prune.
        correct: how much memory may be used; see `allowed_bytes`.
        ridge: strength of the ridge for all layers; None chooses it for each.

    Returns:
        The choice for each group that loses channels and whose consumer can be corrected.
    """
    groups = with_readers(groups)
    active, pruned = ({group.name: each[stream_of(group)] for group in groups} for each in (active, pruned))
    losing = [group for group in groups if (pruned[group.name] & active[group.name]).any() and consumers(model, group)]
    chosen: dict[str, Choice] = {}
    for portion, seen in moments.portions(model, losing, correct) if losing else ():
        for group in portion:
            layers = consumers(model, group)
            weight = layers[0].weight
            inputs = seen.pop(group.name, None)  # None where this process did not come by
            if inputs is None:
                inputs = ConsumerInputs(layers[0].in_features, accumulator(weight))
            inputs.add_up(_held(weight).device)
            lost = pruned[group.name] & active[group.name]
            kept = (~pruned[group.name]).nonzero().flatten()
            chosen[group.name] = Change(group, kept, lost.nonzero().flatten(), inputs).apply(layers, ridge)
    return {group.name: chosen[group.name] for group in losing}


class Change:
    """The correction of the consumers of a group for its pruned channels.

    Args:
        group: before the cut.
        kept: the kept channels.
        lost: the pruned channels with an effect.
        inputs: recorded inputs of the consumer.
    """

    def __init__(self, group: Group, kept: Tensor, lost: Tensor, inputs: ConsumerInputs) -> None:
        self.columns, self._lost = (group.online[-1].index(channels, group.size) for channels in (kept, lost))
        self._inputs = inputs
        self._problem: Squares | Rows | None = None

    def choose(self, layer: nn.Linear) -> Choice:
        """Choose the strength of the ridge for a consumer of the group."""
        lost = self._weights(layer, accumulator(layer.weight))  # enough to choose by
        if lost.shape[1] > _OUTPUTS:  # sums with random signs have the outputs' sum of squares
            draws = torch.Generator().manual_seed(0)
            signs = torch.randint(2, (lost.shape[1], _OUTPUTS), generator=draws)
            lost = lost @ ((2 * signs - 1).to(lost) / math.sqrt(_OUTPUTS))
        trial = _Trial(self._of(layer).trial(lost, bias=layer.bias is not None), _meeting(layer.weight))
        if not bool((trial.nothing > 0).all()):
            return Choice(None)
        # A first guess, and then those beside the best one so far, as long as they are better.
        best = RIDGES.index(_FIRST)
        left = {best: trial.left(RIDGES[best], trial.enough)}
        for step in (-1, 1):
            while 0 <= best + step < len(RIDGES) and best + step not in left:
                left[best + step] = trial.left(RIDGES[best + step], trial.enough)
                if left[best + step] >= left[best]:
                    break
                best += step
        found = trial.left(RIDGES[best], PARTS)
        return Choice(RIDGES[best], found) if found <= 1 - _LEAST else Choice(None)

    def solve(self, layer: nn.Linear, ridge: float) -> Tensor:
        """Return the change of the weights of `columns` and of the bias, [columns (+ 1), outputs].

        It is computed in float32 if that is accurate enough, else in float64.
        """
        kind = precision(len(self.columns), ridge, layer.weight.dtype)
        bias = layer.bias is not None
        found = self._of(layer).solve(self._weights(layer, kind), ridge, bias=bias)
        if kind == torch.float64 or bool(found.isfinite().all()):
            return found
        return self._of(layer).solve(self._weights(layer, torch.float64), ridge, bias=bias)

    @torch.no_grad()
    def apply(self, layers: list[nn.Linear], ridge: float | None = None) -> Choice:
        """Correct the weights of layers before the cut; the columns of pruned channels stay unchanged.

        Layers sharded over processes otherwise than by their outputs (as `fully_shard` does) are left alone.

        Args:
            layers: the consumer and its momentum copies.
            ridge: None chooses by cross-validation.
        """
        layers = [layer for layer in layers if _by_outputs(layer.weight)]
        if not layers:
            return Choice(None)
        choice = self.choose(layers[0]) if ridge is None else Choice(ridge)
        if choice.ridge is None:
            return choice
        for layer in layers:
            held = _held(layer.weight)
            if not len(held):  # of a sharded layer another process has all outputs
                continue
            change = self.solve(layer, choice.ridge)
            if not change.isfinite().all():
                return Choice(None)
            held[:, self.columns.to(held.device)] += change[: len(self.columns)].t().to(held)
            if layer.bias is not None:
                _held(layer.bias).add_(change[-1].to(held))
        return choice

    def _weights(self, layer: nn.Linear, kind: torch.dtype) -> Tensor:
        """Return the weights of the pruned channels, [lost, outputs], in a precision that the device supports."""
        weight = _held(layer.weight)
        weight = weight.cpu() if weight.device.type == "mps" else weight
        return weight[:, self._lost.to(weight.device)].t().to(kind)

    def _of(self, layer: nn.Linear) -> Squares | Rows:
        """Return the least-squares problem on the device of the layer, or on the CPU."""
        device = _held(layer.weight).device
        if self._problem is None:
            home = torch.device("cpu") if device.type == "mps" else device
            self._problem = self._inputs.problem(self.columns, self._lost, home)
        return self._problem


class _Trial:
    """The error that corrections fitted on one part of the samples leave on the other.

    Attributes:
        nothing: squared error without a correction, [PARTS].
        enough: number of parts needed to compare ridges.
    """

    def __init__(self, trial: Trial, meeting: str | None) -> None:
        self._trial, self._meeting, self.enough = trial, meeting, trial.enough
        self.nothing = self._sum(trial.nothing)
        self._gains: dict[tuple[float, int], Tensor] = {}

    def left(self, ridge: float, parts: int) -> float:
        """Return the remaining share of the squared error in the first parts; inf if any part does not improve.

        Args:
            ridge: strength of the ridge penalty.
            parts: number of parts to evaluate.
        """
        for part in range(parts):
            if (ridge, part) not in self._gains:
                self._gains[ridge, part] = self._sum(self._trial.gain(ridge, part))
        found = torch.stack([self._gains[ridge, part] for part in range(parts)])
        return 1 + float(found.sum() / self.nothing[:parts].sum()) if bool((found < 0).all()) else math.inf

    def _sum(self, values: Tensor) -> Tensor:
        """Return the sum over the processes that hold the outputs of a sharded layer."""
        if self._meeting is None:
            return values
        together = values.to(self._meeting)
        torch.distributed.all_reduce(together)
        return together.to(values.device)


def _by_outputs(weight: Tensor) -> bool:
    placements: Any = getattr(weight, "placements", ())
    return all(part.is_replicate() or part.is_shard(0) for part in placements)


def _meeting(weight: Tensor) -> str | None:
    """Return the device type for communication between the processes of a sharded weight; None if it is not sharded."""
    mesh: Any = getattr(weight, "device_mesh", None)
    return None if mesh is None else str(mesh.device_type)


def _held(tensor: Tensor) -> Tensor:
    """Return the local part of a tensor: all of it, if it is not sharded."""
    local: Tensor = tensor.detach()
    return local.to_local() if is_sharded_tensor(local) else local  # type: ignore[attr-defined]
