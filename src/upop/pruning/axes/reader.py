"""Reads the groups of a model from one example: trace, build components, settle sizes, prove."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from upop.pruning.again import random_numbers_kept
from upop.pruning.axes.candidates import HEADS, Candidate, NotCuttableError, candidate, named_apart, shared_tensors
from upop.pruning.axes.components import components
from upop.pruning.axes.copies import Shapes, message_of
from upop.pruning.axes.examples import Calls
from upop.pruning.axes.obstacles import obstacle, obstacles
from upop.pruning.axes.settle import told_apart
from upop.pruning.axes.trace import Trace, WrittenError
from upop.pruning.axes.tried import Proof, told_by_sums
from upop.pruning.costs import call
from upop.pruning.errors import LayoutError
from upop.pruning.groups import Group, Skipped, Slice
from upop.pruning.merged import all_tokens
from upop.pruning.verify import tensors_of


def read(model: nn.Module, example: Any) -> tuple[list[Group], list[Skipped]]:
    """Return the groups of a model, each proved on numbers, and the parts left alone with reasons.

    Tokens that the model merges are left where they are meanwhile: merging moves them, and changes none of their
    channels, though matching by the keys of all heads at once would tie the dimensions of heads together.

    Args:
        model: left unchanged, and so are random generators.
        example: inputs of a call.
    """
    home = next((each.device for each in model.parameters() if not each.is_meta), torch.device("cpu"))
    # A model may be read while another one is built on the meta device; a default device makes every call slower.
    at_home = nullcontext() if home == torch.empty(0).device else home  # before 2.7 torch tells no `with` of a device
    with random_numbers_kept(), at_home, all_tokens(model):
        return _read(model, example)


def _read(model: nn.Module, example: Any) -> tuple[list[Group], list[Skipped]]:
    shapes, trace = traced(model, example)
    chosen, skipped = _candidates(model, trace)
    if shapes.mode is None:  # numbers say where the forward goes, and a cut must not change them
        shapes.silent = {part.tensor for each in chosen for part in each.group.slices if not part.produces}
        trace = _traced(shapes)
        chosen, skipped = _candidates(model, trace)
    proof = Proof(model, example, shapes, trace)
    proved: list[Candidate] = []
    lost: list[tuple[str, str]] = []
    for pending in _rounds(chosen):
        rivals = _rivals(pending, proved)
        pending = [each for each in pending if _more(each, rivals[each.group.name])]
        if pending:
            wrong: dict[str, str] = {}
            better = proof.of(pending, wrong)
            lost += wrong.items()
            beaten = {id(rival) for each in better for rival in rivals[each.group.name]}
            proved = [each for each in proved if id(each) not in beaten] + better
    proved = told_apart(told_by_sums(proved, proof.alike))
    barred = obstacles(model, {part.tensor for each in proved for part in each.group.slices})
    skipped = [each for each in skipped if each.reason not in barred.values()]
    skipped = [*(Skipped(name, reason.removeprefix(f"{name} ")) for name, reason in barred.items()), *skipped]
    names: set[str] = set()
    for place, each in enumerate(proved):
        if each.group.name in names:  # heads of one part of an attention, and dimensions of another
            proved[place] = replace(each, group=replace(each.group, name=f"{each.group.name}[{each.group.channel}s]"))
        names.add(proved[place].group.name)
    skipped += [Skipped(name, reason) for name, reason in lost if name not in names]
    cut = {part.tensor for each in proved for part in each.group.slices}
    skipped = [each for each in skipped if not _whole(model, each.name, cut)]
    skipped += [Skipped(name, reason) for name, reason in proof.alike.items()]
    return in_order(model, (replace(each.group, proved=True) for each in proved)), skipped


def in_order(model: nn.Module, groups: Iterable[Group]) -> list[Group]:
    """Return groups in the order of the parameters of a model."""
    places = {name: place for place, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    return sorted(groups, key=lambda group: min(places.get(part.tensor, 0) for part in group.producers))


def _whole(model: nn.Module, name: str, cut: set[str]) -> bool:
    """Whether all weights of a layer are cut, so that its other axes need no report."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return False
    weights = [key for key, each in layer.named_parameters(name, remove_duplicate=False) if each.dim() > 1]
    return bool(weights) and cut.issuperset(weights)


def _candidates(model: nn.Module, trace: Trace) -> tuple[list[Candidate], list[Skipped]]:
    """Return the candidates, and the rejected components with reasons."""
    shared = shared_tensors(model)
    chosen: list[Candidate] = []
    skipped: list[Skipped] = []
    for component in components(trace).values():
        try:
            chosen.append(candidate(model, trace, component, shared))
        except NotCuttableError as reason:
            skipped.append(Skipped(component.producers[0].use.name.rpartition(".")[0], str(reason)))
    return named_apart(chosen), skipped


