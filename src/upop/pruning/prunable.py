"""What of a model can be pruned: read off what it computes with an example, and proved; nothing is guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from upop.pruning.deprecated import renamed_arguments
from upop.pruning.errors import LayoutError
from upop.pruning.groups import Group
from upop.pruning.known import Prunable, known_of_kind, remember, remember_kind, remembered
from upop.pruning.masks import unwrapped
from upop.pruning.seen import Kept, fitted, remember_inputs, was_made_up
from upop.pruning.stated import Stated
from upop.pruning.words import library_of


@renamed_arguments(units="groups")
def find_groups(model: nn.Module, example: Any = None, groups: Sequence[Stated] = ()) -> list[Group]:
    """Return every group of `model` that can be pruned, in forward order; see `find_prunable` for `example` and
    `groups`.

    A model that keeps momentum copies of its own modules names them in an attribute `momentum_encoders`, a mapping from
    a module's name to its copy's: the copies make no groups, and are cut with the modules that they copy.

    Raises:
        LayoutError: the model has none, and the message lists what was looked at and why it was left alone; or as
            `find_prunable`.
    """
    found = find_prunable(model, example, groups)
    if not found.groups:
        seen = "; ".join(f"{part.name}: {part.reason}" for part in found.skipped[:5])
        raise LayoutError(
            f"No prunable group found in {type(model).__name__}. "
            + (f"Looked at {len(found.skipped)} places ({seen})." if seen else "It holds no attention or MLP.")
        )
    return list(found.groups)


@renamed_arguments(units="groups")
def find_prunable(model: nn.Module, example: Any = None, groups: Sequence[Stated] = ()) -> Prunable:
    """Return the groups of `model` and what was skipped.

    Groups are read off what the model computes: its forward runs once without numbers, every axis is followed through
    the tensor operations that really happen, whatever the Python around them, and every group is proved on numbers.
    What was found is remembered for this model, and for those that differ from it in their weights and their precision
    alone: they are not read again without an example.

    Args:
        model: left as it is, the random state too; wrappers of DDP and torch.compile are looked through.
        example: what a call of the model is given: a tensor, a tuple of arguments, a mapping of keyword arguments, or
            a function that is given the model. Without one it is made of what a library's model says of its inputs
            (`dummy_inputs`, `config`, `default_cfg`, the names of its forward's arguments), or of what layers ask for.
        groups: what is known of groups beside (`upop.GroupSpec`); they are proved like the others, and stand before
            those that cut the same.

    Raises:
        LayoutError: no inputs are known that the model can be run with, it cannot be run with the example, or what
            `groups` states does not hold.
        SettingError: what `groups` states does not fit the model.
    """
    from upop.pruning import axes

    model = unwrapped(model)
    if groups:
        known = find_prunable(model, example)
        example = axes.example_for(model) if example is None else example
        remember(model, axes.with_stated(model, groups, example, known).of(model, example))
        return find_prunable(model)
    made_up = example is None
    if made_up:
        found = remembered(model)
        if found is not None:
            return found.of(model)
        found = known_of_kind(model)
        if found is not None:
            _, example = found.source or (model, None)
            found = found.of(model, fitted(example, model))
            _keep(model, found, example, made_up=True)
            return found
        if not any(parameter.dim() > 1 for parameter in model.parameters()):
            return Prunable((), ()).of(model)
        example = axes.example_for(model)
    proved, skipped = axes.with_momentum_encoders(model, example, *axes.read(model, example))
    found = Prunable(tuple(proved), tuple(skipped)).of(model, example)
    _keep(model, found, example, made_up=made_up)
    if made_up:
        remember_kind(model, found)
    return found


def _keep(model: nn.Module, found: Prunable, example: Any, *, made_up: bool) -> None:
    """Remember what was found of a model, and with what."""
    remember_inputs(model, Kept(model, example), made_up=made_up)
    remember(model, found)


_LIBRARIES = {"timm", "torch", "torchvision", "transformers", "open_clip", "upop", "peft"}
"""Whose models are read without an example."""


def groups_to_search(model: nn.Module, example: Any, groups: Sequence[Stated] = ()) -> list[Group]:
    """Return the groups of a model; those of one with classes of one's own are read with the example, if there is one.

    Raises:
        LayoutError: the model has none, or cannot be run with the example.
    """
    return find_groups(model, example if groups or is_of_ones_own(model) else None, groups)


def is_of_ones_own(model: nn.Module) -> bool:
    """Whether a model has classes of no library whose models are read without an example."""
    return any(library_of(module) not in _LIBRARIES for module in unwrapped(model).modules())


def waits_for_batch(model: nn.Module) -> bool:
    """Whether the groups of a model are to be read with the first batch that it is given.

    It has classes of one's own, and was not read with an example: inputs that were made for it may take another way
    through its forward than true ones do, and another reading may follow.
    """
    return is_of_ones_own(model) and (remembered(model) is None or was_made_up(model))
