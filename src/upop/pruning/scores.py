"""Scores: one number per row of a weight, from the weight and its gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from upop.pruning.errors import SettingError, nearest
from upop.pruning.frozen import FrozenRows
from upop.pruning.observers import WeakHook, remove_all
from upop.pruning.precision import accumulator
from upop.pruning.sharded import HeldRows, held_rows, is_sharded_tensor, many_processes, whole_rows

Importance = Callable[[Tensor, Tensor], Tensor]
Key = TypeVar("Key")


def signed(weight: Tensor, gradient: Tensor) -> Tensor:
    """The published importance: the gradient of the loss to the mask of each row, `sum(gradient * weight)`, shape
    [rows].
    """
    precise = accumulator(weight)
    products: Tensor = torch.linalg.vecdot(gradient.to(precise), weight.to(precise))
    return products


@dataclass(frozen=True)
class Scoring:
    """How the gradients of a step become scores; high scores are pruned first.

    Attributes:
        rows: (weight, gradient) -> one number per row; the rows of a channel are summed.
        added: turns these sums, [size], into the contribution of the step, [size].
    """

    rows: Importance
    added: Callable[[Tensor], Tensor]


SCORES: dict[str, Scoring] = {
    "signed": Scoring(signed, lambda sums: sums),
    "absolute": Scoring(signed, lambda sums: -sums.abs()),
    "squared": Scoring(signed, lambda sums: -sums.square()),
}
"""By name. The sum of a channel's rows is the first-order change of the loss without it, by this step's batch. Sums
that keep their signs tell over many steps which channels hurt, and cancel over few; magnitudes tell which ones matter.
"""


def scoring(importance: str | Importance) -> Scoring:
    """Return the scoring that `importance` names, or one that uses it as a function.

    Raises:
        SettingError: the name is unknown.
    """
    if callable(importance):
        return Scoring(importance, lambda sums: sums)
    if importance not in SCORES:
        raise SettingError(
            f"importance={importance!r} is not known{nearest(str(importance), list(SCORES))}. "
            f"Use one of {', '.join(map(repr, SCORES))}, or a function of (weight, gradient)."
        )
    return SCORES[importance]


def agreed(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the scores of the first process, so that all processes make the same choices.

    Averaged gradients may differ in the last bit, which is enough for another choice.

    Args:
        scores: per group, [size]; all processes call this together, with the same groups.
    """
    if not many_processes():
        return dict(scores)
    device = next((each.device for each in scores.values() if each.device.type != "cpu"), torch.device("cpu"))
    flat = torch.cat([each.to(device) for each in scores.values()])
    torch.distributed.broadcast(flat, 0)
    parts = flat.split([len(each) for each in scores.values()])
    return {name: part.to(old) for part, (name, old) in zip(parts, scores.items(), strict=True)}


@dataclass(frozen=True)
class _Taken:
    """A score, and what it was computed from.

    Attributes:
        gradient: the tensor.
        version: of the gradient.
        sample: some of its numbers: a GradScaler changes them without a new version.
        rows: the score.
    """

    gradient: Tensor
    version: int
    sample: Tensor
    rows: Tensor

    def holds(self, gradient: Tensor) -> bool:
        """Whether a gradient is what the score was taken from, unchanged."""
        same = self.gradient is gradient and self.version == gradient._version
        return same and torch.equal(self.sample, _sample(gradient))


def _sample(gradient: Tensor) -> Tensor:
    """Return some of a gradient's numbers, of as many rows and columns as there are."""
    return gradient if gradient.dim() < 2 else gradient.diagonal()


class RowScores(Generic[Key]):
    """Computes the scores of parameters from their gradients.

    On a CPU, a score is computed in the backward pass as soon as the gradient of a weight is complete, while both are
    in the processor's cache: reading them from memory later costs several times as much. The score is discarded if the
    gradient changes afterwards (accumulation, unscaling, clipping, replacement), and computed from the final gradient.
    So it always is with several processes, which average gradients after the hooks ran.

    For a sharded weight, each process scores its own rows, and all processes get all scores.

    Args:
        function: (weight [rows, columns], gradient of the same shape) -> [rows].

    Attributes:
        frozen: scores the frozen weights, if these count.
    """

    def __init__(self, function: Importance) -> None:
        self._function = function
        self._taken: dict[tuple[Tensor, int], _Taken] = {}
        self._dims: dict[Tensor, tuple[int, ...]] = {}
        self._hooks: list[RemovableHandle] = []
        weakref.finalize(self, remove_all, self._hooks)
        self.frozen: FrozenRows | None = None

    def observe(self, parameters: Iterable[tuple[Tensor, int]]) -> None:
        """Compute scores of parameters in backward passes from now on, each along its given dimension."""
        for parameter, dim in parameters:
            self._dims[parameter] = tuple(dict.fromkeys((*self._dims.get(parameter, ()), dim)))
        self._hooks += [
            parameter.register_post_accumulate_grad_hook(WeakHook(self._take))
            for parameter in self._dims
            if parameter.requires_grad
        ]

    def observe_frozen(self, model: nn.Module, tensors: Mapping[str, tuple[Tensor, int]]) -> None:
        """Take scores of frozen parameters too, by name, each along its given dimension."""
        if tensors:
            is_sum = self._function is signed
            self.frozen = FrozenRows(model, tensors, partial(_computed, self._function), additive=is_sum)

    def of(self, parameters: Mapping[Key, tuple[Tensor, int]]) -> dict[Key, Tensor]:
        """Return the scores of the parameters with a gradient, [rows] each, along the given dimensions.

        Args:
            parameters: name, or any key -> the parameter, and the dimension along which its rows lie.

        Raises:
            LayoutError: a parameter is sharded in a way that `held_rows` does not support.
        """
        found: dict[Key, Tensor] = {}
        held: dict[Key, HeldRows] = {}
        frozen = {} if self.frozen is None else self.frozen.rows()
        for name, (parameter, dim) in parameters.items():
            gradient, taken = parameter.grad, self._taken.get((parameter, dim))
            if parameter in frozen:
                found[name] = frozen[parameter]
            elif gradient is None:
                continue
            elif is_sharded_tensor(parameter):
                held[name] = held_rows(parameter, gradient, dim, self._compute, accumulator(parameter))
            elif taken is not None and taken.holds(gradient):
                found[name] = taken.rows
            else:
                found[name] = self._compute(parameter, gradient, dim)
        return found | whole_rows(held)

    def forget(self) -> None:
        """Drop references to the gradients of the last backward pass."""
        self._taken.clear()
        if self.frozen is not None:
            self.frozen.forget()

    def release(self) -> None:
        """Stop computing scores, and remove all hooks from the parameters."""
        remove_all(self._hooks)
        self._dims.clear()
        self.forget()
        if self.frozen is not None:
            self.frozen.release()
            self.frozen = None

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or gradient.device.type != "cpu" or many_processes() or is_sharded_tensor(gradient):
            return
        for dim in self._dims[parameter]:
            rows = self._compute(parameter, gradient, dim)
            self._taken[parameter, dim] = _Taken(gradient, gradient._version, _sample(gradient).clone(), rows)

    def _compute(self, parameter: Tensor, gradient: Tensor, dim: int) -> Tensor:
        return _computed(self._function, parameter, gradient, dim)


