"""Groups as a folder records them, under the names that their modules have today.

transformers renames modules over time, and keeps for every model type a mapping from the tensor names of older
checkpoints. A group's name is mapped by its tensors. Recorded groups spare loading a trace of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from upop.checkpoints.files.description import FILE as DESCRIPTION
from upop.checkpoints.files.description import Description
from upop.errors import CheckpointError
from upop.libraries import is_pretrained
from upop.pruning import Group, Plan, Prunable, find_prunable, remember
from upop.pruning.axes import SWAPS
from upop.pruning.errors import LayoutError
from upop.pruning.groups import has_number, has_tensor, number_of
from upop.pruning.written import from_json, renamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform

Renaming = Callable[[str], str]


def outermost(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield name and module of the outermost transformers models within a model."""
    found: list[str] = []
    for name, module in model.named_modules():
        if is_pretrained(module) and not any(not up or name.startswith(f"{up}.") for up in found):
            found.append(name)
            yield name, module


def todays(model: nn.Module) -> Renaming:
    """Return the mapping from tensor names of older folders to those of the model."""
    return _renaming({name: _renames(part) for name, part in outermost(model)})


def formers(model: nn.Module) -> Renaming:
    """Return the mapping from tensor names of the model to those of older folders."""
    return _renaming(
        {name: [each.reverse_transform() for each in _renames(part)[::-1]] for name, part in outermost(model)}
    )


def named_as_today(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names that the model has for them; unknown ones keep theirs."""
    mine, today = model.state_dict().keys(), todays(model)
    names = {name: name if name in mine else today(name) for name in state}
    return {names[name] if names[name] in mine else name: value for name, value in state.items()}


def placed(model: nn.Module, content: Mapping[str, Any], changes: Iterable[Renaming] = ()) -> dict[str, Any] | None:
    """Return the JSON form of a group under the model's names; None if the model lacks its tensors.

    Args:
        model: has these tensors, possibly under other names.
        content: the group as written.
        changes: further renamings to try, besides those of transformers.
    """
    today = todays(model)
    for change in (_same, *changes):
        for candidate in (renamed(content, change), renamed(renamed(content, change), today)):
            if all(has_tensor(model, part["tensor"]) for part in candidate["slices"]):
                return candidate
    return None


def groups_of(model: nn.Module, described: Mapping[str, Any]) -> dict[str, Group] | None:
    """Return the groups that a folder records, by their names there; None if the model lacks tensors.

    Raises:
        ValueError: a record is no group; the message says why.
    """
    found = {}
    for name, content in described.items():
        try:
            here = placed(model, content)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"its record of {name} is no group ({error!r})") from None
        if here is None:
            return None
        found[name] = from_json(here, model, SWAPS)
    return found


def describe_groups(model: nn.Module, description: Description, folder: Path) -> nn.Module:
    """Cache the stored groups of a dense model for `find_prunable`, if all are stored; return the model.

    Raises:
        CheckpointError: a stored group does not fit the model.
    """
    # For a plain model, the plan records the groups of the dense form, and `groups` those of the smaller one.
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
                f"{folder / DESCRIPTION} does not fit {type(model).__name__}: {error}. It describes a "
                f"{description.kind}: was it damaged, or is this another dense model?"
            ) from error
        if groups:
            remember(model, Prunable(tuple(groups.values()), ()))
        break
    return model


def _check_numbers(model: nn.Module, groups: Iterable[Group], folder: Path) -> None:
    """Refuse a dense model whose stored sizes (such as numbers of heads) differ from those when it was saved."""
    for group in groups:
        for each in group.attributes:
            module = model.get_submodule(each.module)
            found = number_of(module, each.name) if has_number(module, each.name) else None
            if each.factor is not None and isinstance(found, int) and found != each.value(group.size):
                raise CheckpointError(
                    f"{folder / DESCRIPTION} does not fit {type(model).__name__}: {each.module}.{each.name} is "
                    f"{found}, and was {each.value(group.size)} when {group.name} was cut. Was the file damaged, or is "
                    "this another dense model?"
                )


def groups_if_read(model: nn.Module) -> tuple[Group, ...]:
    """Return the groups of a model; none if it cannot be traced and none are cached."""
    try:
        return find_prunable(model).groups
    except LayoutError:
        return ()


def groups_today(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return older name -> today's name, for groups of a model that were renamed."""
    groups = groups_if_read(model)
    mine = {group.name for group in groups}
    wanted = [name for name in names if name not in mine]
    if not wanted:
        return {}
    former = formers(model)
    made = {group.name: former(group.producers[0].tensor) for group in groups}
    found: dict[str, str] = {}
    for name in sorted(wanted, key=len, reverse=True):  # containers last
        inside = [each for each, tensor in made.items() if tensor.startswith(f"{name}.") and each not in found.values()]
        if len(inside) == 1:
            found[name] = inside[0]
    return found


def with_names(plan: Plan, names: Mapping[str, str]) -> Plan:
    """Return a plan under other names of groups."""

    def change(held: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in held.items()}

    return replace(plan, kept=change(plan.kept), sizes=change(plan.sizes), slices=change(plan.slices))


def _same(name: str) -> str:
    return name


def _renames(model: PreTrainedModel) -> list[WeightTransform]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ModuleNotFoundError:  # before transformers 5, which keeps its renamings elsewhere and writes the old names
        return []
    return [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]


def _renaming(rules: Mapping[str, Sequence[WeightTransform]]) -> Renaming:
    def change(name: str) -> str:
        for path, transforms in rules.items():
            start = f"{path}." if path else ""
            if name.startswith(start):
                rest = name.removeprefix(start)
                for transform in transforms:
                    rest = transform.rename_source_key(rest)[0]
                return start + rest
        return name

    return change
