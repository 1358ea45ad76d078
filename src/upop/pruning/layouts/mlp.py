"""MLPs: plain, gated by a second layer, or gated by the other half of one layer; told by the flow of the forward."""

from __future__ import annotations

import re

from torch import nn

from upop.pruning.layouts.flow import Axis, follow
from upop.pruning.layouts.reading import (
    NotPrunableError,
    checked,
    columns_of,
    is_projection,
    join,
    layer_at,
    modality_of,
    rows_of,
    true_class,
    widths,
)
from upop.pruning.units import Skipped, Slice, Unit

_MLP = re.compile(r"mlp|ffn|feed_?forward|densere?l?u?act|intermediate", re.IGNORECASE)
# Not blocks of the residual stream, though made of the same layers: what comes before and after it is never pruned.
_OUTSIDE = re.compile(
    r"head(?!s)|project(or|ion)|pool|classif|predict|merger|position|pos_?emb|timestep",
    re.IGNORECASE,
)
# Gates of channels, which look like MLPs on a picture of one pixel.
_SQUEEZE = re.compile(r"^SE[A-Z]|Squeeze")
# A relative position is two or three numbers; an MLP that reads no more makes biases of them.
_FEWEST_INPUTS = 4


def read_mlps(model: nn.Module, name: str, module: nn.Module) -> tuple[list[Unit], list[Skipped]]:
    """Return the MLPs that the forward of `module` holds, and why it is none where it looks like one."""
    own = [child for child, part in module.named_children() if is_projection(part)]
    kind = true_class(module).__name__
    if not own and not any(is_projection(part) for child in module.children() for part in child.children()):
        return [], []
    if _SQUEEZE.search(kind):
        return [], []
    followed = follow(module)
    units: list[Unit] = []
    skipped: list[Skipped] = []
    for axis in followed.axes:
        if len({maker.partition(".")[0] for maker, _ in axis.parts} | {axis.consumer.partition(".")[0]}) == 1 and (
            "." in axis.consumer
        ):
            continue  # all inside one child, which is read on its own
        try:
            if _OUTSIDE.search(kind):
                raise NotPrunableError("heads, projections and position encodings are never pruned")
            units.append(_unit(model, name, module, axis))
        except NotPrunableError as reason:
            skipped.append(Skipped(name, str(reason)))
    if not units and not skipped and len(own) > 1 and _MLP.search(kind):
        # What the last layer makes is always returned; the other reasons say more.
        escaped = sorted(followed.escaped.items(), key=lambda item: "returns" in item[1])
        reasons = [f"{layer}: {why}" for layer, why in escaped if layer in own]
        skipped.append(Skipped(name, "its hidden axis cannot be followed; " + ("; ".join(reasons[:2]) or "not run")))
    return units, skipped


def _unit(model: nn.Module, name: str, module: nn.Module, axis: Axis) -> Unit:
    makers = sorted({maker for maker, _ in axis.parts}, key=lambda maker: (maker, None) not in axis.masked)
    consumer = join(name, axis.consumer)
    inputs = widths(layer_at(model, join(name, makers[0])))[0]
    size, outputs = widths(layer_at(model, consumer))
    within = all(_MLP.search(true_class(part).__name__) for part in _holders(model, name, axis))
    if (inputs != outputs and not within) or inputs < _FEWEST_INPUTS:
        raise NotPrunableError(f"it takes {inputs} numbers to {outputs}, so it is no block of a residual stream")
    slices: list[Slice] = []
    for maker in makers:
        halves = sorted(half for part, half in axis.parts if part == maker and half is not None)
        masked = {half for part, half in axis.masked if part == maker}
        slices += rows_of(
            model,
            join(name, maker),
            outer=max(1, len(halves)),
            produces=bool(masked),
            silent=tuple(half for half in halves if half not in masked) if masked else (),
        )
    slices.append(columns_of(model, consumer))
    modality = modality_of(model, name)
    unit = Unit(_name(name, module, axis, makers), "mlp", modality, size, 1, tuple(slices), entry="neuron")
    return checked(model, unit)


def _holders(model: nn.Module, name: str, axis: Axis) -> list[nn.Module]:
    """Return the modules that hold the layers of an axis."""
    layers = [maker for maker, _ in axis.parts] + [axis.consumer]
    return [model.get_submodule(join(name, layer).rpartition(".")[0]) for layer in layers]


def _name(name: str, module: nn.Module, axis: Axis, makers: list[str]) -> str:
    """Return the unit's name: the MLP's, or in a larger module that of the layer which makes the axis."""
    child, _, rest = makers[0].partition(".")
    if rest:
        return join(name, child)  # a module of its own holds the layer
    layers = {*makers, axis.consumer}
    alone = all(part in layers or not _holds_projection(child) for part, child in module.named_children())
    return name if alone and name else join(name, makers[0])


def _holds_projection(module: nn.Module) -> bool:
    return any(is_projection(part) for part in module.modules())
