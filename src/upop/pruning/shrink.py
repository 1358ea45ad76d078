"""Cutting for real: validate everything, build the smaller tensors, swap them in, prove the result, or undo."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.costs import call, evaluating
from upop.pruning.errors import LayoutError, VerificationError
from upop.pruning.known import remember_cut
from upop.pruning.masks import Masks, refuse_masked, unwrapped
from upop.pruning.plan import Plan
from upop.pruning.sharded import refuse_sharded
from upop.pruning.units import Unit, has_number, number_of, owner_of, set_number, tensor_of

# Largest allowed difference of an output, relative to its largest entry, by the precision of the weights.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass
class Edit:
    """One assignment of the surgery, which can be taken back."""

    module: nn.Module
    name: str
    new: Any

    def apply(self) -> Edit:
        """Do it; return what takes it back."""
        old = number_of(self.module, self.name)
        set_number(self.module, self.name, self.new)
        return Edit(self.module, self.name, old)


def shrink(model: nn.Module, plan: Plan | Mapping[str, Any], *, verify: Any = None, fold: bool = True) -> nn.Module:
    """Cut `model` to the entries that `plan` keeps; the same object comes back, physically smaller.

    The shrunken model computes what the model computes with the other entries masked to zero. Attention in every
    library divides by the square root of its current head_dim, so the queries are multiplied by
    sqrt(kept / original) where head dimensions go.

    Args:
        model: the dense model, without masks.
        plan: what to keep; a `Plan`, or a mapping from unit names to the entries to keep. Units not named stay.
        verify: inputs on which masked and shrunken outputs are compared (a tensor, a tuple of arguments, a mapping
            of keyword arguments, or a function that is given the model); None compares nothing.
        fold: False leaves the queries alone, for weights that are replaced right afterwards.

    Raises:
        PlanError: the plan does not fit the model.
        LayoutError: a tensor to be cut is shared with a part of the model that is not, or sharded over processes.
        VerificationError: the outputs differ. In every case the model is left as it was.
    """
    whole, model = model, unwrapped(model)
    refuse_sharded(model, "shrink()")
    if not isinstance(plan, Plan):
        from upop.pruning.layouts import find_units

        plan = Plan.of(find_units(model), plan)
    units = plan.check(model)
    refuse_masked(model, units)
    if verify is not None and any(tensor_of(model, part.tensor).is_meta for unit in units for part in unit.slices):
        raise LayoutError(
            f"{type(model).__name__} is on the meta device and has no outputs to verify. Use verify=None."
        )
    expected = _masked_outputs(model, units, plan, verify) if verify is not None else None
    undo = cut(model, units, plan, fold=fold)
    try:
        if expected is not None:
            compare(expected, outputs_of(model, verify), precision_of(model, units))
    except BaseException:
        restore(undo)
        raise
    remember_cut(model, units, plan)
    return whole


def cut(model: nn.Module, units: list[Unit], plan: Mapping[str, Sequence[int]], *, fold: bool = True) -> list[Edit]:
    """Apply the surgery; return the edits that take it back. Nothing is changed if building a layer fails."""
    refuse_shared(model, units)
    going = [unit for unit in units if len(plan[unit.name]) < unit.size]
    edits: list[Edit] = []
    tensors = dict.fromkeys(part.tensor for unit in going for part in unit.slices)
    for tensor in tensors:
        edits += _cut_tensor(model, tensor, going, plan, fold)
    for unit in going:
        edits += [Edit(model.get_submodule(swap.module), "__class__", swap.kind) for swap in unit.swaps]
        for attribute in unit.attributes:
            module = model.get_submodule(attribute.module)
            if has_number(module, attribute.name):
                edits.append(Edit(module, attribute.name, attribute.value(len(plan[unit.name]))))
    return [edit.apply() for edit in edits]


def restore(undo: list[Edit]) -> None:
    """Take back what `cut` did."""
    for edit in reversed(undo):
        edit.apply()


def _cut_tensor(
    model: nn.Module, name: str, units: list[Unit], plan: Mapping[str, Sequence[int]], fold: bool
) -> list[Edit]:
    """Cut one tensor along all axes that units cut it along."""
    module, leaf = owner_of(model, name)
    old = tensor_of(model, name)
    stays: dict[int, Tensor] = {}
    new = old.detach()
    with torch.no_grad():
        for unit, part in ((each, part) for each in units for part in each.slices if part.tensor == name):
            kept = torch.tensor(plan[unit.name], device="cpu")  # models may be built with another device as the default
            here = torch.zeros(old.shape[part.dim], dtype=torch.bool, device="cpu")
            here[part.index(kept, unit.size)] = True
            stays[part.dim] = stays.get(part.dim, torch.ones_like(here)) & here
            if fold and part.power:
                rows = part.query_rows(unit.size).to(old.device)
                queries = new.index_select(part.dim, rows) * (len(kept) / unit.size) ** part.power
                new = new.index_copy(part.dim, rows, queries) if len(rows) else new
        for dim, here in stays.items():
            new = new.index_select(dim, here.nonzero().flatten().to(old.device))
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    edits = [Edit(module, leaf, new)]
    for dim in stays if leaf == "weight" else ():
        width = _width_attribute(module, dim)
        edits += [Edit(module, width, new.shape[dim])] if width else []
    return edits


def _width_attribute(module: nn.Module, dim: int) -> str | None:
    """Return the name under which a layer keeps the length of its weight along `dim`, or None."""
    if isinstance(module, nn.Linear):
        return ("out_features", "in_features")[dim]
    if isinstance(module, nn.Conv2d):
        return ("out_channels", "in_channels")[dim]
    # transformers' Conv1D, whose weight is that of a linear layer transposed
    return ("nx", "nf")[dim] if hasattr(module, "nf") else None


def refuse_shared(model: nn.Module, units: list[Unit]) -> None:
    """Raise a `LayoutError` if a tensor of `units` is also held by another module of the model.

    A module that the model reaches by several names is cut once, and is no trouble.
    """
    names: dict[int, dict[tuple[int, str], str]] = {}
    for path, module in model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(tensor), {})[id(module), leaf] = f"{path}.{leaf}" if path else leaf
    for unit in units:
        for part in unit.slices:
            module, leaf = owner_of(model, part.tensor)
            holders = names.get(id(tensor_of(model, part.tensor)), {})
            others = [name for place, name in holders.items() if place != (id(module), leaf)]
            if others:
                raise LayoutError(
                    f"Unit {unit.name} cannot be cut: {part.tensor} is the same tensor as {', '.join(others)}. "
                    "Exclude the unit."
                )


def _masked_outputs(model: nn.Module, units: list[Unit], plan: Plan, inputs: Any) -> list[tuple[str, Tensor]]:
    masks = Masks(model, units)
    try:
        values = {unit.name: torch.zeros(unit.size) for unit in units}
        for name, value in values.items():
            value[list(plan[name])] = 1
        masks.set(values)
        return outputs_of(model, inputs)
    finally:
        masks.remove()


def precision_of(model: nn.Module, units: list[Unit]) -> torch.dtype:
    """Return the dtype of the weights that the units cut."""
    return tensor_of(model, units[0].slices[0].tensor).dtype if units else torch.float32


def outputs_of(model: nn.Module, inputs: Any) -> list[tuple[str, Tensor]]:
    """Return every floating-point tensor in the model's outputs for `inputs`, with its place in them.

    Runs in evaluation mode, without gradients and without autocast, at full float32 precision.
    """
    precision = torch.get_float32_matmul_precision()
    device = next(model.parameters()).device.type
    torch.set_float32_matmul_precision("highest")
    try:
        with evaluating(model), _unpatched(model), torch.autocast(device, enabled=False):
            return [(place, value.detach().clone()) for place, value in tensors_of(call(model, inputs))]
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def _unpatched(model: nn.Module) -> Iterator[None]:
    """Give modules their own forward where Accelerate put one around it that computes in mixed precision."""
    modules: list[Any] = [module for module in model.modules() if "_original_forward" in vars(module)]
    patched = [(module, module.forward) for module in modules]
    for module in modules:
        module.forward = module._original_forward
    try:
        yield
    finally:
        for module, forward in patched:
            module.forward = forward


def compare(expected: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]], dtype: torch.dtype) -> float:
    """Return the largest relative difference between two lists of outputs.

    Raises:
        VerificationError: it is above the tolerance for `dtype`, or the lists do not match.
    """
    if not expected or [place for place, _ in expected] != [place for place, _ in found]:
        raise VerificationError(
            f"The model gave {len(expected)} output tensors with masks and {len(found)} without; nothing to compare. "
            "Give inputs for which the model returns tensors."
        )
    tolerance = _TOLERANCE.get(dtype, 1e-5)
    worst = 0.0
    for (place, masked), (_, shrunk) in zip(expected, found, strict=True):
        if masked.shape != shrunk.shape:
            raise VerificationError(f"{place} has shape {tuple(masked.shape)} masked, {tuple(shrunk.shape)} shrunk.")
        if not masked.numel():
            continue
        scale = masked.abs().max().clamp_min(torch.finfo(masked.dtype).tiny)
        difference = float((masked - shrunk).abs().max() / scale)
        if not difference <= tolerance:
            raise VerificationError(
                f"The shrunken model does not compute what the masked one does: {place} differs by {difference:.2e} "
                f"of its largest entry, allowed are {tolerance:.0e}. The model was left as it was. "
                "If the model draws random numbers in evaluation mode, verify with inputs that avoid it; "
                "else its layout row is wrong: please report it."
            )
        worst = max(worst, difference)
    return worst


def tensors_of(value: Any, place: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield every floating-point tensor in a model's outputs, with its place in them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield place, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_of(part, f"{place}[{key!r}]")
    elif isinstance(value, tuple | list):
        for position, part in enumerate(value):
            yield from tensors_of(part, f"{place}[{position}]")
    elif is_dataclass(value):
        for part in fields(value):
            yield from tensors_of(getattr(value, part.name), f"{place}.{part.name}")
