"""The plan that a cut model carries, and how the files of its own library record the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from upop.pruning.plan import Plan

_PLAN = "upop_plan"


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
    """Return the plan by which a model was cut, here or before it was saved; None if unknown."""
    plan = getattr(model, _PLAN, None)
    return plan if isinstance(plan, Plan) else None


def set_plan(model: nn.Module, plan: Plan | None) -> None:
    """Record on a model the plan by which it was cut."""
    if plan is not None:
        setattr(model, _PLAN, plan)


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
