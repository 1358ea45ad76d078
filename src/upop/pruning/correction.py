"""Least-squares correction: the layers that read what was cut make up for it with what stays.

What a removed entry gave to the layer that reads it is partly in the entries that stay. From the second moments of that
layer's inputs follows the change of the weights that stays closest to what went, without any gradient. How strongly it
is held to no change at all is decided layer by layer, by what each part of the samples says of the change that the
other part would have made; where it would not have helped on samples that it was not made from, there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.moments import PARTS, Moments, readers
from upop.pruning.scores import accumulator
from upop.pruning.sharded import is_sharded_tensor, many_processes
from upop.pruning.units import Unit

RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""How strongly a change may be held to none, as a share of the inputs' mean square."""
_FIRST = 1.0
"""The one of them that is tried first."""
_OUTPUTS = 64
"""Most outputs, or random sums of them, that are looked at to choose among these."""
_LEAST = 0.01
"""Share of what is lost that a change must make up for on samples that it was not made from."""


@dataclass(frozen=True)
class Choice:
    """What was decided for a layer.

    Attributes:
        ridge: how strongly the change is held to none; None makes none.
        left: share of the square of what the layer loses that is left, on samples that the change was not made from;
            1 without a change, and where nothing is known.
    """

    ridge: float | None
    left: float = 1.0


def correct_readers(
    moments: Moments, model: nn.Module, units: Iterable[Unit], live: Mapping[str, Tensor], gone: Mapping[str, Tensor]
) -> dict[str, Choice]:
    """Correct the readers of units that lose `live` entries, by what all processes saw.

    Args:
        moments: of their inputs.
        model: masked, not cut; it may be sharded over processes. All of them call this at the same time.
        units: of the model.
        live: per unit, [size], bool: what there is.
        gone: per unit, [size], bool: what is masked from now on.

    Returns:
        What was decided for each unit that loses something and whose reader can be corrected.
    """
    chosen: dict[str, Choice] = {}
    for unit in units:
        layers, lost = readers(model, unit), gone[unit.name] & live[unit.name]
        if not layers or not lost.any():
            continue
        seen = moments.values.get(unit.name)
        if seen is None:  # this process did not come by
            weight, size = layers[0].weight, layers[0].in_features + 1
            seen = torch.zeros(PARTS, size, size, dtype=accumulator(weight), device=weight.device)
        if many_processes():
            seen = seen.clone()
            torch.distributed.all_reduce(seen)
        change = Change(unit, (~gone[unit.name]).nonzero().flatten(), lost.nonzero().flatten(), seen)
        chosen[unit.name] = change.apply(layers)
    return chosen


