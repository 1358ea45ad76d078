"""Groups stored in a folder, so that loading needs no tracing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from upop.checkpoints.description import FILE as DESCRIPTION
from upop.checkpoints.description import Description
from upop.checkpoints.renamed import groups_of
from upop.errors import CheckpointError
from upop.pruning import Group, Prunable, remember
from upop.pruning.groups import has_number, number_of


def describe_groups(model: nn.Module, description: Description, folder: Path) -> nn.Module:
    """Cache the stored groups of a dense model for `find_prunable`, if all are stored; return the model.

    Raises:
        CheckpointError: a stored group does not fit the model.
    """
    # Of a plain model, the plan tells the groups of the dense form, and the rest those of the smaller one.
    forms = [each for each in (description.groups, (description.plan or {}).get("slices")) if each]
    if (
        not all(isinstance(each, Mapping) for each in forms)
        or not forms
        or not set(description.layout or {}) <= set(forms[0])
    ):
        return model
    for described in forms:
        try:
            groups = groups_of(model, described)
            _check_numbers(model, (groups or {}).values(), folder)
        except (ValueError, CheckpointError) as error:
            if described is not forms[-1]:
                continue
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{folder / DESCRIPTION} does not fit {type(model).__name__}: {error}. It is of a {description.kind}: "
                "was it damaged, or is the dense model another one?"
            ) from error
        if groups:
            remember(model, Prunable(tuple(groups.values()), ()))
        break
    return model


def _check_numbers(model: nn.Module, groups: Iterable[Group], folder: Path) -> None:
    """Refuse a dense model whose stored sizes (such as numbers of heads) differ from those at the time of saving."""
    for group in groups:
        for each in group.attributes:
            module = model.get_submodule(each.module)
            found = number_of(module, each.name) if has_number(module, each.name) else None
            if each.factor is not None and isinstance(found, int) and found != each.value(group.size):
                raise CheckpointError(
                    f"{folder / DESCRIPTION} does not fit {type(model).__name__}: {each.module}.{each.name} is "
                    f"{found}, and was {each.value(group.size)} when {group.name} was cut. Was the file damaged, or is "
                    "the dense model another one?"
                )
