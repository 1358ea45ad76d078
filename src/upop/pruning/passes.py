"""Recorded forward passes that can be repeated, with the tokens that mattered to the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from upop.pruning.again import autocast, precision_now
from upop.pruning.precision import precise


@dataclass
class Pass:
    """A recorded forward pass.

    Attributes:
        args: arguments of the model.
        kwargs: keyword arguments.
        precision: device type and dtype of the active autocast.
        home: device of the model at the time; `kind` is the precision of its weights.
        step: step of the search, or index of the batch.
        function: (model, *args), runs in place of the model, if given.
        calls: per group, which rows of each call of its consumer matter to the loss; None if unknown.
        logs: per group, the sum of the log squares of its consumer's outputs over these rows, and their number.
        versions: of the input tensors; inputs that were modified since are unusable.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    precision: tuple[str, torch.dtype] | None
    home: torch.device
    step: int
    function: Callable[..., Any] | None = None
    kind: torch.dtype = torch.float32
    calls: dict[str, list[Tensor | None]] = field(default_factory=dict)
    logs: dict[str, Tensor] = field(default_factory=dict)
    versions: list[int] = field(default_factory=list)

    def tokens(self, name: str) -> int:
        """Return the number of tokens of a consumer that matter to the loss."""
        return sum(each.numel() for each in self.calls.get(name, []) if each is not None)

    def run(self, model: nn.Module) -> None:
        """Run the model again."""
        device, kind = device_of(model), precision_of(model)

        def here(value: Any) -> Any:  # a model may move, or be resumed elsewhere, and may be converted
            if not isinstance(value, Tensor):
                return value
            value = value.to(device) if value.device == self.home != device else value
            return value.to(kind) if value.dtype == self.kind != kind else value

        args, kwargs = tree_map(here, (self.args, self.kwargs))
        with autocast(device, self.precision):
            if self.function is None:
                model(*args, **kwargs)
            else:
                self.function(model, *args, **kwargs)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        step: int,
        function: Callable[..., Any] | None = None,
    ) -> Pass:
        """Return a record of the starting pass."""
        args, kwargs = tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, (args, kwargs))
        found = cls(args, kwargs, None, device_of(model), step, function, precision_of(model))
        given = found.tensors()
        found.precision = precision_now(given[0].device.type) if given else None
        found.note_versions()
        return found

    def tensors(self) -> list[Tensor]:
        """Return all input tensors."""
        return [value for value in tree_leaves((self.args, self.kwargs)) if isinstance(value, Tensor)]

    def note_versions(self) -> None:
        """Record the versions of the input tensors."""
        self.versions = self._versions()

    def own(self) -> None:
        """Replace the inputs by copies."""
        self.args, self.kwargs = tree_map(
            lambda value: value.clone() if isinstance(value, Tensor) else value, (self.args, self.kwargs)
        )
        self.note_versions()

    @property
    def is_whole(self) -> bool:
        """Whether no input was modified since."""
        return self.versions == self._versions()

    def _versions(self) -> list[int]:
        return [value._version for value in self.tensors() if not value.is_inference()]

    def state(self) -> dict[str, Any] | None:
        """Return the pass as plain tensors, numbers and containers; None if it holds anything else."""
        if self.function is not None or not _is_plain((self.args, self.kwargs)):
            return None
        return {
            "args": self.args,
            "kwargs": self.kwargs,
            "precision": self.precision,
            "home": str(self.home),
            "step": self.step,
            "kind": self.kind,
            "calls": {name: list(calls) for name, calls in self.calls.items()},
            "logs": dict(self.logs),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Pass:
        """Restore a pass from its `state`; tensors may be on another device."""
        found = cls(state["args"], state["kwargs"], state["precision"], torch.device(state["home"]), state["step"])
        found.kind = state.get("kind", found.kind)
        found.calls = {name: list(calls) for name, calls in state["calls"].items()}
        found.logs = dict(state["logs"])
        given = found.tensors()
        if given and all(value.device == given[0].device for value in given):
            found.home = given[0].device
        found.note_versions()
        return found


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first weight."""
    return next(model.parameters()).device


def precision_of(model: nn.Module) -> torch.dtype:
    """Return the precision of a model's first floating-point weight."""
    return next(each.dtype for each in model.parameters() if each.is_floating_point())


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    if isinstance(value, dict):
        return type(value) is dict and all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    return type(value) in (Tensor, str, int, float, bool, type(None))


def noting(noted: Pass, name: str, number: int, squares: Tensor) -> Callable[[Tensor], None]:
    """Return a hook that records which rows of a call have a gradient, and the size of their outputs."""

    def note(gradient: Tensor) -> None:
        matter = (gradient != 0).any(-1).flatten()
        noted.calls[name][number] = matter
        logs = logs_of(squares, matter)
        noted.logs[name] = noted.logs[name].to(logs) + logs if name in noted.logs else logs

    return note


def logs_of(squares: Tensor, counts: Tensor) -> Tensor:
    """Return the sum of the logs of squares, and their number, [2]."""
    ends = torch.finfo(squares.dtype)
    logs = squares.clamp(ends.tiny, ends.max).log().nan_to_num(0.0) * counts
    return torch.stack([logs.sum(), counts.sum()])


def squares_of(outputs: Tensor) -> Tensor:
    """Return the sum of squares of every row of outputs, [rows], in float32, or float64 for float64 outputs."""
    outputs = outputs.detach().flatten(0, -2)
    return precise(outputs).square().sum(1)
