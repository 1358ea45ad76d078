"""Groups of one kind: one of them is tried on behalf of all, while unrelated modules are stubbed.

Two groups are of one kind if modules of the same classes run the same operations on the same shapes and numbers. A
trial of one group per kind runs nothing else: a module that involves none of their axes returns random numbers, and its
inputs are compared as if they were outputs of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from upop.pruning.axes.candidates import Candidate
from upop.pruning.axes.label import Made, Step
from upop.pruning.axes.settle import SWAPS, now
from upop.pruning.axes.trace import Trace
from upop.pruning.groups import Swap, around


def kinds(model: nn.Module, trace: Trace, candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return the candidates by kind, in order."""
    near: dict[str, list[int]] = {each.holder: [] for each in candidates}
    for at, step in enumerate(trace.steps):
        for path in around(step.module):
            if path in near:
                near[path].append(at)
    found: dict[Any, list[Candidate]] = {}
    for each in candidates:
        steps = sorted({*near[each.holder], *trace.carrying.get(each.axis.root, ())})
        done = tuple(_done(trace.steps[at], each.holder) for at in steps)
        group = each.group
        slices = tuple(replace(part, tensor=_beside(part.tensor, each.holder)) for part in group.slices)
        classes = tuple(map(type, model.get_submodule(each.holder).modules()))
        found.setdefault((group.kind, group.channel, group.size, group.heads, slices, classes, done), []).append(each)
    return list(found.values())


def _done(step: Step, holder: str) -> tuple[Any, ...]:
    shapes = tuple(None if dims is None else tuple(now(dim, {}) for dim in dims) for dims in step.dims)
    return step.name, _beside(step.module, holder), shapes, step.numbers


def _beside(path: str, holder: str) -> str:
    """Return a path relative to a module: inside it, some levels above it, or elsewhere."""
    if path == holder or path.startswith(f"{holder}."):
        return "." + path.removeprefix(holder)
    if not path or holder.startswith(f"{path}."):
        return "^" * (holder.removeprefix(path).strip(".").count(".") + 1)
    return path


def counterpart(model: nn.Module, tried: Candidate, other: Candidate) -> Candidate:
    """Transfer what was found for a tried candidate to another one of its kind."""

    def moved(path: str) -> str:
        seen = _beside(path, tried.holder)
        if seen.startswith("."):
            return other.holder + seen[1:]
        return ".".join(other.holder.split(".")[: -len(seen)]) if seen.startswith("^") else path

    group = tried.group
    slices = tuple(replace(part, tensor=own.tensor) for part, own in zip(group.slices, other.group.slices, strict=True))
    attributes = tuple(replace(each, module=moved(each.module)) for each in group.attributes)
    paths = [(moved(each.module), each.how) for each in group.swaps]
    swaps = tuple(Swap(path, SWAPS[how](type(model.get_submodule(path))), how) for path, how in paths)
    return replace(other, group=replace(other.group, slices=slices, attributes=attributes, swaps=swaps))


def idle(model: nn.Module, trace: Trace, candidates: Sequence[Candidate]) -> dict[str, list[Any]]:
    """Return the outermost modules with weights that the candidates do not involve, with their recorded outputs."""
    steps = {at for each in candidates for at in trace.carrying.get(each.axis.root, ())}
    owners = [part.tensor.rpartition(".")[0] for each in candidates for part in each.group.slices]
    busy = {path for inner in (*(trace.steps[at].module for at in steps), *owners) for path in around(inner)}
    found: dict[str, list[Any]] = {}
    for path, module in model.named_modules():
        gave = trace.gave.get(path)
        if path in busy or not gave or any(each in found for each in around(path)):
            continue
        known = all(each is None or isinstance(each, Made | int | float | str) for each in tree_leaves(gave))
        if known and any(True for _ in module.parameters()):
            found[path] = gave
    return found


def unread(model: nn.Module, trace: Trace, idle: Iterable[str]) -> set[str]:
    """Return the parameters that only idle modules read."""
    still = set(idle)
    return {
        name
        for name, _ in model.named_parameters()
        if all(any(path in still for path in around(reader)) for reader in trace.readers.get(name, ()))
    }