def traced(model: nn.Module, example: Any) -> tuple[Shapes, Trace]:
    """Trace a model on tensors without numbers, or with them if its forward asks for them.

    Raises:
        LayoutError: the model cannot be run with the example, or not be followed.
    """
    try:
        shapes = Shapes(model, example, run=False)
        return shapes, _traced(shapes)
    except LayoutError:
        shapes = Shapes(model, example)
        return shapes, _traced(shapes)


def _traced(shapes: Shapes) -> Trace:
    """Trace a model once on fake tensors; repeat it if the forward writes to a buffer."""
    written: set[str] = set()
    while True:
        copied = shapes.copy()
        trace = Trace(copied, written)
        trace.given(each for each in tree_leaves(shapes.example) if isinstance(each, Tensor))
        try:
            with shapes.running(), torch.no_grad(), trace.running():
                result = call(copied, shapes.example)
        except LayoutError:
            raise
        except WrittenError as found:
            written.add(found.name)
            continue
        except Exception as error:
            kind = type(copied).__name__
            raise LayoutError(
                obstacle(copied, "") or f"{kind} runs, but cannot be followed: {message_of(error)}."
            ) from error
        trace.finish(*_outputs(result, shapes.example))
        return trace


def _outputs(result: Any, example: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that a model gives, and those inside of what its parts gave, which it hands on beside them."""
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, list | tuple) else ()
    own = [each for each in values if isinstance(each, Tensor) and each.is_floating_point()]
    every = [each for _, each in tensors_of(result)]
    if not own or isinstance(example, Calls):
        return every, []
    return own, [each for each in every if not any(each is other for other in own)]


def _rivals(pending: Iterable[Candidate], proved: Iterable[Candidate]) -> dict[str, list[Candidate]]:
    """Return, by name, the candidates that cut the same rows, or other dimensions of the same tensors (heads)."""
    taken: dict[str, list[tuple[Slice, Candidate]]] = {}
    for each in proved:
        for part in each.group.slices:
            taken.setdefault(part.tensor, []).append((part, each))
    found: dict[str, list[Candidate]] = {}
    for each in pending:
        met: dict[int, Candidate] = {}
        for part in each.group.slices:
            for other, rival in taken.get(part.tensor, ()):
                if id(rival) not in met and _meet(part, each.group.size, other, rival.group.size):
                    met[id(rival)] = rival
        found[each.group.name] = list(met.values())
    return found


def _meet(one: Slice, size: int, other: Slice, other_size: int) -> bool:
    if one.dim != other.dim:
        return one.produces and other.produces
    return bool(((one.channels(size) >= 0) & (other.channels(other_size) >= 0)).any())


def _more(candidate: Candidate, rivals: list[Candidate]) -> bool:
    """Whether heads also cut a layer that the head dimensions in their place would leave out."""
    covered = {part.tensor for each in rivals for part in each.group.slices}
    left_out = (part for part in candidate.group.producers if part.tensor not in covered)
    return not rivals or any(max(part.inners) > 1 for part in left_out)


def _rounds(chosen: list[Candidate]) -> Iterator[list[Candidate]]:
    """Yield candidates that are tried together: head dims and neurons first, then heads; of nested axes, only one.

    The shapes of tensors would not reveal what a group with nested axes keeps. Head dims that several attentions
    share (through a position table, for instance) come last, since whole heads can be pruned per attention.
    """
    heads = sorted((each for each in chosen if each.group.channel in HEADS), key=lambda each: -len(each.group.slices))
    flat = [each for each in chosen if each.group.channel not in HEADS]
    of_heads = _rivals(flat, heads)
    joint = [each for each in flat if _shared(each, of_heads[each.group.name])]
    flat = [each for each in flat if each not in joint]
    met = _rivals(flat, flat)
    place = {id(each): (-len(each.group.slices), at) for at, each in enumerate(flat)}
    inner = {id(e) for e in flat if any(place[id(other)] < place[id(e)] for other in met[e.group.name])}
    yield [each for each in flat if id(each) not in inner]
    yield [each for each in flat if id(each) in inner]
    while heads:
        taken: set[tuple[str, int]] = set()
        now: list[Candidate] = []
        later: list[Candidate] = []
        for each in heads:
            axes = {(part.tensor, part.dim) for part in each.group.slices}
            (later if axes & taken else now).append(each)
            taken |= axes
        yield now
        heads = later
    yield joint


def _shared(dimensions: Candidate, heads: list[Candidate]) -> bool:
    """Whether several attentions share these head dims through a tensor outside their heads."""
    tensors = [{part.tensor for part in each.group.slices} for each in heads]
    apart = any(one.isdisjoint(other) for one, other in itertools.combinations(tensors, 2))
    return apart and not {part.tensor for part in dimensions.group.slices} <= set().union(*tensors)
