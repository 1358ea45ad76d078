"""Soft masks on the groups of a model, in weight space.

Scaling output j of a layer by z_j is the same as scaling row j of its weight and bias: `diag(z) (W x + b)`. So a
masked layer multiplies its weight, not its activations, and computes that product again in the backward pass
rather than keeping it: attaching masks costs no activation memory and no copy of the weights.

Parameters stay the same objects under the same names, so an optimizer made before or after attaching works, and
so do data parallelism, gradient accumulation, clipping, autocast, second derivatives, torch.func and torch.compile.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upop.pruning.again import is_transformed
from upop.pruning.errors import LayoutError
from upop.pruning.groups import Group, Slice, owner_of, tensor_of
from upop.pruning.norms import Masked, masked_norm_class, set_norms
from upop.pruning.precision import accumulator
from upop.pruning.sharded import unsharded_class

# A masked module's mask and flag, each followed by the name of the tensor that it masks. The mask is no buffer:
# averages of weights pair the buffers of a model with those of a copy that may have been made before.
_MASK = "_upop_row_mask_"
_ALL_ONES = "_upop_all_ones_"
_AUTOCAST = ("cpu", "cuda")
"""Kinds of device that torch has autocast for, whatever else there is."""


class _Scratch(threading.local):
    """Reusable memory for masked weights on a CPU, per precision and thread; freed with the last mask."""

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}


_scratch = _Scratch()


class _MaskedProduct(torch.autograd.Function):
    """`F.linear` with output rows scaled by `rows`; saves no more for backward than `F.linear`.

    Autograd of `F.linear(inputs, weight * rows)` would keep a masked copy of every weight until the backward pass; with
    few tokens it also takes 1.5 times as long (16 tokens, 384 to 1536 features, on a CPU).

    It scales whatever is smaller: the weight (and its gradient in the backward pass), or, with few tokens, the output
    and its gradient.
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, rows = ctx.saved_tensors
        need_inputs, need_weight, need_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # it will be derived again
            factors, flat = rows.unsqueeze(1), grad.flatten(0, -2)
            return (
                grad @ (weight * factors).to(grad.dtype) if need_inputs else None,
                (flat.t() @ inputs.flatten(0, -2)).to(weight.dtype) * factors if need_weight else None,
                flat.sum(0).to(weight.dtype) * rows if need_bias else None,
                None,
            )
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
    """Return memory for a masked weight that is consumed before the next one is made; None lets torch allocate.

    On a CPU, fresh memory costs more than the product itself, since the system must map every page.
    """
    if factor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    held = _scratch.memory
    if factor.dtype not in held or held[factor.dtype].numel() < factor.numel():
        with torch.inference_mode(False):  # it outlives an evaluation in inference mode
            held[factor.dtype] = torch.empty(factor.numel(), dtype=factor.dtype, device=factor.device)
    return held[factor.dtype][: factor.numel()].view(factor.shape)


class _MaskedForward(Masked):
    """A linear layer whose forward scales the rows of its weight and bias."""

    def forward(self: Any, inputs: Tensor) -> Tensor:
        if getattr(self, _ALL_ONES + "weight"):
            return F.linear(inputs, self.weight, self.bias)
        kind = inputs.device.type
        known = kind in _AUTOCAST or torch.amp.is_autocast_available(kind)  # torch.compile of 2.6 does not trace it
        if known and torch.is_autocast_enabled(kind) and inputs.dtype != torch.float64:
            # Autocast does not reach into a custom function, so what F.linear would be given is given here.
            inputs = inputs.to(torch.get_autocast_dtype(kind))
        rows = _rows_of(self, "weight", self.weight)
        if is_transformed():
            weight, bias = self.weight * rows.unsqueeze(1), None if self.bias is None else self.bias * rows
            return F.linear(inputs, weight.to(inputs.dtype), None if bias is None else bias.to(inputs.dtype))
        result: Tensor = _MaskedProduct.apply(inputs, self.weight, self.bias, rows)
        return result


