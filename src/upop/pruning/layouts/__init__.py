"""How the libraries of this field lay out attention and MLPs.

`find_units` walks a model and asks about every module: is it an attention that names its projections as a row of
`LAYOUTS` does, is it torch's own, does its forward hold an MLP? It never guesses: what no reader follows gives no
unit, and what looks prunable is reported by `survey` with the reason why it was left alone.
To support another family, add a row to `LAYOUTS` (and a case to tests/pruning/registry).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from upop.pruning.errors import LayoutError
from upop.pruning.known import Survey, remember, remembered
from upop.pruning.layouts.entries import read_attention
from upop.pruning.layouts.mlp import read_mlps
from upop.pruning.layouts.packed import read_encoder_layer, read_multihead
from upop.pruning.layouts.reading import NotPrunableError, is_projection, library_of, true_class
from upop.pruning.layouts.rows import LAYOUTS, Layout, layout_of
from upop.pruning.masks import unwrapped
from upop.pruning.seen import Kept, remember_inputs, was_made_up
from upop.pruning.stated import Stated
from upop.pruning.units import Skipped, Unit

__all__ = ["LAYOUTS", "Layout", "Survey", "find_units", "remember", "survey", "units_to_search"]

_ATTENTION = re.compile(r"[Aa]tt(entio)?n|[A-Z]SA$|XCA$|DeltaNet")
_MLP = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)


def find_units(model: nn.Module, example: Any = None, units: Sequence[Stated] = ()) -> list[Unit]:
    """Return every unit of `model` that can be pruned, in forward order; see `survey` for `example` and `units`.

    A model that keeps momentum copies of its own modules names them in an attribute `momentum_twins`, a mapping from
    a module's name to its copy's: the copies make no units, and are cut with the modules that they copy.

    Raises:
        LayoutError: the model has none; the message lists what was looked at and why it was left alone.
    """
    found = survey(model, example, units)
    if not found.units:
        seen = "; ".join(f"{part.name}: {part.reason}" for part in found.skipped[:5])
        raise LayoutError(
            f"No prunable unit found in {type(model).__name__}. "
            + (f"Looked at {len(found.skipped)} places ({seen}). " if seen else "It holds no attention or MLP. ")
            + "Known layouts of attention: torch.nn.MultiheadAttention, "
            + ", ".join("/".join(row.makers) for row in LAYOUTS)
            + ". Add a row to upop.pruning.layouts.LAYOUTS for another one."
        )
    return list(found.units)


def survey(model: nn.Module, example: Any = None, units: Sequence[Stated] = ()) -> Survey:
    """Return the units of `model` and what was skipped.

    With an example, units are read off what the model computes: its forward runs once without numbers, every axis is
    followed through the tensor operations that really happen, whatever the Python around them, and every unit is
    proved on numbers. What was found is remembered for this model. Without one, a model that was read before is not
    looked at again; one with classes of one's own is tried on inputs that its layers ask for, which may take another
    way through its forward than true ones do (a mask that may be left out is); of the others, modules whose names and
    forwards are known are looked at.

    Args:
        model: left as it is; wrappers of DDP and torch.compile are looked through.
        example: what a call of the model is given: a tensor, a tuple of arguments, a mapping of keyword arguments, or
            a function that is given the model.
        units: what is known of units beside (`upop.UnitSpec`); they are proved like the others, and stand before those
            that cut the same.

    Raises:
        LayoutError: the model cannot be run with the example, or what `units` states does not hold.
        SettingError: what `units` states does not fit the model.
    """
    model = unwrapped(model)
    if units:
        from upop.pruning.axes import example_for, with_stated

        read = survey(model, example)
        example = example_for(model) if example is None else example
        remember(model, with_stated(model, units, example, read).of(model, example))
        return survey(model)
    found = remembered(model) if example is None else None
    if found is not None:
        return found.of(model)
    guessed = example is None and is_of_ones_own(model)
    if guessed:
        from upop.pruning.axes import example_for

        with suppress(LayoutError):
            example = example_for(model)
    if example is not None:
        from upop.pruning import axes

        proved, skipped = axes.read(model, example)
        remember_inputs(model, Kept(model, example), made_up=guessed)
        twins: Mapping[str, str] = getattr(model, "momentum_twins", {})
        own = [unit for unit in proved if not unit.name.startswith(tuple(f"{copy}." for copy in twins.values()))]
        remember(model, Survey(tuple(_with_twins(unit, twins) for unit in own), tuple(skipped)).of(model, example))
    found = remembered(model)
    return (_look(model) if found is None else found).of(model, example)


_LIBRARIES = {"timm", "torch", "torchvision", "transformers", "open_clip", "upop", "peft"}
"""Whose models have known names and forwards."""


def units_to_search(model: nn.Module, example: Any, units: Sequence[Stated] = ()) -> list[Unit]:
    """Return the units of a model; those of one with classes of one's own are read with the example, if there is one.

    Raises:
        LayoutError: the model has none, or cannot be run with the example.
    """
    return find_units(model, example if units or is_of_ones_own(model) else None, units)


def is_of_ones_own(model: nn.Module) -> bool:
    """Whether a model has classes of no library whose models are read without an example."""
    return any(library_of(module) not in _LIBRARIES for module in unwrapped(model).modules())


def waits_for_batch(model: nn.Module) -> bool:
    """Whether the units of a model are to be read with the first batch that it is given.

    It has classes of one's own, and was not read with an example: inputs that were made for it may take another way
    through its forward than true ones do, and another reading may follow.
    """
    return is_of_ones_own(model) and (remembered(model) is None or was_made_up(model))


def _look(model: nn.Module) -> Survey:
    """Look at every module of `model` once, at its names and at what its forward says."""
    units: list[Unit] = []
    skipped: list[Skipped] = []
    twins: Mapping[str, str] = getattr(model, "momentum_twins", {})
    copies = tuple(f"{copy}." for copy in twins.values())
    places: dict[str, int] = {}
    for name, module in model.named_modules():
        places[name] = len(places)
        if name.startswith(copies):
            continue  # cut with the module it copies
        found, left = _read(model, name, module)
        units += found
        skipped += left
    units = _apart(units, skipped)
    units.sort(key=lambda unit: min(places[_layer(part.tensor)] for part in unit.producers))
    claimed = {_layer(part.tensor) for unit in units for part in unit.slices}
    skipped = [part for part in skipped if not _is_claimed(model, part.name, claimed)]
    return Survey(tuple(_with_twins(unit, twins) for unit in units), tuple(skipped))


def _read(model: nn.Module, name: str, module: nn.Module) -> tuple[list[Unit], list[Skipped]]:
    """Return the units that `module` itself holds, and why it holds none where it looks as if it did."""
    kind = true_class(module)
    try:
        if isinstance(module, nn.MultiheadAttention):
            return [read_multihead(model, name, module)], []
        if kind is nn.TransformerEncoderLayer:
            assert isinstance(module, nn.TransformerEncoderLayer)
            return [read_encoder_layer(model, name, module)], []
        row = layout_of(module)
        units = [read_attention(model, name, module, row)] if row is not None else []
        left: list[Skipped] = []
    except NotPrunableError as reason:
        units, left = [], [Skipped(name, str(reason))]
    mlps, reasons = read_mlps(model, name, module)
    left += reasons
    if not units and not mlps and not left and _looks_prunable(module):
        left.append(Skipped(name, f"no layout is known for {library_of(module)} {kind.__name__}"))
    return [*units, *mlps], left


def _apart(units: list[Unit], skipped: list[Skipped]) -> list[Unit]:
    """Leave out units that would cut an axis of a tensor which another one cuts already."""
    taken: dict[tuple[str, int], str] = {}
    kept = []
    for unit in units:
        axes = {(part.tensor, part.dim) for part in unit.slices}
        other = next((taken[axis] for axis in axes if axis in taken), None)
        if other is None:
            kept.append(unit)
            taken.update(dict.fromkeys(axes, unit.name))
        elif other != unit.name:
            skipped.append(Skipped(unit.name, f"it shares an axis with {other}"))
    return kept


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _with_twins(unit: Unit, twins: Mapping[str, str]) -> Unit:
    """Return the unit with the same axis of its momentum copy, if the model keeps one."""
    slices = [
        replace(part, tensor=copy + part.tensor.removeprefix(original), follows=True)
        for original, copy in twins.items()
        for part in unit.slices
        if part.tensor.startswith(f"{original}.")
    ]
    attributes = [
        replace(attribute, module=copy + attribute.module.removeprefix(original))
        for original, copy in twins.items()
        for attribute in unit.attributes
        if attribute.module.startswith(f"{original}.")
    ]
    return replace(unit, slices=(*unit.slices, *slices), attributes=(*unit.attributes, *attributes))


def _looks_prunable(module: nn.Module) -> bool:
    name = true_class(module).__name__
    if "xpert" in name and sum(part.dim() == 3 for part in module.parameters(recurse=False)) >= 2:
        return True  # experts side by side
    if not (_ATTENTION.search(name) or _MLP.search(name) or "in_proj" in module._modules):
        return False
    # Some libraries put a module of their own around every layer.
    return sum(sum(map(is_projection, child.modules())) == 1 for child in module.children()) >= 2


def _is_claimed(model: nn.Module, name: str, claimed: Iterable[str]) -> bool:
    children = [f"{name}.{child}" for child, part in model.get_submodule(name).named_children() if is_projection(part)]
    return bool(children) and all(child in claimed for child in children)
