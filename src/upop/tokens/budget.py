"""Splits one budget of multiply-adds between tokens and weights, by the loss on held-out batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from upop.pruning.calibrate import Loss, calibrate, first_call
from upop.pruning.costs import call, count_macs, evaluating
from upop.pruning.errors import SettingError, StepError
from upop.pruning.masks import unwrapped
from upop.pruning.plan import Plan
from upop.pruning.slips import check_loss, check_model, listed
from upop.pruning.targets import Target, read_target
from upop.pruning.verify import tensors_of
from upop.tokens.encoders import (
    Mergeable,
    merge_again,
    merge_tokens,
    most_removed,
    prepare_merging,
    removed_tokens,
    set_removed,
)

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Candidates: share of the multiply-adds to remove that tokens save; pruning weights saves the rest."""
_EVERY = 4
"""Every so many-th batch is held out."""
_FLOOR = 1e-12


@dataclass(frozen=True)
class Candidate:
    """One split of a budget, and its loss.

    Attributes:
        share: share of the multiply-adds to remove that merging tokens saves.
        removed: number of tokens to remove, per encoder and layer.
        macs: multiply-adds of the dense model with fewer tokens.
        loss: loss on the held-out batches after pruning weights for the rest; None if the target is out of reach.
    """

    share: float
    removed: list[list[int]]
    macs: int
    loss: float | None = None


@dataclass(frozen=True)
class Shared:
    """The chosen split of a budget.

    Attributes:
        plan: the plan of the pruned weights; None if merging tokens sufficed.
        chosen: the candidate with the lowest loss.
        candidates: all candidates.
    """

    plan: Plan | None
    chosen: Candidate
    candidates: tuple[Candidate, ...]


def calibrate_with_tokens(
    model: nn.Module,
    batches: Iterable[Any],
    target: Target,
    *,
    loss: Loss | None = None,
    held_out: Iterable[Any] | None = None,
    shares: Sequence[float] = SHARES,
    example: Any = None,
    **settings: Any,
) -> Shared:
    """Reduce a model to a target of multiply-adds by merging image tokens and pruning weights, without training.

    For every candidate share, a copy of the model merges tokens for it (`upop.merge_tokens`, equally many in every
    layer, one more in the last ones), its weights are pruned for the rest (`upop.calibrate`), and the loss on held-out
    batches is measured. The model then becomes the copy with the lowest loss. The cost is that of one `calibrate` per
    share, and one more.

    Args:
        model: the dense model; it is changed in place.
        batches: as for `upop.calibrate`.
        target: limits for the whole model, as for `upop.Pruner`, including "macs".
        loss: (model, batch) -> mean loss, a scalar. By default the `loss` in the outputs; without one, weights are
            ranked as by `calibrate`, and outputs are compared with the dense model's by mean square.
        held_out: batches to compare candidates on; by default every fourth of `batches`, which is then not used for
            ranking.
        shares: candidates, from 0 (weights alone) to 1 (tokens alone).
        example: inputs for one forward pass; by default those of the first batch.
        settings: any other argument of `upop.calibrate`.

    Raises:
        SettingError: the target has no "macs", no candidate reaches it, or there are too few batches.
        LayoutError: as `upop.merge_tokens` and `upop.calibrate`. In every case the model is unchanged.
    """
    check_model(model, "calibrate_with_tokens()")
    inner, batches = unwrapped(model), listed(batches)
    check_loss(loss, batches)
    _check_shares(shares)
    goal = goal_of(inner, target, first_inputs(inner, batches[0], loss) if example is None else example)
    ranking, held = split(batches, held_out)
    found = find_shares(inner, ranking, held, goal, loss=loss, shares=shares, **settings)
    chosen = best_of(found, goal)
    if any(map(any, chosen.removed)):
        merge_again(inner, chosen.removed, goal.example)
    plan = None
    try:
        if chosen.macs > goal.macs:
            plan = calibrate(inner, ranking, target=goal.of_weights, loss=loss, example=goal.example, **settings)
    except BaseException:
        merge_tokens(inner, 0)
        raise
    return Shared(plan, chosen, tuple(found))