def _rows_of(module: nn.Module, leaf: str, tensor: Tensor) -> Tensor:
    """Return the mask of a module on the device and in the precision of its tensor, since the model may have moved."""
    rows: Tensor = getattr(module, _MASK + leaf)
    if rows.device == tensor.device and rows.dtype == tensor.dtype:
        return rows
    with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):  # it is kept
        moved = rows.to(tensor.device, tensor.dtype)
    if not (moved.is_meta or torch.compiler.is_compiling()):
        setattr(module, _MASK + leaf, moved)
    return moved


def _scaled_tensor(leaf: str, dim: int) -> property:
    """Return a property for the parameter `leaf` of a module, scaled by its mask along `dim`."""

    def read(self: nn.Module) -> Tensor:
        tensor = self._parameters[leaf]
        assert tensor is not None
        if getattr(self, _ALL_ONES + leaf):
            return tensor
        rows = _rows_of(self, leaf, tensor)
        return tensor * rows.view([-1 if axis == dim else 1 for axis in range(tensor.dim())])

    return property(read)


# What a module's class becomes: None for a linear layer with a masked forward, else which tensors it gives scaled.
_Scaled = tuple[tuple[str, int], ...] | None
_CLASSES: dict[tuple[type[nn.Module], _Scaled], type[nn.Module]] = {}


def _masked_class(kind: type[nn.Module], scaled: _Scaled) -> type[nn.Module]:
    if (kind, scaled) not in _CLASSES:
        mixin = _MaskedForward if scaled is None else Masked
        content = {leaf: _scaled_tensor(leaf, dim) for leaf, dim in scaled or ()}
        _CLASSES[kind, scaled] = type(f"Masked{kind.__name__}", (mixin, kind), {"unmasked_class": kind, **content})
    return _CLASSES[kind, scaled]


def _unmasked_class(kind: type[nn.Module]) -> type[nn.Module]:
    if "unmasked_class" in kind.__dict__ or not issubclass(kind, Masked):
        found: type[nn.Module] = kind.__dict__.get("unmasked_class", kind)
        return found
    # fully_shard was called on the masked module itself, and put its class in front.
    below = unsharded_class(kind)
    assert below is not None
    content = {name: value for name, value in kind.__dict__.items() if name == "__deepcopy__"}
    return type(kind.__name__, (kind.__bases__[0], _unmasked_class(below)), content)


