"""How the libraries of this field lay out attention and MLPs.

`find_units` walks a model and asks about every module: is it an attention that names its projections as a row of
`LAYOUTS` does, is it torch's own, does its forward hold an MLP? It never guesses: what no reader follows gives no
unit, and what looks prunable is reported by `survey` with the reason why it was left alone.
To support another family, add a row to `LAYOUTS` (and a case to tests/pruning/registry).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import nn

from upop.pruning.errors import LayoutError
from upop.pruning.layouts.entries import read_attention
from upop.pruning.layouts.mlp import read_mlps
from upop.pruning.layouts.packed import read_encoder_layer, read_multihead
from upop.pruning.layouts.reading import NotPrunableError, is_projection, library_of, true_class
from upop.pruning.layouts.rows import LAYOUTS, Layout, layout_of
from upop.pruning.units import Skipped, Unit

__all__ = ["LAYOUTS", "Layout", "Survey", "find_units", "survey"]

_ATTENTION = re.compile(r"[Aa]tt(entio)?n|[A-Z]SA$|XCA$|DeltaNet")
_MLP = re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE)


@dataclass(frozen=True)
class Survey:
    """What `survey` found: the units, in forward order, and what was left alone and why."""

    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...]


def find_units(model: nn.Module) -> list[Unit]:
    """Return every unit of `model` that can be pruned, in forward order.

    A model that keeps momentum copies of its own modules names them in an attribute `momentum_twins`, a mapping from
    a module's name to its copy's: the copies make no units, and are cut with the modules that they copy.

    Raises:
        LayoutError: the model has none; the message lists what was looked at and why it was left alone.
    """
    found = survey(model)
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


def survey(model: nn.Module) -> Survey:
    """Look at every module of `model` once; return the units and what was skipped."""
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