@dataclass(frozen=True)
class Goal:
    """A target, applied to a dense model.

    Attributes:
        asked: the target as given.
        example: inputs for one forward pass.
        dense: multiply-adds of the dense model.
        macs: largest multiply-adds of the result.
        of_weights: the target for pruning weights after merging, with absolute multiply-adds.
    """

    asked: Target
    example: Any
    dense: int
    macs: float
    of_weights: dict[str, str]


def goal_of(model: nn.Module, target: Target, example: Any) -> Goal:
    """Apply a target to a dense model.

    Raises:
        SettingError: the target has no "macs", or allows all multiply-adds.
    """
    limits = {limit.kind: limit for limit in read_target(target)}
    if "macs" not in limits:
        raise SettingError(
            f"Fewer tokens save multiply-adds, and target={target!r} does not limit them. Give target={{'macs': 0.5}}, "
            "or prune weights alone by upop.calibrate."
        )
    dense = count_macs(model, example)
    most = limits["macs"].most(dense)
    if most >= dense:
        raise SettingError(f"target={target!r} is reached already: the model has {dense:,} multiply-adds.")
    asked = {kind: limit.asked for kind, limit in limits.items()}
    return Goal(target, example, dense, most, {**asked, "macs": str(max(2, int(most)))})


def first_inputs(model: nn.Module, batch: Any, loss: Loss | None) -> Any:
    """Return the inputs of a model for a few samples of a batch."""
    return next(iter(first_call(model, batch, loss).inputs(model)))


def find_shares(
    model: nn.Module,
    batches: Sequence[Any],
    held_out: Sequence[Any],
    goal: Goal,
    *,
    loss: Loss | None = None,
    shares: Sequence[float] = SHARES,
    **settings: Any,
) -> list[Candidate]:
    """Return a candidate for every share, measured on copies of the model; see `calibrate_with_tokens`."""
    _refuse_merging(model)
    ready = copy.deepcopy(model)
    encoders = prepare_merging(ready, goal.example)
    if loss is None:
        loss_of = _distances(model, ready, encoders, held_out)
    else:
        loss_of = partial(_mean, loss=loss, batches=held_out)
    settings["verify"] = False  # a trial is thrown away; the cut of the chosen one is verified
    found: list[Candidate] = []
    for share in shares:
        removed = _schedule(ready, encoders, goal, share)
        if removed in [each.removed for each in found]:
            continue
        set_removed(ready, removed)
        macs, value = count_macs(ready, goal.example), None
        trial = copy.deepcopy(ready)
        try:
            if macs > goal.macs:
                calibrate(trial, batches, target=goal.of_weights, loss=loss, example=goal.example, **settings)
            with evaluating(trial):
                value = loss_of(trial)
        except SettingError as error:  # the target is out of reach for this share
            reason = error
        found.append(Candidate(share, removed, macs, value))
    if all(each.loss is None for each in found):
        raise reason
    return found


def _refuse_merging(model: nn.Module) -> None:
    if removed_tokens(model) is not None:
        raise SettingError(
            f"This {type(model).__name__} merges tokens already, and a budget is split for the model with all tokens. "
            "Remove merging first: upop.merge_tokens(model, 0)."
        )


def _check_shares(shares: object) -> None:
    each = list(shares) if isinstance(shares, Iterable) and not isinstance(shares, str) else []
    if not each or not all(isinstance(share, int | float) and 0 <= share <= 1 for share in each):
        raise SettingError(f"shares must be a list of numbers from 0 to 1; found {shares!r}.")


def merge_share(model: nn.Module, goal: Goal, share: float) -> None:
    """Make a model merge tokens for a share of the multiply-adds to remove, in place.

    Raises:
        SettingError: the model merges tokens already.
        LayoutError: as `upop.merge_tokens`.
    """
    _refuse_merging(model)
    encoders = prepare_merging(model, goal.example)
    set_removed(model, _schedule(model, encoders, goal, share))


