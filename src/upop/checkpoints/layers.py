"""Models without the layers of which nothing is left: their configuration counts fewer, and loads them plainly.

A layer whose branches are gone adds a constant to what passes it, the biases that these ended with, where no norm comes
behind them. So its place may go if a bias before it takes the constant. Which number of a configuration counts the
layers of a list is found by trying, as in `size_fields`; what is made is handed out only where it computes the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from upop.checkpoints.blank import frame, outline
from upop.checkpoints.description import VOCABULARY
from upop.checkpoints.fit import kept_sizes
from upop.checkpoints.plain import differing, of_timm, of_transformers
from upop.checkpoints.preparation import preparation_of, set_preparation
from upop.checkpoints.size_fields import Builder, Change, Path, changed, nodes, shapes_of
from upop.checkpoints.sizes import dense_meta_copy, resize
from upop.libraries import is_pretrained
from upop.pruning import Group, Plan, Prunable, find_prunable, remember
from upop.pruning.carried import set_plan
from upop.pruning.depth import constants
from upop.pruning.known import know_as
from upop.pruning.seen import examples_of
from upop.pruning.uniform import layers_of
from upop.pruning.written import as_json, renamed
from upop.tokens.encoders import removed_tokens

_MOST_TRIED = 16
"""Tensors that are tried, one after the other, to take what the first layers add."""


@dataclass(frozen=True)
class Stack:
    """A list of layers that a configuration counts.

    Attributes:
        path: of the list, from the model.
        layers: place in it -> the names of the groups there.
        change: the places that stay -> what the fields become.
    """

    path: str
    layers: Mapping[int, tuple[str, ...]]
    change: Callable[[Sequence[int]], Change]

    def moved(self, stay: Sequence[int]) -> Callable[[str], str | None]:
        """Return what names of modules and tensors become where so many places stay; None for those that go."""
        places = {old: new for new, old in enumerate(stay)}
        start = f"{self.path}." if self.path else ""

        def rename(name: str) -> str | None:
            if not name.startswith(start):
                return name
            place, dot, rest = name.removeprefix(start).partition(".")
            if not place.isdigit():
                return name
            return f"{start}{places[int(place)]}{dot}{rest}" if int(place) in places else None

        return rename


def stacks(dense: nn.Module, groups: Sequence[Group], builder: Builder) -> list[Stack]:
    """Return the lists of layers that a configuration counts.

    Args:
        dense: the dense model, with or without memory.
        groups: its groups.
        builder: what makes such models.
    """
    lists: dict[str, dict[int, tuple[str, ...]]] = {}
    for path, names in layers_of(dense, groups).items():
        place = path.rpartition(".")[2]
        if place.isdigit():
            lists.setdefault(path.rpartition(".")[0], {})[int(place)] = names
    shapes, found = shapes_of(dense), []
    for path, layers in lists.items():
        count = len(list(dense.get_submodule(path).children()))
        fewer = Stack(path, layers, lambda _stay: {}).moved(range(count - 1))
        wanted = {name: shape for name, shape in shapes.items() if fewer(name) is not None}
        for change in _counting(builder, count):
            built = builder.outline(change(range(count - 1))) if count > 1 else None
            if built is not None and shapes_of(built) == wanted:
                found.append(Stack(path, layers, change))
                break
    return found


def _counting(builder: Builder, count: int) -> Iterator[Callable[[Sequence[int]], Change]]:
    """Yield ways in which a configuration may count so many layers; lists of so many values may speak of each."""
    for path, fields in nodes(builder.settings):
        here = {**dict.fromkeys(builder.more if not path else ()), **fields}
        lists = {(*path, name): value for name, value in fields.items() if _each(value, count)}
        for name, value in here.items():
            if type(value) is int and value == count:
                yield partial(_fewer, (*path, name), lists)
            elif value is None and name in builder.more:
                yield partial(_fewer, (*path, name), {})


def _each(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count


def _fewer(place: Path, lists: Mapping[Path, Sequence[Any]], stay: Sequence[int]) -> Change:
    return {place: len(stay), **{other: [values[at] for at in stay] for other, values in lists.items()}}


def without_layers(model: nn.Module, plan: Plan | None) -> nn.Module | str | None:
    """Return a model of fewer layers that computes what `model` does, with the same weights but for biases.

    Args:
        model: of transformers or timm, cut; it is left as it is.
        plan: how it was cut.

    Returns:
        None where nothing is left of no layer; where such a layer has to stay, why.
    """
    described = _described(model, plan)
    if described is None:
        return None
    builder, dense = described
    groups = find_prunable(dense).groups
    kept = kept_sizes(groups, model.state_dict(), type(model).__name__)
    empty = {group.name for group in groups if kept.get(group.name) == 0}
    layers = [names for names in layers_of(dense, groups).values() if empty.issuperset(names)] if empty else []
    if not layers:
        return None
    counted = [stack for stack in stacks(dense, groups, builder) if any(map(empty.issuperset, stack.layers.values()))]
    going = [names for stack in counted for names in stack.layers.values() if empty.issuperset(names)]
    if len(going) < len(layers):
        return f"{builder.by} has no number for the layers of which nothing is left"
    made, renames = model, []
    for stack in counted:
        stay = [place for place, names in stack.layers.items() if not empty.issuperset(names)]
        if not stay:
            return f"nothing is left of all {len(stack.layers)} layers of {stack.path}"
        found = _without(made, builder, groups, kept, stack, stay)
        if isinstance(found, str):
            return found
        rename = stack.moved(stay)
        renames.append(rename)
        made, builder, groups = found
        kept = {new: size for name, size in kept.items() if (new := rename(name)) is not None}
    _carry(model, made, plan, renames)
    return made


def _described(model: nn.Module, plan: Plan | None) -> tuple[Builder, nn.Module] | None:
    """Return how a library builds a model, and its dense form without memory."""
    if removed_tokens(model) is not None:
        return None  # how many each of its layers merges is counted by their places
    if is_pretrained(model):
        return of_transformers(model), dense_meta_copy(model)
    if type(model).__module__.partition(".")[0] != "timm":
        return None
    from upop.checkpoints import timm_models

    described = timm_models.named(model, plan)
    if described is None:
        return None
    builder = of_timm(*described)
    dense = outline(lambda: builder.build(builder.settings))
    know_as(dense, model)
    return builder, dense


@torch.no_grad()
def _without(
    model: nn.Module,
    builder: Builder,
    groups: Sequence[Group],
    kept: Mapping[str, int],
    stack: Stack,
    stay: Sequence[int],
) -> tuple[nn.Module, Builder, tuple[Group, ...]] | str:
    """Return the model without some layers of a list, how it is built, and its dense groups; else what is wrong."""
    paths = {place: f"{stack.path}.{place}" if stack.path else str(place) for place in stack.layers}
    gone = [place for place in stack.layers if place not in stay]
    added = constants(model, [paths[place] for place in gone], examples_of(model))
    other = next((paths[place] for place in gone if added.get(paths[place]) is None), None)
    if other is not None:
        return f"{other} changes what passes it though nothing is left of its branches: a norm comes behind them"
    rename = stack.moved(stay)
    state = {new: value for name, value in model.state_dict().items() if (new := rename(name)) is not None}
    left = [_renamed(group, rename) for group in groups if rename(group.name) is not None]
    known = tuple(group for group in left if group is not None)
    if len(known) < len(left):
        return "a class that its groups take on has no name"
    now = {new: size for name, size in kept.items() if (new := rename(name)) is not None}
    sizes = {
        group.name: (now[group.name], group.size) for group in known if now.get(group.name, group.size) < group.size
    }
    settings = changed(builder.settings, stack.change(stay))
    smaller = replace(builder, settings=settings)
    why = "what they add is a constant, and no bias before them takes it"
    for folded in _folded(groups, stack, added, paths, rename, state):
        try:
            made = frame(lambda: smaller.build(settings))
            remember(made, Prunable(known, ()))
            resize(made, sizes, {group.name: as_json(group) or {} for group in known if group.name in sizes})
            made.load_state_dict({**state, **folded}, assign=True)
        except Exception as error:  # constructors raise what they like
            return f"{builder.by} does not take as many layers as are left ({error or type(error).__name__})"
        _adapt(model, made)
        differs = differing(model, made)
        if differs is None:
            return made, smaller, known
        why = f"without them {differs}"
    return why


def _folded(
    groups: Sequence[Group],
    stack: Stack,
    added: Mapping[str, Tensor | None],
    paths: Mapping[int, str],
    rename: Callable[[str], str | None],
    state: Mapping[str, Tensor],
) -> Iterator[dict[str, Tensor]]:
    """Yield tensors that take what layers add which go, by the names that they have without these.

    It goes to the bias that the layer before them ends with; before the first layer that stays to whatever has
    as many columns, one after the other, of which the caller takes what computes the same.
    """
    before: int | None = None
    sums: dict[int | None, Tensor] = {}
    for place, path in sorted(paths.items()):
        constant = added.get(path)
        if constant is None:
            before = place
        elif bool(constant.any()):
            sums[before] = sums.get(before, torch.zeros_like(constant)) + constant
    folded: dict[str, Tensor] = {}
    readers = {group.name: group.online[-1].tensor for group in groups}
    for end, constant in sums.items():
        if end is not None:
            name = f"{readers[stack.layers[end][-1]].removesuffix('weight')}bias"
            new = rename(name) or name
            if new not in state:
                return
            folded[new] = _plus(state[new], constant)
    if None not in sums:
        yield folded
        return
    start = f"{stack.path}." if stack.path else ""
    wide = [name for name, value in state.items() if value.dim() and value.shape[-1] == len(sums[None])]
    for name in [name for name in wide if not name.startswith(start)][:_MOST_TRIED]:
        yield {**folded, name: _plus(folded.get(name, state[name]), sums[None])}


def _plus(tensor: Tensor, constant: Tensor) -> Tensor:
    return (tensor.double() + constant.to(tensor.device)).to(tensor.dtype)


def _renamed(group: Group, rename: Callable[[str], str | None]) -> Group | None:
    """Return a group under other names; None where it cannot be written down."""

    def new(name: str) -> str:
        return rename(name) or name

    if as_json(group) is None:
        return None
    return replace(
        group,
        name=new(group.name),
        slices=tuple(replace(part, tensor=new(part.tensor)) for part in group.slices),
        attributes=tuple(replace(part, module=new(part.module)) for part in group.attributes),
        swaps=tuple(replace(swap, module=new(swap.module)) for swap in group.swaps),
    )


def _adapt(model: Any, made: Any) -> None:
    """Have a model run as another one does."""
    like = next(model.parameters())
    for buffer in made.buffers():
        buffer.data = buffer.data.to(like.device, like.dtype if buffer.is_floating_point() else buffer.dtype)
    if is_pretrained(made):
        made.config._attn_implementation = model.config._attn_implementation
        made.tie_weights()
        if getattr(model, "generation_config", None) is not None:
            made.generation_config = copy.deepcopy(model.generation_config)
    made.train(model.training)


def _carry(
    model: nn.Module, made: nn.Module, plan: Plan | None, renames: Sequence[Callable[[str], str | None]]
) -> None:
    """Have a model of fewer layers carry what the whole one does."""
    set_preparation(made, preparation_of(model))
    if hasattr(model, VOCABULARY):
        setattr(made, VOCABULARY, getattr(model, VOCABULARY))
    if plan is None:
        return

    def rename(name: str) -> str | None:
        new: str | None = name
        for each in renames:
            new = None if new is None else each(new)
        return new

    names = {name: new for name in plan.kept if (new := rename(name)) is not None}
    slices = {
        new: renamed(plan.slices[name], lambda old: rename(old) or old)
        for name, new in names.items()
        if name in plan.slices
    }
    kept = {new: plan.kept[name] for name, new in names.items()}
    set_plan(made, Plan(kept, {new: plan.sizes[name] for name, new in names.items()}, plan.settings, slices))
