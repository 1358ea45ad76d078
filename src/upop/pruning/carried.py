"""The plan that a cut model and its modules carry, and how the files of its own library record the cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from upop.pruning.groups import around
from upop.pruning.plan import Plan
from upop.pruning.written import renamed

_PLAN, _BEYOND = "upop_plan", "_upop_cut_beyond"


@dataclass(frozen=True)
class Record:
    """How the files of a library record a cut; the method itself depends on no library.

    Attributes:
        check: raises a `SettingError` for a model that cannot record a cut; called before the cut.
        write: records the cut on a model; ignores models of other libraries.
    """

    check: Callable[[nn.Module], None]
    write: Callable[[nn.Module], None]


_records: list[Record] = []


def keep_record(record: Record) -> None:
    """Register a way to record cuts; registering it again has no effect."""
    if record not in _records:
        _records.append(record)


def refuse_unrecordable(model: nn.Module) -> None:
    """Raise a `SettingError` if the files of the model's library cannot record a cut."""
    for record in _records:
        record.check(model)


def record_cut(model: nn.Module, plan: Plan) -> None:
    """Record a cut on the model, merged with earlier cuts."""
    set_plan(model, _joined(plan_of(model), plan))
    for record in _records:
        record.write(model)


def plan_of(model: nn.Module) -> Plan | None:
    """Return the plan by which a model was cut, here or before it was saved; None if unknown.

    Modules carry their share of it, so that a module of a cut model has a plan, and a model of which a module was cut
    by itself, or put in, has that of the module.
    """
    plan = vars(model).get(_PLAN)
    found = plan if isinstance(plan, Plan) else None
    for path, module in model.named_modules():  # what holds others comes first, and what they carry is never older
        share = vars(module).get(_PLAN) if path else None
        if isinstance(share, Plan):
            found = _with_share(found, share, path)
    return found


def set_plan(model: nn.Module, plan: Plan | None) -> None:
    """Record on a model the plan by which it was cut, and on its modules the groups that lie in them."""
    if plan is None:
        return
    vars(model)[_PLAN] = plan
    shares: dict[str, list[str]] = {}
    beyond: dict[str, tuple[str, str]] = {}
    for name, kept in plan.kept.items():
        owners = _owners(plan.slices.get(name))
        smallest = _holder(owners)
        for path in around(smallest) if owners else ():
            shares.setdefault(path, []).append(name)
        for path in {path for owner in owners for path in around(owner)} - set(around(smallest)):
            if len(kept) < plan.sizes[name] and len(smallest) <= len(beyond.get(path, ("", smallest))[1]):
                beyond[path] = name, smallest
    for path, names in shares.items():
        module = _module(model, path) if path else None
        if module is not None:
            vars(module)[_PLAN] = _share(plan, names, path)
    for path, of_group in beyond.items():
        module = _module(model, path)
        if module is not None:
            vars(module)[_BEYOND] = of_group


def cut_beyond(module: nn.Module) -> tuple[str, str] | None:
    """Return a group that only partly lies in a module of a cut model, and the smallest module that holds it whole.

    Both are names in the model that was cut. None if all groups lie inside or outside.
    """
    beyond: tuple[str, str] | None = vars(module).get(_BEYOND)
    return beyond


def _owners(content: Any) -> list[str]:
    """Return the modules whose tensors a group cuts, by the JSON of the group; none if it is damaged or unknown."""
    try:
        tensors = [part["tensor"] for part in content["slices"] if not part.get("follows")]
        return [tensor.rpartition(".")[0] for tensor in tensors]
    except (AttributeError, KeyError, TypeError):
        return []


def _holder(owners: list[str]) -> str:
    """Return the smallest module that holds all of these."""
    first, *others = [list(around(owner)) for owner in owners] or [[""]]
    return next(path for path in first if all(path in other for other in others))


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:  # it had another name when the plan was written
        return None


def _share(plan: Plan, names: list[str], path: str) -> Plan:
    """Return what a plan says of groups that lie in a module, under the names that they have in it."""
    start = f"{path}."

    def inside(name: str) -> str | None:
        return "" if name == path else name.removeprefix(start) if name.startswith(start) else None

    return _renamed(plan, {name: name if (new := inside(name)) is None else new for name in names}, inside)


def _with_share(plan: Plan | None, share: Plan, path: str) -> Plan:
    """Return the plan of a model, in which that of one of its modules replaces what is said of the same groups."""

    def outside(name: str) -> str:
        return f"{path}.{name}" if name else path

    whole = Plan({}, {}, share.settings) if plan is None else plan
    changed = {name: outside(name) for name, kept in share.kept.items() if whole.kept.get(outside(name)) != kept}
    if not changed:
        return whole
    new = _renamed(share, changed, outside)
    return Plan(
        {**whole.kept, **new.kept}, {**whole.sizes, **new.sizes}, whole.settings, {**whole.slices, **new.slices}
    )


def _renamed(plan: Plan, names: Mapping[str, str], change: Callable[[str], str | None]) -> Plan:
    """Return what a plan says of some groups, under other names."""
    slices = {}
    for name, new in names.items():
        try:
            slices[new] = {**renamed(plan.slices[name], change), "name": new}
        except (AttributeError, KeyError, TypeError):  # damaged or unknown, as in `_owners`: who reads it says so
            continue
    kept = {new: plan.kept[name] for name, new in names.items()}
    return Plan(kept, {new: plan.sizes[name] for name, new in names.items()}, plan.settings, slices)


def _joined(first: Plan | None, second: Plan) -> Plan:
    """Compose the plans of two successive cuts."""
    if first is None:
        return second
    kept = dict(first.kept)
    sizes = dict(first.sizes)
    for name, channels in second.kept.items():
        if name in kept and len(kept[name]) == second.sizes[name]:
            kept[name] = tuple(first.kept[name][channel] for channel in channels)
        else:  # not cut before, or another layer had this name then
            kept[name], sizes[name] = channels, second.sizes[name]
    # What is written of a group is of its first cut, as its indices are.
    slices = {name: (first if sizes.get(name) == first.sizes.get(name) else second).slices.get(name) for name in kept}
    return Plan(kept, sizes, second.settings, {name: group for name, group in slices.items() if group is not None})
