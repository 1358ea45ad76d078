"""The public `Pruner` and `shrink`: those of the method, whose result knows what was cut, so that it can be saved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from upop import pruning
from upop.checkpoints.quantizer import mark, refuse_quantized
from upop.checkpoints.sizes import join_plans
from upop.pruning import Plan, find_units
from upop.pruning.masks import unwrapped
from upop.pruning.plan import plan_of, set_plan
from upop.pruning.slips import check_model

_PREPARATION = "upop_preparation"


class Pruner(pruning.Pruner):
    """`upop.pruning.Pruner`, whose model says what was cut."""

    def shrink(self, verify: Any = True) -> nn.Module:
        """Take the masks off and cut the model for real; the same model comes back, physically smaller.

        The model then carries the plan, which `upop.save` writes; a transformers model also carries it in its
        configuration, so that its own `save_pretrained` and `push_to_hub` work.

        Args:
            verify: inputs on which the masked and the shrunken model are compared, as for `upop.shrink`. By default a
                few samples of the first batch that the model was called with, or else the example. False cuts without
                proof.

        Raises:
            StepError: a soft search has not finished.
            SettingError: the model is quantized.
            VerificationError: the outputs differ, the cut model cannot be run, or there is nothing to verify on; the
                model is left masked, as it was.
        """
        plan = self.plan()
        refuse_quantized(self.model)
        model = super().shrink(verify)
        _record(model, plan)
        return model


# All about its arguments and methods is written where the method is.
Pruner.__doc__ = pruning.Pruner.__doc__


def shrink(model: nn.Module, plan: Plan | Mapping[str, Any], *, verify: Any = True, fold: bool = True) -> nn.Module:
    """Cut `model` to the entries that `plan` keeps; the same object comes back, physically smaller.

    The shrunken model computes what the model computes with the other entries masked to zero, which is verified.
    Attention in every library divides by the square root of its current head_dim, so the queries are multiplied by
    sqrt(kept / original) where head dimensions go. The model then carries the plan, as after `Pruner.shrink`.

    Args:
        model: the dense model, without masks.
        plan: what to keep; a `Plan`, or a mapping from unit names to the entries to keep. Units not named stay.
        verify: inputs on which masked and shrunken outputs are compared (a tensor, a tuple of arguments, a mapping
            of keyword arguments, or a function that is given the model). By default those with which units were read,
            of this model or another one of its class, or some that can be made for it. False cuts without proof, as
            does `fold=False`; a model on the meta device has no outputs.
        fold: False leaves the queries alone, for weights that are replaced right afterwards.

    Raises:
        PlanError: the plan does not fit the model.
        SettingError: the model is quantized.
        LayoutError: a tensor to be cut is shared with a part of the model that is not.
        VerificationError: the outputs differ, the cut model cannot be run, or there is nothing to verify on. In every
            case the model is left as it was.
    """
    check_model(model, "shrink()")
    whole = unwrapped(model)
    if not isinstance(plan, Plan):
        plan = Plan.of(find_units(whole), plan)
    refuse_quantized(whole)
    model = pruning.shrink(model, plan, verify=verify, fold=fold)
    _record(whole, plan)
    return model


def calibrate(model: nn.Module, batches: Iterable[Any], ratio: float, **options: Any) -> Plan:
    """Cut `model` with a few batches and no training; see `upop.pruning.calibrate` for all that can be given.

    The model then carries the plan, as after `Pruner.shrink`.
    """
    check_model(model, "calibrate()")
    whole = unwrapped(model)
    refuse_quantized(whole)
    plan = pruning.calibrate(model, batches, ratio, **options)
    _record(whole, plan)
    return plan


# All about its arguments is written where the method is.
calibrate.__doc__ = pruning.calibrate.__doc__


def preparation_of(model: nn.Module) -> Mapping[str, Any] | None:
    """Return how a model's inputs are prepared, by the names of a task's settings, if that was noted on it."""
    found = getattr(model, _PREPARATION, None)
    return found if isinstance(found, Mapping) else None


def set_preparation(model: nn.Module, preparation: Mapping[str, Any] | None) -> None:
    """Note on a model how its inputs are prepared, so that `save` writes it."""
    if preparation is not None:
        setattr(model, _PREPARATION, dict(preparation))


def _record(model: nn.Module, plan: Plan) -> None:
    set_plan(model, join_plans(plan_of(model), plan))
    mark(model)
