"""Soft masks on the units of a model, in weight space.

Scaling output j of a layer by z_j is the same as scaling row j of its weight and bias: `diag(z) (W x + b)`. So a
masked layer multiplies its weight, not its activations, and computes that product again in the backward pass
rather than keeping it: attaching masks costs no activation memory and no copy of the weights.

Parameters stay the same objects under the same names, so an optimizer made before or after attaching works, and
so do data parallelism, gradient accumulation, clipping, autocast and torch.compile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from upop.pruning.errors import LayoutError
from upop.pruning.units import Unit, owner_of, tensor_of

_BUFFER = "_upop_row_mask"
_ALL_ONES = "_upop_all_ones"


class _Scratch(threading.local):
    """Memory for masked copies on a CPU, by precision, one set per thread; it lasts as long as any mask does."""

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}


_scratch = _Scratch()


class _MaskedProduct(torch.autograd.Function):
    """`F.linear` with its output rows scaled by `rows`; nothing is kept for backward but what `F.linear` keeps.

    The scaling goes to whatever is less to read and write: to the weight (and, in the backward pass, to its gradient
    too), or, where there are few tokens, to the output and its gradient.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight, rows)
        if _tokens(inputs) < weight.shape[1]:
            dtype = inputs.dtype
            product = F.linear(inputs, weight.to(dtype), None if bias is None else bias.to(dtype))
            return product.mul_(rows.to(dtype))
        return F.linear(inputs, *_scaled(weight, bias, rows, inputs.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, rows = ctx.saved_tensors
        need_inputs, need_weight, need_bias = ctx.needs_input_grad[:3]
        few = _tokens(inputs) < 2 * weight.shape[1]
        flat = grad.reshape(-1, grad.shape[-1])
        if few:
            flat = torch.mul(flat, rows.to(flat.dtype), out=_scratch_like(flat))
        grad_inputs = grad_weight = grad_bias = None
        if need_inputs:
            scaled = weight.to(grad.dtype) if few else _scaled(weight, None, rows, grad.dtype)[0]
            grad_inputs = (flat @ scaled).view(inputs.shape)
        if need_weight:
            grad_weight = (flat.t() @ inputs.reshape(-1, inputs.shape[-1])).to(weight.dtype)
            grad_weight = grad_weight if few else grad_weight.mul_(rows.unsqueeze(1))
        if need_bias:
            grad_bias = flat.sum(0).to(weight.dtype)
            grad_bias = grad_bias if few else grad_bias.mul_(rows)
        return grad_inputs, grad_weight, grad_bias, None


def _tokens(inputs: Tensor) -> int:
    return inputs.numel() // inputs.shape[-1]


def _scaled(weight: Tensor, bias: Tensor | None, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    masked = torch.mul(weight, rows.unsqueeze(1), out=_scratch_like(weight))
    return masked.to(dtype), None if bias is None else (bias * rows).to(dtype)


def _scratch_like(factor: Tensor) -> Tensor | None:
    """Return memory for a masked copy that is used up before the next one is made; None lets torch allocate it.

    On a CPU fresh memory costs more than the product itself, since the system has to map every page.
    """
    if factor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    held = _scratch.memory
    if factor.dtype not in held or held[factor.dtype].numel() < factor.numel():
        held[factor.dtype] = factor.new_empty(factor.numel())
    return held[factor.dtype][: factor.numel()].view(factor.shape)


class _MaskedForward:
    """Mixed into the class of a linear layer while it is masked."""

    unmasked_class: type[nn.Linear]

    def forward(self: Any, inputs: Tensor) -> Tensor:
        if getattr(self, _ALL_ONES):
            return F.linear(inputs, self.weight, self.bias)
        kind = inputs.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and inputs.dtype != torch.float64:
            # Autocast does not reach into a custom function, so what F.linear would be given is given here.
            inputs = inputs.to(torch.get_autocast_dtype(kind))
        result: Tensor = _MaskedProduct.apply(inputs, self.weight, self.bias, getattr(self, _BUFFER))
        return result


_CLASSES: dict[type[nn.Linear], type[nn.Linear]] = {}


def _masked_class(kind: type[nn.Linear]) -> type[nn.Linear]:
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Masked{kind.__name__}", (_MaskedForward, kind), {"unmasked_class": kind})
    return _CLASSES[kind]


class Masks:
    """The masks of some units of a model, attached to it until `remove` is called.

    A masked layer changes its class for the time being and gains a buffer that is not saved; `remove` takes both
    away, and nothing else of the model was touched.

    Args:
        model: the model, changed in place.
        units: the units to mask; all entries start at 1, so the model's function does not change.

    Raises:
        LayoutError: a layer that produces a unit's axis is no plain linear layer, or is masked already.
    """

    def __init__(self, model: nn.Module, units: Iterable[Unit]) -> None:
        self._units = {unit.name: unit for unit in units}
        self._layers: dict[str, list[tuple[nn.Linear, Unit, int]]] = {}
        found: list[tuple[nn.Linear, Unit, int]] = []
        for unit in self._units.values():
            for position, part in enumerate(unit.slices):
                if part.produces and not part.follows and part.tensor.endswith(".weight"):
                    found.append((_maskable(model, part.tensor, unit), unit, position))
        for layer, unit, position in found:
            weight = layer.weight
            rows = torch.ones(weight.shape[0], dtype=weight.dtype, device=weight.device)
            layer.register_buffer(_BUFFER, rows, persistent=False)
            setattr(layer, _ALL_ONES, True)
            layer.__class__ = _masked_class(type(layer))
            self._layers.setdefault(unit.name, []).append((layer, unit, position))
        self._values = {
            unit.name: torch.ones(unit.size, dtype=_precise(tensor_of(model, unit.producers[0].tensor)))
            for unit in self._units.values()
        }

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The mask of every unit, shape [size], on the CPU, entries in [0, 1]."""
        return self._values

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor]) -> None:
        """Set the masks of the named units; each has shape [size]."""
        for name, value in values.items():
            self._values[name].copy_(value)
            all_ones = bool((self._values[name] == 1).all())
            for layer, unit, position in self._layers[name]:
                getattr(layer, _BUFFER).copy_(unit.slices[position].expand(self._values[name]))
                setattr(layer, _ALL_ONES, all_ones)

    def remove(self) -> None:
        """Take the masks off; the layers are what they were, with whatever their weights are now."""
        for layers in self._layers.values():
            for layer, _, _ in layers:
                layer.__class__ = type(layer).unmasked_class  # type: ignore[attr-defined]
                delattr(layer, _BUFFER)
                delattr(layer, _ALL_ONES)
        self._layers = {}
        _scratch.memory.clear()


def _precise(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _maskable(model: nn.Module, tensor: str, unit: Unit) -> nn.Linear:
    layer, _ = owner_of(model, tensor)
    if issubclass(type(layer), _MaskedForward):
        raise LayoutError(
            f"Unit {unit.name} is masked already: another Pruner holds this model. "
            "Call its remove() (or shrink()) before making a new one."
        )
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise LayoutError(
            f"Unit {unit.name} cannot be masked: {tensor} belongs to a {type(layer).__name__}, "
            "and masks need a torch.nn.Linear with its own forward. Exclude the unit."
        )
    return layer


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of data parallelism and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def refuse_masked(model: nn.Module, units: Iterable[Unit]) -> None:
    """Raise a `LayoutError` if a layer of `units` still carries a mask."""
    for unit in units:
        for part in unit.producers:
            if issubclass(type(owner_of(model, part.tensor)[0]), _MaskedForward):
                raise LayoutError(
                    f"Unit {unit.name} is still masked: a Pruner holds this model. Call its shrink(), or its "
                    "remove() before applying a plan."
                )
