"""What a cut model carries: its plan, and what the files of its own library record of the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from upop.pruning.plan import Plan

_PLAN = "upop_plan"


@dataclass(frozen=True)
class Record:
    """How a library's own files record that a model was cut; the method itself knows of no library.

    Attributes:
        check: raises a `SettingError` where a model cannot say it; called before a model is cut.
        write: has a model that was cut say it; of other libraries' models it does nothing.
    """

    check: Callable[[nn.Module], None]
    write: Callable[[nn.Module], None]


_records: list[Record] = []


def keep_record(record: Record) -> None:
    """Have all cuts from now on recorded in this way too; one that is kept already is not kept twice."""
    if record not in _records:
        _records.append(record)


def refuse_unrecordable(model: nn.Module) -> None:
    """Raise a `SettingError` if a model's own files could not record that it was cut."""
    for record in _records:
        record.check(model)


def record_cut(model: nn.Module, plan: Plan) -> None:
    """Have a model carry what was cut from it, in this cut and in those before."""
    set_plan(model, _joined(plan_of(model), plan))
    for record in _records:
        record.write(model)


def plan_of(model: nn.Module) -> Plan | None:
    """Return what was cut from a model, in this process or by the one that saved it, if it is known."""
    plan = getattr(model, _PLAN, None)
    return plan if isinstance(plan, Plan) else None


def set_plan(model: nn.Module, plan: Plan | None) -> None:
    """Have a model carry the plan that it was cut by."""
    if plan is not None:
        setattr(model, _PLAN, plan)


def _joined(first: Plan | None, second: Plan) -> Plan:
    """Return one plan for two cuts, the second of a model that the first one had cut already."""
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