class Masks:
    """The masks of some groups of a model, attached to it until `remove` is called.

    A masked module gets another class and a mask that is not saved; `remove` undoes both, and nothing else is
    changed. Copies of the model carry independent copies of the masks, which `unmask`, a cut or another search removes.

    Args:
        model: the model, changed in place.
        groups: the groups to mask; all masks start at 1, which leaves the outputs unchanged.

    Raises:
        LayoutError: a producer is no plain linear layer, or is already masked.
    """

    def __init__(self, model: nn.Module, groups: Iterable[Group]) -> None:
        unmask(model)
        self._groups = {group.name: group for group in groups}
        self._model = model
        # Per module that carries masks, and masked tensor of it: the groups, and their slices.
        self._layers: dict[tuple[nn.Module, str], list[tuple[str, Slice]]] = {}
        scaled: dict[nn.Module, dict[str, int]] = {}
        masked: dict[nn.Module, _Scaled] = {}
        for group in self._groups.values():
            for part in group.producers:
                if part.direct:
                    module, leaf = _readable(model, part.tensor, group)
                    scaled.setdefault(module, {})[leaf] = part.dim
                    masked[module] = tuple(scaled[module].items())
                elif part.tensor.endswith(".weight"):  # the layer's forward scales its bias too
                    module, leaf = _maskable(model, part.tensor, group), "weight"
                    masked[module] = None
                else:
                    continue
                self._layers.setdefault((module, leaf), []).append((group.name, part))
        for (module, leaf), ((_, part), *_) in self._layers.items():
            tensor = module._parameters[leaf]
            assert tensor is not None
            rows = torch.ones(tensor.shape[part.dim], dtype=tensor.dtype, device=tensor.device)
            setattr(module, _MASK + leaf, rows)
            setattr(module, _ALL_ONES + leaf, True)
        for module, kind in masked.items():
            module.__class__ = _masked_class(type(module), kind)
            _holders[module] = weakref.ref(self)
        self._norms = {model.get_submodule(path): group for group in self._groups.values() for path in group.norms}
        for norm, group in self._norms.items():
            _refuse_second(norm, group)
            norm.__class__ = masked_norm_class(type(norm))
            _holders[norm] = weakref.ref(self)
        for group in self._groups.values():
            set_norms(model, group, None)
        self._values = {
            group.name: torch.ones(group.size, dtype=accumulator(tensor_of(model, group.producers[0].tensor)))
            for group in self._groups.values()
        }

    @property
    def values(self) -> Mapping[str, Tensor]:
        """The mask of every group, shape [size], on the CPU, channels in [0, 1]."""
        return self._values

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor]) -> None:
        """Set the masks of the named groups; each has shape [size]."""
        for name, value in values.items():
            self._values[name].copy_(value)
        for (module, leaf), parts in self._layers.items():
            if any(name in values for name, _ in parts):
                rows = [part.expand(self._values[name]) for name, part in parts]
                getattr(module, _MASK + leaf).copy_(torch.stack(rows).prod(0))  # groups may lie side by side in it
                setattr(module, _ALL_ONES + leaf, all(bool((each == 1).all()) for each in rows))
        for group in (self._groups[name] for name in values):
            if group.norms:
                mask = self._values[group.name]
                set_norms(self._model, group, None if bool((mask == 1).all()) else mask.nonzero().flatten())

    def remove(self) -> None:
        """Remove the masks; the layers keep their current weights."""
        for module in dict.fromkeys([*(module for module, _ in self._layers), *self._norms]):
            _unmask(module)
        self._layers, self._norms = {}, {}
        _scratch.memory.clear()


_holders: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Masks]] = weakref.WeakKeyDictionary()
"""Whose masks a module has; a copy of it has some that nobody holds."""


def unmask(model: nn.Module) -> nn.Module:
    """Remove the masks from a copy of a model that is being searched; its weights are left unmasked.

    Masks that a `Pruner` holds stay; use its `remove`.

    Args:
        model: the copy, changed in place; a model without masks stays as it is.

    Returns:
        The given model.
    """
    for module in model.modules():
        if isinstance(module, Masked):
            holder = _holders.get(module)
            if holder is None or holder() is None:
                _unmask(module)
    return model


def _unmask(module: nn.Module) -> None:
    module.__class__ = _unmasked_class(type(module))
    for name in [each for each in vars(module) if each.startswith((_MASK, _ALL_ONES))]:
        delattr(module, name)
    _holders.pop(module, None)


def _refuse_second(module: nn.Module, group: Group) -> None:
    if isinstance(module, Masked):
        raise LayoutError(
            f"Group {group.name} is masked already: another Pruner holds this model. "
            "Call its remove() (or shrink()) before making a new one."
        )


def _readable(model: nn.Module, tensor: str, group: Group) -> tuple[nn.Module, str]:
    module, leaf = owner_of(model, tensor)
    _refuse_second(module, group)
    return module, leaf


def _maskable(model: nn.Module, tensor: str, group: Group) -> nn.Linear:
    layer, _ = owner_of(model, tensor)
    _refuse_second(layer, group)
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise LayoutError(
            f"Group {group.name} cannot be masked: {tensor} belongs to a {type(layer).__name__}, "
            "and masks need a torch.nn.Linear with its own forward. Exclude the group."
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


def refuse_masked(model: nn.Module, groups: Iterable[Group]) -> None:
    """Raise a `LayoutError` if a layer of `groups` still carries a mask."""
    for group in groups:
        for part in group.producers:
            if isinstance(owner_of(model, part.tensor)[0], Masked):
                raise LayoutError(
                    f"Group {group.name} is still masked: a Pruner holds this model. Call its shrink(), or its "
                    "remove() before applying a plan."
                )
