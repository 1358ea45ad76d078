"""Removes layers that were pruned whole, so that a configuration with fewer layers describes the model.

A layer without branches adds a constant, the last biases of these, unless a norm follows. The layer can be removed if
an earlier bias absorbs the constant. The configuration field that counts the layers is found by trial, as in
`size_fields`; the result is used only if it computes the same outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from upop.checkpoints.configs.builders import Builder, Change, Path, changed, nodes, of_timm, of_transformers
from upop.checkpoints.configs.comparing import differing
from upop.checkpoints.configs.size_fields import shapes_of
from upop.checkpoints.fitting.carried import VOCABULARY, preparation_of, set_preparation
from upop.checkpoints.fitting.fit import kept_sizes
from upop.checkpoints.fitting.meta import empty_model, meta_model
from upop.checkpoints.fitting.sizes import dense_meta_copy, resize
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
"""Number of tensors that are tried, in turn, to absorb the constant of the first layers."""


@dataclass(frozen=True)
class Stack:
    """A list of layers that a configuration counts.

    Attributes:
        path: of the list.
        layers: index -> names of its groups.
        change: kept indices -> changed fields.
    """

    path: str
    layers: Mapping[int, tuple[str, ...]]
    change: Callable[[Sequence[int]], Change]

    def moved(self, stay: Sequence[int]) -> Callable[[str], str | None]:
        """Rename modules and tensors for the kept indices; None for removed ones."""
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
        dense: the dense model, possibly on the meta device.
        groups: its groups.
        builder: builds such models.
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
            built = builder.meta_model(change(range(count - 1))) if count > 1 else None
            if built is not None and shapes_of(built) == wanted:
                found.append(Stack(path, layers, change))
                break
    return found


def _counting(builder: Builder, count: int) -> Iterator[Callable[[Sequence[int]], Change]]:
    """Yield changes of a configuration that may set the number of layers, including lists with one value per layer."""
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
    """Return an equivalent model with fewer layers; only biases differ.

    Args:
        model: a cut model of transformers or timm, left unchanged.
        plan: its plan.

    Returns:
        None if no layer was pruned whole; a reason, if such a layer must stay.
    """
    described = _described(model, plan)
    if described is None:
        return None
    builder, dense = described
    groups = find_prunable(dense).groups
    kept = kept_sizes(groups, model.state_dict(), type(model).__name__)
    empty = {group.name for group in groups if kept.get(group.name) == 0}
    layers = [
        names
        for path, names in (layers_of(dense, groups) if empty else {}).items()
        if empty.issuperset(names) and not _computes(model, path)
    ]
    if not layers:
        return None
    empty = {name for names in layers for name in names}
    counted = [stack for stack in stacks(dense, groups, builder) if any(map(empty.issuperset, stack.layers.values()))]
    going = [names for stack in counted for names in stack.layers.values() if empty.issuperset(names)]
    if len(going) < len(layers):
        return f"{builder.by} has no field for the number of layers, so layers that were pruned whole cannot be removed"
    made, renames = model, []
    for stack in counted:
        stay = [place for place, names in stack.layers.items() if not empty.issuperset(names)]
        if not stay:
            return f"all {len(stack.layers)} layers of {stack.path} were pruned whole"
        found = _without(made, builder, groups, kept, stack, stay)
        if isinstance(found, str):
            return found
        rename = stack.moved(stay)
        renames.append(rename)
        made, builder, groups = found
        kept = {new: size for name, size in kept.items() if (new := rename(name)) is not None}
    _carry(model, made, plan, renames)
    return made


def _computes(model: nn.Module, path: str) -> bool:
    """Whether a layer of which all groups are empty still computes: with weights that are in no group.

    An attention whose heads cannot be pruned, for example. A layer without any matrix can only add a constant, or
    normalise.
    """
    weights = [each.numel() for each in model.get_submodule(path).parameters() if each.dim() > 1]
    return any(weights) and constants(model, [path], examples_of(model)).get(path) is None


def _described(model: nn.Module, plan: Plan | None) -> tuple[Builder, nn.Module] | None:
    """Return the builder of a model, and its dense form on the meta device."""
    if removed_tokens(model) is not None:
        return None  # tokens to merge are numbered by layer
    if is_pretrained(model):
        return of_transformers(model), dense_meta_copy(model)
    if type(model).__module__.partition(".")[0] != "timm":
        return None
    from upop.checkpoints.libraries import timm_models

    described = timm_models.named(model, plan)
    if described is None:
        return None
    builder = of_timm(*described)
    dense = meta_model(lambda: builder.build(builder.settings))
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
    """Return the model without the given layers, its builder and its dense groups; or a reason why not."""
    paths = {place: f"{stack.path}.{place}" if stack.path else str(place) for place in stack.layers}
    gone = [place for place in stack.layers if place not in stay]
    added = constants(model, [paths[place] for place in gone], examples_of(model))
    other = next((paths[place] for place in gone if added.get(paths[place]) is None), None)
    if other is not None:
        return f"{other} still changes the stream, though its branches were pruned whole: a norm follows them"
    rename = stack.moved(stay)
    state = {new: value for name, value in model.state_dict().items() if (new := rename(name)) is not None}
    left = [_renamed(group, rename) for group in groups if rename(group.name) is not None]
    known = tuple(group for group in left if group is not None)
    if len(known) < len(left):
        return "a group replaces the class of a module by one without a name"
    now = {new: size for name, size in kept.items() if (new := rename(name)) is not None}
    sizes = {
        group.name: (now[group.name], group.size) for group in known if now.get(group.name, group.size) < group.size
    }
    settings = changed(builder.settings, stack.change(stay))
    smaller = replace(builder, settings=settings)
    why = "they add a constant that no earlier bias can absorb"
    for folded in _folded(groups, stack, added, paths, rename, state):
        try:
            made = empty_model(lambda: smaller.build(settings))
            remember(made, Prunable(known, ()))
            resize(made, sizes, {group.name: as_json(group) or {} for group in known if group.name in sizes})
            made.load_state_dict({**state, **folded}, assign=True)
        except Exception as error:  # constructors raise what they like
            return f"{builder.by} does not accept the remaining number of layers ({error or type(error).__name__})"
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
    """Yield candidate tensors to absorb the constants of removed layers, by their new names.

    The candidate is the last bias of the preceding layer; before the first kept layer, every tensor with as many
    columns is tried, and the caller uses the one that computes the same.
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
    """Return a group under new names, without removed parts; None if it cannot be serialised."""
    if as_json(group) is None:
        return None
    return replace(
        group,
        name=rename(group.name) or group.name,
        slices=tuple(replace(part, tensor=new) for part in group.slices if (new := rename(part.tensor))),
        attributes=tuple(
            replace(part, module=new) for part in group.attributes if (new := rename(part.module)) is not None
        ),
        swaps=tuple(replace(swap, module=new) for swap in group.swaps if (new := rename(swap.module)) is not None),
        norms=tuple(new for norm in group.norms if (new := rename(norm)) is not None),
    )


def _adapt(model: Any, made: Any) -> None:
    """Copy device, precision, attention implementation and mode of a model to the rebuilt one."""
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
    """Copy the plan and other records of a model to the one with fewer layers."""
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
    slices = {new: renamed(plan.slices[name], rename) for name, new in names.items() if name in plan.slices}
    kept = {new: plan.kept[name] for name, new in names.items()}
    set_plan(made, Plan(kept, {new: plan.sizes[name] for name, new in names.items()}, plan.settings, slices))
