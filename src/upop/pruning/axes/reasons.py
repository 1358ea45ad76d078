"""Explains a failed proof: finds the operation that turns masked zeros into other values."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.axes.axis import Axis, Dim, length
from upop.pruning.axes.candidates import Candidate
from upop.pruning.axes.copies import written_out
from upop.pruning.axes.label import Step
from upop.pruning.axes.mode import Mode, name_of, tensors_in
from upop.pruning.axes.proof import Bench
from upop.pruning.axes.settle import COPIES, plain_name
from upop.pruning.axes.trace import Trace
from upop.pruning.groups import around


class _Zeros(Mode):
    """Finds the first operation that gets zeros along an axis and outputs nonzero values."""

    def __init__(self, steps: Sequence[Step], axis: Axis, pruned: Tensor) -> None:
        super().__init__()
        self._steps = [step for step in steps if plain_name(step.name) not in COPIES]
        self._axis, self._pruned = axis.root, pruned
        self._at = 0
        self.found: Step | None = None

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and compare what comes out with what went in."""
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        name = plain_name(name_of(func))
        if not outputs or name in COPIES or self.found or self._at >= len(self._steps):
            return result
        step = self._steps[self._at]
        self._at = self._at + 1 if plain_name(step.name) == name else len(self._steps)
        first = next(iter(tensors_in(args)), None)
        if first is not None and self._zero(first, step.given) and self._zero(outputs[0], step.dims[0]) is False:
            self.found = step
        return result

    def _zero(self, tensor: Tensor, dims: Sequence[Dim] | None) -> bool | None:
        """Whether masked channels are zero; None if the tensor does not carry the axis."""
        if dims is None or tuple(map(length, dims)) != tuple(tensor.shape):
            return None
        for place, dim in enumerate(dims):
            parts = [each if isinstance(each, Axis) else Axis(each) for each in dim]
            pruned = torch.isin(Axis(length(dim), parts).channels(self._axis), self._pruned) if parts else None
            if pruned is not None and pruned.any():
                return not bool(tensor.index_select(place, pruned.nonzero().flatten()).any())
        return None


def explain(bench: Bench, model: nn.Module, trace: Trace, candidates: list[Candidate], wrong: dict[str, str]) -> None:
    """Name, for each unproved group, the operation that makes masked channels nonzero.

    Args:
        bench: ran the trials.
        model: the model.
        trace: of the model.
        candidates: that were tried; one per kind of block is examined.
        wrong: group name -> explanation; filled in.
    """
    known: dict[tuple[type[nn.Module], str, int], str] = {}
    for each in candidates:
        if each.group.name in wrong:
            kind = type(model.get_submodule(each.holder)), each.group.channel, len(each.group.slices)
            if kind not in known:
                known[kind] = _what_forbids(bench, trace, each)
            wrong[each.group.name] += known[kind]


def _what_forbids(bench: Bench, trace: Trace, candidate: Candidate) -> str:
    group = candidate.group
    kept = max(1, group.size // 2)
    with bench.trying([group]) as resting:
        steps = [step for step in trace.steps if not any(path in resting for path in around(step.module))]
        zeros = _Zeros(steps, candidate.axis, torch.arange(kept, group.size))
        # What masks a norm may raise something; that is told already.
        with suppress(Exception), bench.masked([group], {group.name: range(kept)}), written_out(), zeros:
            bench.outputs()
    step = zeros.found
    return f"; {plain_name(step.name)} is not 0 where its channels are 0 ({step.line})" if step else ""