class Change:
    """What the readers of a unit do about the entries that it loses.

    Args:
        unit: not cut yet.
        kept: the entries that stay.
        lost: those that go and are missed.
        moments: [PARTS, n + 1, n + 1]; see `Moments`.
    """

    def __init__(self, unit: Unit, kept: Tensor, lost: Tensor, moments: Tensor) -> None:
        self.columns, self._lost = (unit.online[-1].index(entries, unit.size) for entries in (kept, lost))
        self._moments = moments.cpu() if moments.device.type == "mps" else moments

    def choose(self, layer: nn.Linear) -> Choice:
        """Decide how strongly the change of a layer that reads the unit is held to none."""
        lost = self._weights(layer)
        if lost.shape[1] > _OUTPUTS:  # sums with random signs have the outputs' sum of squares
            draws = torch.Generator().manual_seed(0)
            signs = torch.randint(2, (lost.shape[1], _OUTPUTS), generator=draws)
            lost = lost @ ((2 * signs - 1).to(lost) / math.sqrt(_OUTPUTS))
        trial = _Trial(self._moments, *self._places(layer), lost, _meeting(layer.weight))
        if not bool((trial.nothing > 0).all()):
            return Choice(None)
        # A first guess, and then those beside the best one so far, as long as they are better.
        best = RIDGES.index(_FIRST)
        left = {best: trial.left(RIDGES[best])}
        for step in (-1, 1):
            while 0 <= best + step < len(RIDGES) and best + step not in left:
                left[best + step] = trial.left(RIDGES[best + step])
                if left[best + step] >= left[best]:
                    break
                best += step
        return Choice(RIDGES[best], left[best]) if left[best] <= 1 - _LEAST else Choice(None)

    def solve(self, layer: nn.Linear, ridge: float) -> Tensor:
        """Return what is added to the weights of `columns`, and to the bias, [columns (+ 1), outputs]; float64."""
        columns, gone = self._places(layer)
        moments = _precise(self._moments.sum(0).to(columns.device))
        squares, shared = moments[columns][:, columns], moments[columns][:, gone] @ self._weights(layer)
        return _ridge(squares, shared, ridge, len(self.columns))

    @torch.no_grad()
    def apply(self, layers: list[nn.Linear], ridge: float | None = None) -> Choice:
        """Change the weights of layers, none of which is cut yet; the columns of entries that go stay as they are.

        Layers sharded over processes otherwise than by their outputs (as `fully_shard` does) are left alone.

        Args:
            layers: the reader, and its momentum copies.
            ridge: None decides by the moments.
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

    def _weights(self, layer: nn.Linear) -> Tensor:
        """Return the weights of what goes, [lost, outputs]; float64."""
        weight = _precise(_held(layer.weight))
        return weight[:, self._lost.to(weight.device)].t()

    def _places(self, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """Return where the moments of what stays (with the 1 of the bias, if there is one) and of what goes lie."""
        device = _precise(_held(layer.weight)[:0]).device
        columns = self.columns.to(device)
        if layer.bias is not None:
            columns = torch.cat([columns, columns.new_tensor([self._moments.shape[-1] - 1])])
        return columns, self._lost.to(device)


class _Trial:
    """What changes made from one part of the samples leave of the loss on the other.

    Attributes:
        nothing: squares of what is lost without a change, [PARTS].
    """

    def __init__(self, moments: Tensor, columns: Tensor, gone: Tensor, lost: Tensor, meeting: str | None) -> None:
        self._inputs = int((columns < moments.shape[-1] - 1).sum())
        self._meeting = meeting
        kind = torch.float64 if moments.dtype == torch.float64 else torch.float32  # enough to choose by
        lost = lost.to(kind)
        self._squares, self._shared, self.nothing = [], [], lost.new_zeros(PARTS)
        for part, seen in enumerate(moments.to(lost.device, kind)):
            ours = seen[columns]
            self._squares.append(ours[:, columns])
            self._shared.append(ours[:, gone] @ lost)
            self.nothing[part] = (lost * (seen[gone][:, gone] @ lost)).sum()
        self.nothing = self._sum(self.nothing)

    def left(self, ridge: float) -> float:
        """Return the share of the squares that is left; inf where a part is no better off than without a change."""
        found = torch.empty_like(self.nothing)
        for part, other in enumerate(reversed(range(PARTS))):
            change = _ridge(self._squares[other], self._shared[other], ridge, self._inputs)
            found[part] = (change * (self._squares[part] @ change - 2 * self._shared[part])).sum()
        found = self._sum(found)
        return 1 + float(found.sum() / self.nothing.sum()) if bool((found < 0).all()) else math.inf

    def _sum(self, values: Tensor) -> Tensor:
        """Return the sum over the processes that hold the outputs of a sharded layer."""
        if self._meeting is None:
            return values
        together = values.to(self._meeting)
        torch.distributed.all_reduce(together)
        return together.to(values.device)


def _ridge(squares: Tensor, shared: Tensor, ridge: float, inputs: int) -> Tensor:
    """Return the D that minimises `sum |x_lost lost - x D|^2 + r |D|^2`, NaN where it is not determined.

    Args:
        squares: the sum of `x x^T`, [n, n].
        shared: that of `x (x_lost lost)^T`, [n, outputs].
        ridge: r as a share of the mean square of an input; what comes after `inputs` is free (the bias).
        inputs: how many of the n are held.
    """
    held = torch.zeros_like(squares.diagonal())
    held[:inputs] = ridge * squares.diagonal()[:inputs].mean().clamp_min(torch.finfo(torch.float32).tiny)
    factor, failed = torch.linalg.cholesky_ex(squares + held.diag())
    found = torch.cholesky_solve(shared, factor)
    return torch.where(failed == 0, found, torch.nan)


def _by_outputs(weight: Tensor) -> bool:
    placements: Any = getattr(weight, "placements", ())
    return all(part.is_replicate() or part.is_shard(0) for part in placements)


def _meeting(weight: Tensor) -> str | None:
    """Return the kind of device by which the processes speak that share a weight, or None where it is not sharded."""
    mesh: Any = getattr(weight, "device_mesh", None)
    return None if mesh is None else str(mesh.device_type)


def _held(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: all of it, if it is not sharded."""
    local: Tensor = tensor.detach()
    return local.to_local() if is_sharded_tensor(local) else local  # type: ignore[attr-defined]


def _precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; on the CPU where its device has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor.detach()).double()