def best_of(found: Sequence[Candidate], goal: Goal) -> Candidate:
    """Return the candidate with the lowest loss."""
    known = [(each.loss, number) for number, each in enumerate(found) if each.loss is not None]
    if not any(math.isfinite(loss) for loss, _ in known):
        raise StepError(f"The loss on the held-out batches is not finite for any split of target={goal.asked!r}.")
    return found[min((loss, number) for loss, number in known if math.isfinite(loss))[1]]


def split(batches: list[Any], held_out: Iterable[Any] | None = None) -> tuple[list[Any], list[Any]]:
    """Split batches into those for ranking and those held out: every fourth, or the given ones."""
    if held_out is not None:
        return batches, listed(held_out)
    if len(batches) < 2:
        raise SettingError("One batch cannot both rank and be held out. Give two or more, or held_out=.")
    held = batches[::-_EVERY][::-1]
    return [each for number, each in enumerate(batches) if (len(batches) - 1 - number) % _EVERY], held


def _schedule(model: nn.Module, encoders: Sequence[Mergeable], goal: Goal, share: float) -> list[list[int]]:
    """Return the smallest numbers of tokens that save a share of the multiply-adds to remove.

    The model must be prepared for merging.
    """
    if not share:
        return _spread(encoders, 0)
    most = goal.dense - share * (goal.dense - goal.macs)
    low, high = 0, _most(encoders)
    while low < high:
        middle = (low + high) // 2
        set_removed(model, _spread(encoders, middle))
        low, high = (low, middle) if count_macs(model, goal.example) <= most else (middle + 1, high)
    return _spread(encoders, low)


def _most(encoders: Sequence[Mergeable]) -> int:
    return max(most_removed(each) * len(each.encoder.layers) for each in encoders)


def _spread(encoders: Sequence[Mergeable], total: int) -> list[list[int]]:
    """Distribute a total of removed tokens over the layers of every encoder: equally, one more in the last ones."""
    found = []
    for each in encoders:
        depth = len(each.encoder.layers)
        base, more = divmod(min(total, most_removed(each) * depth), depth)
        found.append([base] * (depth - more) + [base + 1] * more)
    return found


def _mean(model: nn.Module, loss: Loss, batches: Sequence[Any]) -> float:
    return sum(float(loss(model, batch)) for batch in batches) / len(batches)


def _distances(
    model: nn.Module, ready: nn.Module, encoders: Sequence[Mergeable], batches: Sequence[Any]
) -> Callable[[nn.Module], float]:
    """Return the default loss: the one in a model's outputs, or their distance from the dense model's outputs.

    Only outputs whose shape does not depend on the number of tokens count.
    """

    def outputs(of: nn.Module, batch: Any) -> list[Tensor]:
        with evaluating(of):
            found = call(of, batch)
        carried = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
        return [carried] if isinstance(carried, Tensor) else [value for _, value in tensors_of(found)]

    dense = [outputs(model, batch) for batch in batches]
    set_removed(ready, _spread(encoders, _most(encoders)))
    pairs = zip(dense[0], outputs(ready, batches[0]), strict=True)
    same = [number for number, (one, other) in enumerate(pairs) if one.shape == other.shape]
    if not same:
        raise SettingError(
            f"With fewer tokens every output of {type(model).__name__} changes its shape, so they cannot be compared. "
            "Give a loss: loss=lambda model, batch: ..."
        )
    if not dense[0][0].dim():
        return lambda trial: sum(float(outputs(trial, batch)[0]) for batch in batches) / len(batches)

    def distance(trial: nn.Module) -> float:
        found = [
            float((one[number] - aim[number]).square().mean() / aim[number].square().mean().clamp_min(_FLOOR))
            for one, aim in zip((outputs(trial, batch) for batch in batches), dense, strict=True)
            for number in same
        ]
        return sum(found) / len(found)

    return distance
