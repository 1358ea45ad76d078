"""Least-squares correction: the layers that read what was cut make up for it with what stays.

What a removed entry gave to the layer that reads it is partly in the entries that stay. From the second moments of that
layer's inputs follow the weights that bring its outputs closest to what they were, without any gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from upop.pruning.scores import accumulator
from upop.pruning.sharded import is_sharded_tensor, many_processes
from upop.pruning.units import Unit, owner_of

RIDGE = 1e-3
"""How strongly corrected weights are held to the old ones, as a share of the inputs' mean square."""
_IDLE = 0.01
"""Weight of tokens that the loss does not depend on."""
_TOKENS = 8192
"""Most tokens of a forward pass that are looked at, at even distances."""


def readers(model: nn.Module, unit: Unit) -> list[nn.Linear]:
    """Return the layer that reads the unit's axis and then its momentum copies, if it is a plain linear layer."""
    reader = unit.online[-1]
    copies = [part for part in unit.slices if part.follows and not part.produces and part.dim == 1]
    modules = [owner_of(model, part.tensor)[0] for part in (reader, *copies) if part.tensor.endswith(".weight")]
    plain = reader.dim == 1 and modules and all(type(each).forward is nn.Linear.forward for each in modules)
    return [each for each in modules if isinstance(each, nn.Linear)] if plain else []


class _Uncompiled:
    """Has what `torch.compile` made run as it was written while anyone looks: it would not see their hooks."""

    def __init__(self) -> None:
        self._users = 0
        self._stance: Any = None

    def enter(self) -> None:
        if not self._users:
            self._stance = torch.compiler.set_stance("force_eager")
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._stance.__exit__(None, None, None)


_uncompiled = _Uncompiled()


