"""The residual stream of a tower as a group: all that writes it, normalises it and reads it is cut alike.

The axis is followed like every other one; sums tie all that blocks add to it. What keeps it whole otherwise, that norms
are taken over it, is no obstacle where a module of its own does that: masked, it computes over the channels that stay
(`upop.pruning.norms`). The group is proved on numbers, by itself and together with all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from upop.pruning.again import random_numbers_kept
from upop.pruning.axes.axis import factors_of, leaves_of
from upop.pruning.axes.candidates import (
    Candidate,
    NotCuttableError,
    common,
    is_inner,
    ordered,
    refuse_obstacles,
    slice_of,
)
from upop.pruning.axes.components import Component, components
from upop.pruning.axes.copies import numbered
from upop.pruning.axes.proof import Bench, at_random
from upop.pruning.axes.reader import in_order, traced
from upop.pruning.axes.settle import kept_numbers
from upop.pruning.axes.trace import Trace
from upop.pruning.axes.tried import MOST_MEMORY, MOST_MULTIPLY_ADDS, Proof
from upop.pruning.groups import Attribute, Group, Skipped
from upop.pruning.known import Prunable
from upop.pruning.merged import all_tokens
from upop.pruning.traits import momentum_encoders
from upop.pruning.words import modality_of

_RESIDUAL: Literal["residual"] = "residual"


def with_streams(model: nn.Module, example: Any, found: Prunable) -> Prunable:
    """Return what was found of a model, with its residual streams that can be cut, and why others cannot.

    Each is proved on numbers: by itself, and with all other groups. Tokens that the model merges are left where they
    are meanwhile: that moves them, and changes none of their channels.

    Args:
        model: left as it is.
        example: the arguments of a call.
        found: its other groups.
    """
    with all_tokens(model):
        proved, skipped = _proved(model, example, found.groups)
    names = {each.name for each in skipped}
    left = [each for each in found.skipped if each.name not in names]
    return replace(found, groups=tuple(in_order(model, (*found.groups, *proved))), skipped=(*left, *skipped))


def _proved(model: nn.Module, example: Any, groups: Sequence[Group]) -> tuple[list[Group], list[Skipped]]:
    with random_numbers_kept():
        shapes, trace = traced(model, example)
        chosen, skipped = _candidates(model, trace)
        wrong: dict[str, str] = {}
        proved = [replace(each.group, proved=True) for each in Proof(model, example, shapes, trace).of(chosen, wrong)]
        skipped += [Skipped(name, reason) for name, reason in wrong.items()]
        reason = _differing(model, example, [*groups, *proved], trace) if proved and groups else ""
    if reason:
        return [], [
            *skipped,
            *(Skipped(group.name, f"cut together with the other groups, {reason}") for group in proved),
        ]
    return proved, skipped


def _differing(model: nn.Module, example: Any, groups: list[Group], trace: Trace) -> str:
    """Say what differs where all groups are cut together; a model that is too large for that is not tried."""
    bytes_of_copies = 2 * torch.float64.itemsize * sum(each.numel() for each in model.parameters())
    if trace.multiply_adds > MOST_MULTIPLY_ADDS or bytes_of_copies > MOST_MEMORY:
        return ""
    return Bench(numbered(model), example).difference(groups, at_random(groups, 4))


def _candidates(model: nn.Module, trace: Trace) -> tuple[list[Candidate], list[Skipped]]:
    chosen: list[Candidate] = []
    skipped: list[Skipped] = []
    for component in components(trace).values():
        if _RESIDUAL not in component.axis.marks or is_inner(trace, component.axis):
            continue
        holder = common([part.use.name.rpartition(".")[0] for part in component.producers])
        name = f"{holder}.{_RESIDUAL}" if holder else _RESIDUAL
        taken = sum(each.group.name.rpartition("[")[0] in (name, "") and each.holder == holder for each in chosen)
        name = f"{name}[{taken + 1}]" if taken else name
        try:
            chosen.append(_stream(model, trace, component, name, holder))
        except NotCuttableError as reason:
            skipped.append(Skipped(name, str(reason)))
    return chosen, skipped


def _stream(model: nn.Module, trace: Trace, component: Component, name: str, holder: str) -> Candidate:
    """Return the group of a stream.

    Raises:
        NotCuttableError: it has to stay whole, with the reason.
    """
    if component.axis.barred:
        raise NotCuttableError(component.axis.barred)
    if momentum_encoders(model):
        raise NotCuttableError("the model has momentum encoders")
    refuse_obstacles(model, component)
    norms = _norms(model, trace, component)
    slices = []
    for part in ordered(component):
        made = slice_of(model, trace, component, part, loud=True)
        inside = part.use.name.rpartition(".")[0] in norms
        made = replace(made, produces=made.produces and not inside, reads="consumes" in part.roles)
        slices.append(replace(made, direct=made.direct and made.produces))
    if not any(part.reads for part in slices):
        raise NotCuttableError("no weight sums over it")
    modality = modality_of(model, holder)
    size = component.axis.size
    numbers = [
        Attribute(path, number)
        for path in norms
        for number, value in kept_numbers(model.get_submodule(path))
        if value == size
    ]
    group = Group(name, _RESIDUAL, modality, size, 1, tuple(slices), tuple(numbers), channel="channel", norms=norms)
    return Candidate(group, component.axis, holder)


def _norms(model: nn.Module, trace: Trace, component: Component) -> tuple[str, ...]:
    """Return the modules that normalise over a stream.

    Raises:
        NotCuttableError: something else takes a mean or a variance over it.
    """
    found: dict[str, None] = {}
    for path, dim in trace.norms:
        if component.axis not in leaves_of([dim]):
            continue
        own = {name for name, _ in model.get_submodule(path).named_parameters(path)} if path else {""}
        scales = {part.use.name for part in component.parts if not part.roles & {"produces", "consumes"}}
        if factors_of(dim) != [component.axis]:
            raise NotCuttableError(f"{path or 'the model'} normalises over it together with other axes")
        if not own <= scales:
            raise NotCuttableError(f"{path or 'the model'} normalises over it, but is not only a norm")
        found[path] = None
    return tuple(found)
