"""One budget of multiply-adds for tokens and weights: which share comes from which is decided by measured loss."""

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
"""Of the multiply-adds that are to go: what tokens take in each candidate; weights take the rest."""
_EVERY = 4
"""One of so many batches is held out."""
_FLOOR = 1e-12


@dataclass(frozen=True)
class Candidate:
    """One way to share a budget, and how good it is.

    Attributes:
        share: of the multiply-adds that go, what merging tokens saves.
        removed: tokens that every layer of every encoder removes.
        macs: multiply-adds of the model with fewer tokens and all of its weights.
        loss: of the held-out batches, with the rest taken from the weights; None where that is out of reach.
    """

    share: float
    removed: list[list[int]]
    macs: int
    loss: float | None = None


@dataclass(frozen=True)
class Shared:
    """How a budget was shared.

    Attributes:
        plan: what every group of weights kept; None where fewer tokens were enough.
        chosen: the candidate with the lowest loss.
        candidates: all of them.
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
    """Cut a model to a target of multiply-adds by fewer image tokens and fewer weights, without training.

    For every share of the budget that tokens may take, a copy of the model merges as many (`upop.merge_tokens`, the
    same number in every layer, one more in the last ones), its weights are cut for the rest (`upop.calibrate`), and
    held-out batches tell the loss. The model then becomes the copy with the lowest. It takes as long as one `calibrate`
    for every share, and one more.

    Args:
        model: the dense model; it is changed in place.
        batches: as for `upop.calibrate`.
        target: what is left of the whole dense model, as for `upop.Pruner`, "macs" among it.
        loss: (model, batch) -> the mean loss, a scalar. By default the `loss` that the outputs carry; or else weights
            are ranked as by `calibrate`, and outputs are compared with the dense model's, by mean square.
        held_out: batches that the candidates are compared on; by default every fourth one of `batches`, which then
            ranks nothing.
        shares: those that are tried, from 0 (weights alone) to 1 (tokens alone).
        example: inputs for one forward pass; by default what the model is called with for the first batch.
        settings: any other argument of `upop.calibrate`.

    Raises:
        SettingError: the target names no multiply-adds; or no candidate reaches it, or there are too few batches.
        LayoutError: as `upop.merge_tokens` and `upop.calibrate`. In every case the model is as it was.
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
    """What a budget leaves of a dense model.

    Attributes:
        asked: as it was asked for.
        example: inputs for one forward pass.
        dense: its multiply-adds.
        macs: what may be left of them.
        of_weights: the target for weights of a model that merges tokens already: multiply-adds by their number.
    """

    asked: Target
    example: Any
    dense: int
    macs: float
    of_weights: dict[str, str]


def goal_of(model: nn.Module, target: Target, example: Any) -> Goal:
    """Return what a target leaves of a dense model.

    Raises:
        SettingError: it names no multiply-adds, or no fewer than there are.
    """
    limits = {limit.kind: limit for limit in read_target(target)}
    if "macs" not in limits:
        raise SettingError(
            f"Fewer tokens save multiply-adds, and target={target!r} names none. Give target={{'macs': 0.5}}, or "
            "upop.calibrate one for weights alone."
        )
    dense = count_macs(model, example)
    most = limits["macs"].most(dense)
    if most >= dense:
        raise SettingError(f"Nothing has to go for target={target!r}: the model has {dense:,} multiply-adds.")
    asked = {kind: limit.asked for kind, limit in limits.items()}
    return Goal(target, example, dense, most, {**asked, "macs": str(max(2, int(most)))})


def first_inputs(model: nn.Module, batch: Any, loss: Loss | None) -> Any:
    """Return what a model is called with for a few samples of a batch."""
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
    """Return what every share of a budget loses, of copies of the model; see `calibrate_with_tokens`."""
    _refuse_merging(model)
    ready = copy.deepcopy(model)
    encoders = prepare_merging(ready, goal.example)
    if loss is None:
        loss_of = _distances(model, ready, encoders, held_out)
    else:
        loss_of = partial(_mean, loss=loss, batches=held_out)
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
        except SettingError as error:  # out of reach with so few, or so many, tokens
            reason = error
        found.append(Candidate(share, removed, macs, value))
    if all(each.loss is None for each in found):
        raise reason
    return found


def _refuse_merging(model: nn.Module) -> None:
    if removed_tokens(model) is not None:
        raise SettingError(
            f"This {type(model).__name__} merges tokens already, and a budget is shared from all of them. Take that "
            "off first: upop.merge_tokens(model, 0)."
        )


def _check_shares(shares: object) -> None:
    each = list(shares) if isinstance(shares, Iterable) and not isinstance(shares, str) else []
    if not each or not all(isinstance(share, int | float) and 0 <= share <= 1 for share in each):
        raise SettingError(f"shares={shares!r} are shares of what goes. Give a list of numbers from 0 to 1.")


def merge_share(model: nn.Module, goal: Goal, share: float) -> None:
    """Have a model merge as many tokens as save a share of what is to go, in place.

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
        raise StepError(f"The loss of the held-out batches is not finite, whatever goes for target={goal.asked!r}.")
    return found[min((loss, number) for loss, number in known if math.isfinite(loss))[1]]


def split(batches: list[Any], held_out: Iterable[Any] | None = None) -> tuple[list[Any], list[Any]]:
    """Return batches that rank what goes, and others that tell the loss: every fourth one, or those that are given."""
    if held_out is not None:
        return batches, listed(held_out)
    if len(batches) < 2:
        raise SettingError("One batch cannot both rank what goes and tell the loss. Give two or more, or held_out=.")
    held = batches[::-_EVERY][::-1]
    return [each for number, each in enumerate(batches) if (len(batches) - 1 - number) % _EVERY], held


def _schedule(model: nn.Module, encoders: Sequence[Mergeable], goal: Goal, share: float) -> list[list[int]]:
    """Return the fewest tokens for which a model that is ready to merge saves a share of what is to go."""
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
    """Return how many tokens every layer of every encoder removes: equally many, one more in the last ones."""
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
    """Return what takes the place of a loss: the one in a model's outputs, or their distance from the dense model's.

    Outputs count that have the same shape with all tokens and with the fewest.
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
            f"With fewer tokens no output of {type(model).__name__} has the shape that it had, so that they cannot be "
            "compared. Give a loss: loss=lambda model, batch: ..."
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
