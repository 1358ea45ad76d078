"""From a model and an example to its units: trace, follow, group, settle, prove."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from upop.pruning.axes.axis import Axis
from upop.pruning.axes.candidates import Candidate, NotCuttableError, candidate, named_apart
from upop.pruning.axes.copies import Shapes, numbered, told
from upop.pruning.axes.groups import Group, groups
from upop.pruning.axes.obstacles import obstacle, obstacles
from upop.pruning.axes.proof import Bench, prove, scaled
from upop.pruning.axes.reasons import tell
from upop.pruning.axes.settle import settle
from upop.pruning.axes.trace import Trace
from upop.pruning.costs import call
from upop.pruning.errors import LayoutError
from upop.pruning.shrink import tensors_of
from upop.pruning.units import Skipped, Slice, Unit


def read(model: nn.Module, example: Any) -> tuple[list[Unit], list[Skipped]]:
    """Return the units of a model, each proved on numbers, and what was left alone with the reason.

    Args:
        model: left as it is, its random state included.
        example: what a call of it is given.
    """
    with torch.random.fork_rng(devices=[]):
        return _read(model, example)


def _read(model: nn.Module, example: Any) -> tuple[list[Unit], list[Skipped]]:
    shapes = Shapes(model, example)
    trace = traced(shapes)
    found = groups(trace)
    chosen: list[Candidate] = []
    skipped: list[Skipped] = []
    for group in _wanted(found):
        try:
            chosen.append(candidate(model, trace, group))
        except NotCuttableError as reason:
            skipped.append(Skipped(group.makers[0].use.name.rpartition(".")[0], str(reason)))
    chosen = named_apart(chosen)
    bench: Bench | None = None
    proved: list[Candidate] = []
    lost: list[tuple[str, str]] = []
    for pending in _rounds(chosen):
        taken: dict[str, list[tuple[Slice, int]]] = {}
        for each in proved:
            for part in each.unit.slices:
                taken.setdefault(part.tensor, []).append((part, each.unit.size))
        pending = [each for each in pending if not _overlaps(each.unit, taken)]
        if pending:
            pending, reasons = settle(model, shapes, trace, pending)
            bench = bench or _bench(model, example)
            pending = scaled(bench, model, pending)
            wrong: dict[str, str] = {}
            proved += prove(bench, pending, wrong)
            tell(bench, model, trace, pending, wrong)
            lost += (reasons | wrong).items()
    barred = obstacles(model)
    skipped = [each for each in skipped if each.reason not in barred.values()]
    skipped = [*(Skipped(name, reason.removeprefix(f"{name} ")) for name, reason in barred.items()), *skipped]
    names = {each.unit.name for each in proved}
    skipped += [Skipped(name, reason) for name, reason in lost if name not in names]
    order = {name: place for place, name in enumerate(trace.uses)}
    units = sorted(
        (replace(each.unit, proved=True) for each in proved),
        key=lambda unit: min(order[part.tensor] for part in unit.slices),
    )
    return units, skipped


def _bench(model: nn.Module, example: Any) -> Bench:
    """Return where units are proved: in float64, or in float32 where a model has parts that know nothing else."""
    bench = Bench(numbered(model), example)
    try:
        bench.outputs()
    except Exception:
        return Bench(numbered(model, torch.float32), example)
    return bench


def traced(shapes: Shapes) -> Trace:
    """Run a model once, without numbers, and follow its axes."""
    twin = shapes.copy()
    trace = Trace(twin)
    trace.given(each for each in tree_leaves(shapes.example) if isinstance(each, Tensor))
    try:
        with shapes.running(), torch.no_grad(), trace.running():
            result = call(twin, shapes.example)
    except Exception as error:
        kind = type(twin).__name__
        raise LayoutError(obstacle(twin, "") or f"{kind} runs, but cannot be followed: {told(error)}.") from error
    trace.finish([each for _, each in tensors_of(result)])
    return trace


def _overlaps(unit: Unit, proved: Mapping[str, list[tuple[Slice, int]]]) -> bool:
    """Whether a unit cuts rows that another one cuts, or rows of one tensor along two dimensions, as heads and theirs.

    `proved` gives the slices of each tensor and the size of their unit.
    """
    for part in unit.slices:
        for other, size in proved.get(part.tensor, ()):
            if part.dim != other.dim and part.produces and other.produces:
                return True
            if part.dim == other.dim and bool(((part.entries(unit.size) >= 0) & (other.entries(size) >= 0)).any()):
                return True
    return False


def _rounds(chosen: list[Candidate]) -> Iterator[list[Candidate]]:
    """Yield what is tried together: dimensions and neurons first, then heads; where one axis is inside another, one."""
    yield [each for each in chosen if each.unit.entry in ("dimension", "neuron")]
    heads = sorted(
        (each for each in chosen if each.unit.entry in ("group", "head")), key=lambda each: -len(each.unit.slices)
    )
    while heads:
        taken: set[tuple[str, int]] = set()
        now: list[Candidate] = []
        later: list[Candidate] = []
        for each in heads:
            axes = {(part.tensor, part.dim) for part in each.unit.slices}
            (later if axes & taken else now).append(each)
            taken |= axes
        yield now
        heads = later


def _wanted(found: dict[Axis, Group]) -> list[Group]:
    return list(found.values())
