"""Finds the prunable groups of a model: traced from one call with an example, and proved on numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from upop.pruning.deprecated import older_names, renamed_arguments
from upop.pruning.errors import LayoutError
from upop.pruning.groups import Group
from upop.pruning.known import Prunable, known_of_kind, remember, remember_kind, remembered
from upop.pruning.masks import unwrapped
from upop.pruning.seen import Kept, fitted, remember_inputs, was_made_up
from upop.pruning.stated import Stated
from upop.pruning.width import refuse_no_stream, streams_among
from upop.pruning.words import library_of


@renamed_arguments(units="groups")
def find_groups(
    model: nn.Module, example: Any = None, groups: Sequence[Stated] = (), *, width: bool = False
) -> list[Group]:
    """Return the prunable groups of a model, in forward order; see `find_prunable` for the arguments.

    A model with momentum encoders names them in `momentum_encoders` (see `ModelTraits`). The copies make no groups of
    their own; they are cut with the modules that they follow.

    Raises:
        LayoutError: the model has no prunable group (the message lists what was skipped, and why); or as
            `find_prunable`.
    """
    found = find_prunable(model, example, groups, width=width)
    if not found.groups:
        seen = "; ".join(f"{part.name}: {part.reason}" for part in found.skipped[:5])
        raise LayoutError(
            f"No prunable group found in {type(model).__name__}. "
            + (f"{len(found.skipped)} parts were skipped ({seen})." if seen else "It has no attention or MLP.")
        )
    return list(found.groups)


@renamed_arguments(units="groups")
def find_prunable(
    model: nn.Module, example: Any = None, groups: Sequence[Stated] = (), *, width: bool = False
) -> Prunable:
    """Find the prunable groups of a model, and report what was skipped and why.

    The forward pass runs once on the meta device, and every axis is followed through its ATen operations, whatever the
    Python code around them. A group is returned only if it is proved: the masked and the cut model compute the same
    outputs on random numbers in float64. The result is cached for this model, and for models that differ from it in
    weights and precision alone.

    Args:
        model: left unchanged, and so are random generators; may be wrapped by DDP or torch.compile.
        example: inputs of one forward pass: a tensor, a tuple of arguments, a mapping of keyword arguments, or a
            function that is called with the model. By default they are generated from what the model declares
            (`dummy_inputs`, `config`, `default_cfg`, argument names) or from the shapes of its layers.
        groups: groups that you state yourself (`upop.GroupSpec`). They are proved like the others, and take precedence
            over those that cut the same axis.
        width: True finds the residual stream of each tower too: one group of all that writes, normalises and reads it.
            From then on they are among the groups of this model.

    Returns:
        `groups` in forward order, `skipped` with reasons, and `coverage`.

    Raises:
        LayoutError: the model cannot be run with the example, none can be generated, or a stated group is not proved.
        SettingError: a stated group does not fit the model.
    """
    from upop.pruning import axes

    model = unwrapped(model)
    if width:
        known = find_prunable(model, example, groups)
        if not streams_among(known.groups):
            example = known.source[1] if known.source is not None else example
            remember(model, axes.with_streams(model, example, known).of(model, example))
        return find_prunable(model)
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
    """Cache the result for a model, with its example."""
    remember_inputs(model, Kept(model, example), made_up=made_up)
    remember(model, found)


_LIBRARIES = {"timm", "torch", "torchvision", "transformers", "open_clip", "upop", "peft"}
"""Whose models are read without an example."""


def groups_to_search(
    model: nn.Module, example: Any, groups: Sequence[Stated] = (), *, width: bool = False
) -> list[Group]:
    """Return the groups of a model; a custom model is traced with the example, if there is one.

    Args:
        model: the model.
        example: inputs of one forward pass.
        groups: that are stated.
        width: whether residual streams are among them.

    Raises:
        LayoutError: the model has no group, or no stream if `width` is set, or cannot be run with the example.
    """
    found = find_groups(model, example if groups or is_of_ones_own(model) else None, groups, width=width)
    if not width:
        return [group for group in found if group.kind != "residual"]
    refuse_no_stream(model, found, find_prunable(model).skipped)
    return found


def is_of_ones_own(model: nn.Module) -> bool:
    """Whether a model is custom: some class belongs to no library whose models are traced without an example."""
    return any(library_of(module) not in _LIBRARIES for module in unwrapped(model).modules())


def waits_for_batch(model: nn.Module) -> bool:
    """Whether the groups of a model are traced with its first batch.

    Custom models without an example wait: generated inputs may take another path through the forward than real ones,
    and give other groups.
    """
    return is_of_ones_own(model) and (remembered(model) is None or was_made_up(model))


__getattr__ = older_names(__name__)