class Moments:
    """Second moments of what the readers of some units are given, summed up as gradients come back.

    Tokens that the loss does not depend on (padding, all but the class token in a last layer) say little of what the
    layer is for: they only steady the fit. Forward passes without gradients are not looked at.

    Attributes:
        values: unit's name -> the sum of `x x^T`, with a 1 behind each x, [n + 1, n + 1]; float64 where x is, else
            float32.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._leave: Callable[[], Any] = lambda: None

    def watch(self, model: nn.Module, units: Iterable[Unit]) -> None:
        """Look at forward passes from now on, at what the readers of `units` are given, and at nothing else.

        As long as anything is looked at, compiled code runs as it was written.
        """
        wanted = {unit.name: layers[0] for unit in units if (layers := readers(model, unit))}
        if set(wanted) != set(self._hooks):
            self.release()
            self._hooks = {name: layer.register_forward_hook(_Look(self, name)) for name, layer in wanted.items()}
            if self._hooks:
                _uncompiled.enter()
                self._leave = weakref.finalize(self, _uncompiled.leave)

    def release(self) -> None:
        """Look no longer; no trace is left on the model."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._leave()

    def correct(
        self, model: nn.Module, units: Iterable[Unit], live: Mapping[str, Tensor], gone: Mapping[str, Tensor]
    ) -> None:
        """Correct the readers of units that lose `live` entries, by what all processes saw; then forget it.

        Args:
            model: masked, not cut; it may be sharded over processes. All of them call this at the same time.
            units: of the model.
            live: per unit, [size], bool: what there was when the moments were taken.
            gone: per unit, [size], bool: what is masked from now on.
        """
        for unit in units:
            layers = readers(model, unit)
            if not layers or not (gone[unit.name] & live[unit.name]).any():
                continue
            moments = self.values.get(unit.name)
            if moments is None:  # this process did not come by
                weight, size = layers[0].weight, layers[0].in_features + 1
                moments = torch.zeros(size, size, dtype=accumulator(weight), device=weight.device)
            if many_processes():
                torch.distributed.all_reduce(moments)
            if moments[-1, -1] > 0:  # the number of tokens
                correct_in_place(model, unit, (~gone[unit.name]).nonzero().flatten(), moments)
        self.values.clear()

    def add(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        """Add what the reader of a unit was given, [..., n], where the loss had a gradient to its outputs."""
        rows, slopes = inputs.flatten(0, -2), gradient.flatten(0, -2)
        apart = -(-len(rows) // _TOKENS)
        rows, slopes = rows[::apart], slopes[::apart]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        idle = (slopes == 0).all(1, keepdim=True)
        product = rows.t() @ torch.where(idle, _IDLE * rows, rows)
        product = torch.where(product.isfinite().all(), product, 0.0)
        self.values[name] = self.values[name] + product if name in self.values else product


class _Look:
    """The hook on a reader; copied or pickled with a model it does nothing any more."""

    def __init__(self, moments: Moments | None = None, name: str = "") -> None:
        self._moments, self._name = moments, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        del module
        moments, name = self._moments, self._name
        if moments is None or not output.requires_grad:
            return
        # Saved as autograd saves tensors, so that checkpointing keeps none of them, and offloading works.
        held = _Held.apply(args[0].detach(), torch.empty((), requires_grad=True))

        def look(gradient: Tensor) -> None:
            (inputs,) = held.grad_fn.saved_tensors
            moments.add(name, inputs, gradient)

        output.register_hook(look)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Look:
        return _Look()

    def __reduce__(self) -> tuple[type[_Look], tuple[()]]:
        return _Look, ()


class _Held(torch.autograd.Function):
    """Holds a tensor as other functions hold what their backward passes need."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return anchor.clone()


def affine(layer: nn.Linear) -> Tensor:
    """Return a layer's weights with its bias as the last column, [outputs, inputs + 1], in float64 on its device.

    Of a layer that is sharded over processes it is the outputs that this process holds.
    """
    weight = _precise(_held(layer.weight))
    bias = weight.new_zeros(len(weight)) if layer.bias is None else _precise(_held(layer.bias))
    return torch.cat([weight, bias.unsqueeze(1)], dim=1)


def corrected(before: Tensor, columns: Tensor, moments: Tensor, ridge: float, *, bias: bool) -> Tensor:
    """Return the W' that minimises `sum |W x - W' x'|^2 + r |W' - W|^2` over the inputs that `moments` is of.

    Args:
        before: W, [outputs, n + 1], its bias last.
        columns: the inputs that stay: x' of x.
        moments: [n + 1, n + 1]; see `Moments`.
        ridge: r, as a share of the mean square of the inputs that stay; the bias is free.
        bias: whether the layer has one.

    Returns:
        [outputs, columns], with the bias behind them if there is one; float64.
    """
    inputs = len(columns)
    columns = columns.to(before.device)
    if bias:
        columns = torch.cat([columns, columns.new_tensor([len(moments) - 1])])
    moments = _precise(moments).to(before.device)
    squares = moments[columns][:, columns]
    held = torch.zeros_like(squares.diagonal())
    held[:inputs] = ridge * squares.diagonal()[:inputs].mean().clamp_min(torch.finfo(torch.float32).tiny)
    aim = before @ moments[:, columns] + before[:, columns] * held
    solution: Tensor = torch.linalg.solve(squares + held.diag(), aim.t())
    return solution.t()


@torch.no_grad()
def correct_in_place(model: nn.Module, unit: Unit, kept: Tensor, moments: Tensor, ridge: float = RIDGE) -> None:
    """Correct the layers that read a unit, none of which is cut yet, for the loss of all but the `kept` entries.

    The columns of the entries that go are left as they are. Layers sharded over processes otherwise than by their
    outputs (as `fully_shard` does) are left alone.
    """
    columns = unit.online[-1].index(kept, unit.size)
    for layer in readers(model, unit):
        weight, bias = layer.weight, layer.bias
        placements: Any = getattr(weight, "placements", ())
        if not all(part.is_replicate() or part.is_shard(0) for part in placements):
            continue
        before = affine(layer)
        if not len(before):  # of a sharded layer another process has all outputs
            continue
        new = corrected(before, columns, moments, ridge, bias=bias is not None)
        held = _held(weight)
        held[:, columns.to(held.device)] = new[:, : len(columns)].to(held)
        if bias is not None:
            _held(bias).copy_(new[:, len(columns)])


def _held(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: all of it, if it is not sharded."""
    local: Tensor = tensor.detach()
    return local.to_local() if is_sharded_tensor(local) else local  # type: ignore[attr-defined]


def _precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; on the CPU where its device has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