class FreedRows(Generic[Key]):
    """Scores parameters during a backward pass, and frees each gradient immediately.

    At most the gradients of one layer exist at a time. Gradients of other parameters are not computed, unless the model
    uses reentrant checkpointing (`use_reentrant=True`), where torch cannot skip any.

    Args:
        function: (weight [rows, columns], gradient of the same shape) -> [rows].
        parameters: name, or any key -> a parameter, and the dimension along which its rows lie.
        others: all parameters that may get a gradient.
    """

    def __init__(
        self, function: Importance, parameters: Mapping[Key, tuple[Tensor, int]], others: Iterable[Tensor]
    ) -> None:
        self._function = function
        self._wanted: dict[Tensor, list[tuple[Key, int]]] = {}
        for key, (tensor, dim) in parameters.items():
            self._wanted.setdefault(tensor, []).append((key, dim))
        self._found: dict[Key, Tensor] = {}
        self._came: set[Tensor] = set()
        self._in_parts: set[Tensor] = set()  # gradients that come in several parts in one pass
        every = dict.fromkeys([*self._wanted, *others])
        self._hooks = [each.register_post_accumulate_grad_hook(self._take) for each in every if each.requires_grad]

    def of(self, loss: Callable[[], Tensor]) -> dict[Key, Tensor]:
        """Return the scores of the parameters that the loss depends on, [rows] each.

        Args:
            loss: computes the loss; called repeatedly if gradients are computed in parts.
        """
        while True:
            parts = len(self._in_parts)
            self._found, self._came = {}, set()
            value = loss()
            if is_checkpointed_whole(value):
                value.backward()
            else:
                value.backward(inputs=[each for each in self._wanted if each.requires_grad])
            del value
            if len(self._in_parts) == parts:
                break
            self._forget()  # what was freed belongs to what came later: those are held to the end from now on
        for parameter in self._in_parts:
            if parameter.grad is not None:
                self._score(parameter, parameter.grad)
        self._forget()
        return self._found

    def release(self) -> None:
        """Stop scoring and freeing gradients."""
        remove_all(self._hooks)

    def _forget(self) -> None:
        for parameter in self._in_parts:
            parameter.grad = None

    @torch.no_grad()
    def _take(self, parameter: Tensor) -> None:
        if parameter.grad is None or parameter in self._in_parts:
            return
        if parameter in self._came and parameter in self._wanted:
            self._in_parts.add(parameter)
        self._came.add(parameter)
        self._score(parameter, parameter.grad)
        parameter.grad = None

    @torch.no_grad()
    def _score(self, parameter: Tensor, gradient: Tensor) -> None:
        for key, dim in self._wanted.get(parameter, ()):
            self._found[key] = _computed(self._function, parameter, gradient, dim)


def is_checkpointed_whole(value: Tensor) -> bool:
    """Whether reentrant checkpointing hides the weights of a part of the graph of a value."""
    waiting, known = [value.grad_fn], {value.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        fresh = {each for each, _ in node.next_functions} - known
        known |= fresh
        waiting += fresh
    return False


def _computed(function: Importance, parameter: Tensor, gradient: Tensor, dim: int) -> Tensor:
    weight, gradient = parameter.detach(), gradient.detach()
    if weight.dim() == 1:
        weight, gradient = weight.unsqueeze(1), gradient.unsqueeze(1)
    elif dim or weight.dim() > 2:
        weight, gradient = (value.movedim(dim, 0).flatten(1) for value in (weight, gradient))
    rows = function(weight, gradient)
    shape = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
    if shape != [len(weight)]:
        raise SettingError(
            f"importance={getattr(function, '__name__', function)} returned {shape} for a weight of "
            f"{list(weight.shape)}. Return one score per row, [{len(weight)}]; channels with high scores are pruned "
            "first."
        )
    return rows
