"""Turns components into candidate groups: selects prunable axes and describes their slices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile

import torch
from torch import Tensor, nn

from upop.pruning.axes.axis import Axis
from upop.pruning.axes.components import Component, Part
from upop.pruning.axes.obstacles import obstacle
from upop.pruning.axes.trace import Trace
from upop.pruning.groups import Channel, Group, Kind, Slice, tensor_of
from upop.pruning.words import modality_of

HEADS = ("head", "group")
_BOTTLENECK = 8
"""An MLP whose hidden width is the residual stream's divided by this, or less, is an adapter or a gate.

Experts of a quarter of the width are common (Qwen3-Next: 512 of 2,048), so that a wider adapter cannot be told apart.
"""


@dataclass(frozen=True)
class Candidate:
    """A group that is not proved yet.

    Attributes:
        group: with what is known so far.
        axis: the axis that it prunes.
        holder: the module that holds all its layers.
        loud: its slices if apparent gates are masked as well; () if it has no gates.
    """

    group: Group
    axis: Axis
    holder: str
    loud: tuple[Slice, ...] = ()


class NotCuttableError(Exception):
    """A component cannot become a group; the message is the reason."""


def candidate(model: nn.Module, trace: Trace, component: Component, shared: Sequence[Sequence[str]] = ()) -> Candidate:
    """Return the group of a component.

    Args:
        model: the traced model.
        trace: of one run of the model.
        component: of that trace.
        shared: the names of its shared tensors (`shared_tensors`).

    Raises:
        NotCuttableError: the component cannot be pruned; the message is the reason.
    """
    if "residual" in component.axis.marks and not is_inner(trace, component.axis):
        raise NotCuttableError("it is the residual stream")
    if component.axis.fixed:
        raise NotCuttableError(component.axis.fixed)
    refuse_obstacles(model, component)
    if not component.consumers and not {"dimension", "attends"} <= component.axis.marks:
        raise NotCuttableError("no weight sums over it")
    attention = component.attends
    if not attention:
        _check_block(trace, component)
    for first, second, *others in shared:
        if any(part.use.name in (first, second, *others) for part in component.parts):
            raise NotCuttableError(f"{first} and {second} are one tensor; untie them: give one of them a copy")
    slices = read_alike([slice_of(model, trace, component, part) for part in ordered(component)])
    loud = read_alike([slice_of(model, trace, component, part, loud=True) for part in ordered(component)])
    producers = component.producers
    names = [part.use.name for part in (*producers, *component.consumers)]
    holder = common([name.rpartition(".")[0] for name in names])
    channel: Channel = "neuron"
    if attention:
        most = max(max(part.inners) for part in slices if part.produces)
        least = min(min(part.inners) for part in slices if part.produces)
        channel = "dimension" if component.is_dimension else "group" if most > least and most % least == 0 else "head"
    heads = slices[0].outer if channel == "dimension" else 1
    if slices[0].queries or slices[0].query_groups:
        heads = len(slices[0].queries) or slices[0].query_groups
    name = _attention_name(model, producers, holder) if attention else _mlp_name(model, holder, producers, names)
    modality = modality_of(model, name)
    kind: Kind = "attention" if attention else "mlp"
    group = Group(name, kind, modality, component.axis.size, heads, tuple(slices), channel=channel)
    return Candidate(group, component.axis, holder, tuple(loud) if loud != slices else ())


def refuse_obstacles(model: nn.Module, component: Component) -> None:
    """Refuse a component with a layer whose tensors cannot be cut."""
    for part in component.parts:
        reason = obstacle(model, part.use.name.rpartition(".")[0])
        if reason:
            raise NotCuttableError(reason)


def shared_tensors(model: nn.Module) -> list[list[str]]:
    """Return the names of tensors that several modules share; they would need a mask and a cut in each of them."""
    named: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            named.setdefault(id(parameter), []).append(name)
    return [names for names in named.values() if len(names) > 1]


def read_alike(slices: list[Slice]) -> list[Slice]:
    """Mask all tensors of a layer the same way: directly, if anything besides the layer reads one of them."""
    direct = {part.tensor.rpartition(".")[0] for part in slices if part.direct}
    return [
        replace(part, direct=True) if part.produces and part.tensor.rpartition(".")[0] in direct else part
        for part in slices
    ]


def _check_block(trace: Trace, component: Component) -> None:
    """Refuse axes outside residual blocks: output heads, projections, gates, adapters."""
    size = component.axis.size
    uses = {part.use.name: part.use for part in (*component.producers, *component.consumers)}.values()
    layers = [use for use in uses if sum(axis.size > 1 for axis in use.axes) > 1]  # the others are scales
    narrow = all(len(use.axes) == 2 or math.prod(axis.size for axis in use.axes) > size**2 for use in layers)
    if "bent" not in component.axis.marks and len(layers) == 2 and narrow:
        raise NotCuttableError("it is a low-rank factor: there is no activation between its two layers")
    inputs = _reached(trace, component.axis, "produces", "consumes")
    outputs = _reached(trace, component.axis, "consumes", "produces")
    shared = inputs & outputs
    width = sum(axis.size for axis in shared or inputs)
    alone = not any("residual" in leaf.marks for leaf in trace.carriers)
    if not shared and not alone and width != sum(axis.size for axis in outputs):
        raise NotCuttableError("it is not a residual block: it does not add to what it reads")
    if size * _BOTTLENECK <= width:
        raise NotCuttableError(f"it is an adapter or a gate: {size} neurons for a width of {width}")


def is_inner(trace: Trace, axis: Axis) -> bool:
    """Whether an accumulated axis starts and ends in another stream, like the state of a scan."""
    made_of = _reached(trace, axis, "produces", "consumes")
    outer = made_of == _reached(trace, axis, "consumes", "produces")
    return outer and any("residual" in leaf.marks for leaf in made_of)


def _reached(trace: Trace, axis: Axis, by: str, to: str) -> set[Axis]:
    """Return the axes across the adjacent weights, continuing through axes that can be cut."""
    seen, pending, found = {axis}, [axis], set()
    while pending:
        here = pending.pop()
        for use in trace.carriers.get(here, []):
            at = [
                dim for dim, each in enumerate(use.axes) if by in use.roles.get(dim, ()) and here in set(each.leaves())
            ]
            if not at:
                continue
            for dim, each in enumerate(use.axes):
                if dim in at or to not in use.roles.get(dim, ()):
                    continue
                for leaf in each.leaves():
                    if leaf in seen:
                        continue
                    seen.add(leaf)
                    if leaf.fixed or "residual" in leaf.marks:
                        found.add(leaf)
                    else:
                        pending.append(leaf)
    return found


def ordered(component: Component) -> list[Part]:
    """Return the parts in order: producers, followers, and one consumer last."""
    producers, consumers = sorted(component.producers, key=lambda part: part.gates), component.consumers
    others = [part for part in component.parts if part not in producers and part not in consumers]
    biases = {part.use.name.rpartition(".")[0]: part for part in others if part.use.name.endswith("bias")}
    made = ((part, biases.get(part.use.name.rpartition(".")[0], part)) for part in producers)
    return list(dict.fromkeys((*chain.from_iterable(made), *others, *consumers)))


def slice_of(model: nn.Module, trace: Trace, component: Component, part: Part, *, loud: bool = False) -> Slice:
    """Return the slice that a part of a component is.

    Args:
        model: that was read.
        trace: what a run of it did.
        component: of that trace.
        part: of the component.
        loud: whether what seems to gate alone is masked too.

    Raises:
        NotCuttableError: its channels have no regular layout.
    """
    size = component.axis.size
    gaps, inners = _blocks(part.channels, size)
    makes = bool(part.roles & {"produces", "added"})
    inner: int | tuple[int, ...] = inners[0] if len(set(inners)) == 1 else tuple(inners)
    queries: tuple[int, ...] = ()
    if "dimension" in component.axis.marks and component.is_dimension:
        queries = _flagged(trace.query_rows.get((part.use.name, part.dim)), part, inners)
    first = queries == tuple(range(len(queries)))
    mlp = not component.attends and not loud  # in an attention, what gates one thing may make another
    is_parameter = isinstance(tensor_of(model, part.use.name), nn.Parameter)
    return Slice(
        part.use.name,
        part.dim,
        len(inners),
        inner,
        produces=makes and not (mlp and part.gates) and is_parameter,
        query_groups=len(queries) if first else 0,
        direct=part.use.direct and makes,
        gaps=tuple(gaps) if any(gaps) else (),
        queries=() if first else queries,
        silent=_flagged(trace.silent_rows.get((part.use.name, part.dim)), part, inners) if makes and mlp else (),
    )


def _flagged(flags: Tensor | None, part: Part, inners: list[int]) -> tuple[int, ...]:
    """Return the indices of the flagged blocks of a tensor."""
    if flags is None or not flags.any():
        return ()
    positions = (part.channels == 0).nonzero().flatten()
    starts = positions[:: inners[0]] if len(set(inners)) == 1 else positions
    return tuple(block for block, start in enumerate(starts.tolist()) if flags[start])


def _blocks(channels: Tensor, size: int) -> tuple[list[int], list[int]]:
    """Return the gaps between the blocks that hold every channel once, and the rows per channel in each block."""
    values = channels.tolist()
    gaps, inners, at = [0], [], 0
    while at < len(values):
        if values[at] < 0:
            gaps[-1] += 1
            at += 1
            continue
        inner = 1
        while at + inner < len(values) and values[at + inner] == values[at]:
            inner += 1
        expected = torch.arange(size).repeat_interleave(inner).tolist()
        if values[at : at + size * inner] != expected:
            raise NotCuttableError("its channels have no regular layout")
        inners.append(inner)
        gaps.append(0)
        at += size * inner
    return gaps, inners


def common(paths: list[str]) -> str:
    """Return the name of the innermost module that holds some modules or tensors."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _attention_name(model: nn.Module, producers: list[Part], holder: str) -> str:
    """Return the name of the module that holds the query, key and value projections."""
    layers = []
    for part in producers:
        layer = part.use.name.rpartition(".")[0]
        alone = not any(True for _ in model.get_submodule(layer).children())
        layers.append(layer.rpartition(".")[0] if alone and layer != holder else layer)
    return common(layers)


def _mlp_name(model: nn.Module, holder: str, producers: list[Part], tensors: list[str]) -> str:
    """Return the name of an MLP: the module that holds nothing else, or its producer."""
    first = producers[0].use.name.rpartition(".")[0]
    if first == holder:
        return first
    child, _, rest = first.removeprefix(f"{holder}.").partition(".")
    below = f"{holder}.{child}" if holder else child
    if rest:
        return below
    inside = (name for name, parameter in model.get_submodule(holder).named_parameters(holder) if parameter.dim() > 1)
    return holder if holder and all(name in tensors for name in inside) else below


def named_apart(candidates: list[Candidate]) -> list[Candidate]:
    """Make names unique: candidates with the same name take that of their first layer."""
    count = Counter((each.group.name, each.group.channel in HEADS) for each in candidates)
    taken: Counter[tuple[str, bool]] = Counter()
    result = []
    for each in candidates:
        name, of_heads = each.group.name, each.group.channel in HEADS
        if count[name, of_heads] > 1 and each.group.kind == "mlp":
            name = each.group.slices[0].tensor.rpartition(".")[0]
        taken[name, of_heads] += 1
        if taken[name, of_heads] > 1:
            name = f"{name}[{taken[name, of_heads]}]"
        result.append(replace(each, group=replace(each.group, name=name)))
    return result
