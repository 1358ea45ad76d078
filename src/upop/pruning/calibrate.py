"""One-shot compression: calibration batches rank the channels, and a least-squares correction follows the cut.

First-order terms of the loss rank all channels under one budget, as in the search, and are recomputed at each stage of
the cut. The consumers of pruned channels are corrected on the same batches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.again import buffers_kept, random_numbers_kept
from upop.pruning.carried import record_cut, refuse_unrecordable
from upop.pruning.choice import check_correct, check_whole, chosen, refuse_unscored
from upop.pruning.correction import Choice, correct_consumers
from upop.pruning.costs import Cost, call, channel_costs, current_cost, evaluating, runs_in_training
from upop.pruning.dense import Dense
from upop.pruning.deprecated import renamed_arguments
from upop.pruning.depth import branches_of, check_depth
from upop.pruning.errors import SettingError, StepError
from upop.pruning.frozen import thawed
from upop.pruning.goal import Goal
from upop.pruning.groups import Group, tensor_of
from upop.pruning.latency import Profile
from upop.pruning.least_squares import PARTS, moments_bytes
from upop.pruning.masks import refuse_masked, unwrapped
from upop.pruning.moments import Correct, Moments, allowed_bytes, consumers
from upop.pruning.plan import Plan
from upop.pruning.precision import accumulator
from upop.pruning.prunable import find_groups, groups_to_search, waits_for_batch
from upop.pruning.recompute import recomputing
from upop.pruning.rotation import rotate_heads
from upop.pruning.round_to import RoundTo, check_round_to
from upop.pruning.scores import FreedRows, Importance, Scoring, scoring
from upop.pruning.seen import FirstCall, Kept, examples_of, read_first, remember_inputs
from upop.pruning.sharded import refuse_sharded
from upop.pruning.shrink import Assignment, cut_verified, refuse_shared, restore
from upop.pruning.slips import check_loss, check_model, listed, refuse_inference_mode, scalar, tried
from upop.pruning.stated import Stated
from upop.pruning.targets import Target
from upop.pruning.uniform import Uniform, check_uniform, to_keep_alike
from upop.pruning.verify import tensors_of
from upop.pruning.warn import warn_of_none
from upop.pruning.width import blocks_among, check_width, with_readers

Loss = Callable[[nn.Module, Any], Tensor]
_MOST = 0.25
"""Share of what there is that a stage takes at most, by default."""
_NEARLY_ALL = 0.99
"""All but the last channel of every group is taken in as many stages as this share."""


@renamed_arguments(align="round_to", score="importance", units="groups")
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    ratio: float | None = None,
    *,
    target: Target | None = None,
    profile: Profile | None = None,
    loss: Loss | None = None,
    stages: int | None = None,
    correct: Correct = "auto",
    ridge: float | None = None,
    cost: Cost = "params",
    round_to: RoundTo | str = 1,
    importance: str | Importance = "absolute",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example: Any = None,
    groups: Sequence[Stated] = (),
    verify: Any = True,
    uniform: Uniform | None = None,
    depth: bool = False,
    width: bool = False,
    rotate: bool = True,
) -> Plan:
    """Cut `model` with a few batches and no training; it is changed in place, and physically smaller afterwards.

    Afterwards it carries the plan, as after `upop.shrink`.

    The importance of a channel is the first-order change of the loss without it: the absolute gradient of the loss with
    respect to its mask, summed over the batches. Use this without time or data to train; it takes seconds to minutes.
    `Pruner` needs training and loses less.

    Memory beyond the model is small: each gradient is freed as soon as it is scored. Where activations take more than a
    sixteenth of the weights (and 256 MiB of a small model), layers are recomputed in the backward pass. The dense
    weights, for a restore after a failure, stay on the CPU, or in a temporary file if a large model is on the CPU.

    Args:
        model: the dense model, without masks. It is evaluated, not trained: no dropout, and buffers stay. Frozen
            weights are cut like others, and stay frozen.
        batches: 8 to 64 representative batches; they are kept in a list. Each is an argument of `loss`, or without it a
            tensor, a tuple of arguments or a mapping of keyword arguments of the model.
        ratio: share of the prunable cost to remove, in (0, 1).
        target: instead of a ratio, what remains of the whole model, as for `Pruner`; "macs" and "cache" are counted for
            `example`, or else for the first batch.
        profile: measured latencies, for a target in milliseconds, as for `Pruner`.
        loss: (model, batch) -> the mean loss of the batch, a scalar. By default the `loss` that the model's outputs
            carry (as in transformers, with labels). Without one, importance is the change of the outputs, from
            gradients of random projections of them.
        stages: number of stages, each of which removes the same share of the remaining cost; scores and corrections are
            recomputed for each. By default as many as needed for at most a quarter per stage: one for a ratio of up
            to 0.25, three for 0.5, five for 0.75.
        correct: False only cuts. "auto" uses memory of at most a quarter of the weights on the model's device (at least
            256 MiB on the CPU); the rest waits on the CPU, or the model runs again for every few layers. True holds the
            inputs of all layers at once, at most 2 n^2 numbers for n inputs.
        ridge: strength of the ridge penalty on the change of weights, as a share of the inputs' mean square. By default
            it is cross-validated per layer between two halves of the batches; a layer without a gain is not
            corrected. A number applies to all layers, whether it helps or not.
        cost: what a channel costs; see `Pruner`.
        round_to: kept channels are multiples of this; see `Pruner`.
        importance: contribution of a batch to the scores: "absolute", "squared", or a function; see `Pruner`.
        include: names or patterns of the groups to cut; default all.
        exclude: names or patterns of groups to leave alone.
        example: inputs for one forward pass, for cost="macs", and to find the groups of a custom model
            (`find_prunable`). By default the first batch serves for the latter.
        groups: what is known of groups beside (`upop.GroupSpec`); see `Pruner`.
        verify: inputs on which the masked and the cut model are compared at every stage, as for `upop.shrink`. By
            default a few samples of the first batch. False cuts without proof.
        uniform: "tower" has all layers of a tower keep equally many; see `Pruner`.
        depth: True also prunes whole branches and layers; see `Pruner`.
        width: True also prunes channels of residual streams; see `Pruner`.
        rotate: whether attention heads are rotated to their principal axes first, where that changes no output; see
            `Pruner`.

    Returns:
        The plan: the kept channels of every group, as indices of the dense model, with its heads rotated.

    Raises:
        SettingError: a setting is out of range, there is no batch, the ratio or the target cannot be reached, or the
            model is quantized.
        LayoutError: the model has no group, or a group's weights are shared, masked or sharded.
        StepError: the loss has no gradient, or one that is not finite.
        VerificationError: the outputs differ, or the cut model cannot be run. In every case the model is restored.
    """
    check_model(model, "calibrate()")
    refuse_inference_mode("calibrate()")
    goal, round_to, cost = Goal(ratio, target, profile), check_round_to(round_to), current_cost(cost)
    model = unwrapped(model)
    refuse_sharded(model, "calibrate()")
    refuse_unrecordable(model)
    batches = listed(batches)
    check_loss(loss, batches)
    if stages is not None:
        check_whole("stages", stages)
    check_uniform(uniform)
    check_depth(depth)
    check_width(width, target)
    check_correct(correct)
    if ridge is not None and not ridge > 0:
        raise SettingError(
            f"ridge must be above 0, or the weights are not determined; found {ridge!r}. By default it is chosen."
        )
    scorer = scoring(importance)
    kept_call = first_call(model, batches[0], loss)
    if example is None and waits_for_batch(model):
        found = read_first(kept_call.inputs(model), lambda inputs: groups_to_search(model, inputs, groups, width=width))
    else:
        found = groups_to_search(model, example, groups, width=width)
    called = batches[0] if example is None and loss is None else example
    choice: dict[str, Any] = {"include": include, "exclude": exclude, "uniform": uniform, "depth": depth, "cost": cost}
    dense, costs = _begin(
        goal, model, found, round_to, called, example, lambda: _inputs(model, kept_call, example), **choice
    )
    parts = stage_parts(goal.asked_share, stages)
    names = {group.name for group in dense}
    kept = {group.name: torch.arange(group.size) for group in dense}
    undo: list[Assignment] = []
    choices: list[Choice] = []
    before = Dense(model, dense)
    observing = _Observing(model, batches, loss or _own_loss, scorer, correct)
    try:
        if rotate:
            run = call if loss is None else loss
            rotate_heads(
                model, dense, lambda: [run(model, batch) for batch in batches], _inputs(model, kept_call, example)
            )
        for part in parts:
            stand = [group for group in find_groups(model) if group.name in names]
            with observing.of(stand) as (scores, moments):
                # What the loss would lose is comparable as it is; standardised, what ranks first depends on the tails.
                marked = goal.select(stand, scores, costs, part, round_to, standardised=False).marked
                if correct:
                    active = {name: torch.ones_like(pruned) for name, pruned in marked.items()}
                    changed = correct_consumers(moments, model, stand, active, marked, correct, ridge)
                    choices += changed.values()
            stand = [group for group in stand if group.size]  # of the others nothing was left before
            plan = Plan.of(stand, {group.name: (~marked[group.name]).nonzero().flatten().tolist() for group in stand})
            undo += cut_verified(model, stand, plan, verify, _inputs(model, kept_call, example), dense=before)
            kept |= {name: kept[name][list(channels)] for name, channels in plan.items()}
    except BaseException:
        restore(undo)
        before.restore()
        raise
    finally:
        before.forget()
    warn_of_none([choice.ridge is not None for choice in choices], "Give more batches.", stacklevel=4)
    described = cost if isinstance(cost, str) else "given"
    plan = Plan.of(
        dense,
        {name: channels.tolist() for name, channels in kept.items()},
        method="calibrate",
        **goal.described({name: len(channels) for name, channels in kept.items()}),
        stages=len(parts),
        correct=bool(correct),
        cost=described,
        round_to=round_to,
        **({"uniform": uniform} if uniform else {}),
        **({"depth": True} if depth else {}),
        **({"width": True} if width else {}),
        **({} if rotate else {"rotate": False}),
    )
    record_cut(model, plan)
    return plan


def check_budget(
    model: nn.Module,
    ratio: float | None = None,
    *,
    target: Target | None = None,
    profile: Profile | None = None,
    cost: Cost = "params",
    round_to: RoundTo | str = 1,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example: Any = None,
    uniform: Uniform | None = None,
    depth: bool = False,
    width: bool = False,
) -> None:
    """Raise the errors of `calibrate` for a budget and a choice of groups, before any long computation.

    Args:
        model: as for `calibrate`, and so are the other arguments.
        ratio: share of the prunable cost to remove.
        target: instead of a ratio.
        profile: for a target in milliseconds.
        cost: of a channel.
        round_to: kept channels are multiples of this.
        include: names or patterns of the groups to cut.
        exclude: names or patterns of groups to leave alone.
        example: inputs for one forward pass.
        uniform: "tower" or None.
        depth: whether branches may be pruned.
        width: whether channels of residual streams are pruned.

    Raises:
        SettingError: a setting is out of range, or the ratio or the target cannot be reached.
        LayoutError: the model has no group, or a group's weights are frozen, shared, masked or sharded.
    """
    goal, model, cost = Goal(ratio, target, profile), unwrapped(model), current_cost(cost)
    check_uniform(uniform)
    check_width(width, target)
    choice: dict[str, Any] = {"include": include, "exclude": exclude, "uniform": uniform, "depth": depth, "cost": cost}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stays whole; it is said when the model is cut
        found = groups_to_search(model, example, width=width)
        examples = examples_of(model) if example is None else iter([example])
        _begin(goal, model, found, check_round_to(round_to), example, example, lambda: examples, **choice)


def _begin(
    goal: Goal,
    model: nn.Module,
    found: list[Group],
    round_to: RoundTo,
    called: Any,
    example: Any,
    inputs: Callable[[], Iterator[Any]],
    *,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    uniform: Uniform | None,
    depth: bool,
    cost: Cost,
) -> tuple[list[Group], Mapping[str, float]]:
    """Initialise a goal for a model; return the groups to search, and the costs of their channels.

    Args:
        goal: of the compression.
        model: the dense model.
        found: all its groups.
        round_to: kept channels are multiples of this.
        called: inputs of the forward pass that the goal counts.
        example: inputs of the forward pass that the cost counts.
        inputs: returns inputs for finding branches.
        include: names or patterns of the groups to cut.
        exclude: names or patterns of groups to leave alone.
        uniform: "tower" or None.
        depth: whether branches may be pruned.
        cost: of a channel.
    """
    searched = chosen(found, include, exclude, depth=depth)
    dense, towers, layers = to_keep_alike(model, searched, uniform, found, depth=depth)
    refuse_unscored(model, dense)
    refuse_masked(model, dense)
    refuse_shared(model, dense)
    costs = channel_costs(model, dense, cost, example)
    branches: list[tuple[str, ...]] = []
    if depth:
        branches = branches_of(model, blocks_among(dense), inputs(), layers if uniform else None)
    goal.begin(model, dense, costs, round_to, called, towers, branches)
    return dense, costs


def stage_parts(share: float, stages: int | None = None) -> list[float]:
    """Return the cumulative progress after each stage, in (0, 1]; the last is 1.

    Every stage removes the same share of the remaining cost.

    Args:
        share: of the cost to remove in all, in (0, 1].
        stages: their number; by default as many as needed for at most `_MOST` each.
    """
    share = min(share, _NEARLY_ALL)
    if stages is None:
        stages = max(1, math.ceil(math.log1p(-share) / math.log1p(-_MOST) - 1e-9))
    return [(1 - (1 - share) ** (stage / stages)) / share for stage in range(1, stages)] + [1.0]


def first_call(model: nn.Module, batch: Any, loss: Loss | None) -> Kept:
    """Return the inputs of the model for the first batch, or the loss as a call if it uses submodules alone."""
    if loss is None:
        kept = Kept(model, batch)
        remember_inputs(model, kept)
        return kept
    first = FirstCall(model)
    device = next(model.parameters()).device
    try:
        with evaluating(model), buffers_kept(model), random_numbers_kept(device):
            try:
                tried(partial(loss, model, batch), "loss(model, batch)", batch)
            except Exception:
                if not runs_in_training(model, lambda model: loss(model, batch)):
                    raise
    finally:
        first.release()
    return first.kept or Kept(model, lambda other: loss(other, batch))


def _inputs(model: nn.Module, kept: Kept, example: Any) -> Iterator[Any]:
    yield from kept.inputs(model)
    if example is not None:
        yield example
    yield from examples_of(model)


class _Observing:
    """Collects scores and layer inputs over all batches.

    Args:
        model: the model.
        batches: arguments of `loss`.
        loss: (model, batch) -> loss.
        scorer: turns gradients into scores.
        correct: whether layers will be corrected, and with how much memory.
    """

    def __init__(self, model: nn.Module, batches: list[Any], loss: Loss, scorer: Scoring, correct: Correct) -> None:
        self._model, self._batches, self._loss, self._scorer = model, batches, loss, scorer
        self._correct = correct
        self._thrifty = True  # until the model is seen not to allow it

    @contextmanager
    def of(self, groups: list[Group]) -> Iterator[tuple[dict[str, Tensor], Moments]]:
        """Yield scores [size] (high scores are pruned first), and the inputs of the consumers.

        Raises:
            StepError: a loss has no gradient, or one that is not finite.
        """
        model, pruned = self._model, [group for group in groups if not group.size]
        groups = [group for group in groups if group.size]
        sizes = [layers[0].in_features for group in with_readers(groups) if (layers := consumers(model, group))]
        kind = accumulator(next(model.parameters()))
        fits = sum(moments_bytes(size, kind) for size in sizes) <= allowed_bytes(model, self._correct)
        moments = Moments(at_once=fits, alone=len(self._batches) < PARTS)
        parameters = {
            (part.tensor, part.dim): (tensor_of(model, part.tensor), part.dim)
            for group in groups
            for part in group.scored
        }
        weights = [tensor for tensor, _ in parameters.values()]
        with thawed(weights):
            rows = FreedRows(self._scorer.rows, parameters, model.parameters())
        try:
            with evaluating(model), thawed(weights):
                try:
                    with recomputing(model) if self._thrifty else nullcontext():
                        scores = self._scores(groups, rows, moments)
                except Exception as error:
                    if not self._thrifty or isinstance(error, torch.OutOfMemoryError | MemoryError):
                        raise
                    self._thrifty = False  # what was wrong otherwise comes up again
                    moments.release()
                    moments = Moments(at_once=fits, alone=len(self._batches) < PARTS)
                    scores = self._scores(groups, rows, moments)
            rows.release()
            model.zero_grad()
            if not all(bool(score.isfinite().all()) for score in scores.values()):
                raise StepError(
                    "The loss of a batch, or a gradient, is not finite. Check the batches, and use float32."
                )
            yield {**scores, **{group.name: torch.zeros(0, dtype=torch.float64) for group in pruned}}, moments
        finally:
            rows.release()
            moments.release()
            model.zero_grad()

    def _scores(self, groups: list[Group], rows: FreedRows[tuple[str, int]], moments: Moments) -> dict[str, Tensor]:
        scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        if self._correct:
            moments.observe(self._model, with_readers(groups), announced=True)
        for number, batch in enumerate(self._batches):
            moments.step = number
            self._model.zero_grad()
            found = rows.of(partial(self._run, batch, moments))
            if not found:
                raise StepError("The loss gave no gradient to any prunable weight. Does it use this model?")
            for group in groups:
                parts = [(part, (part.tensor, part.dim)) for part in group.scored]
                given = [part.reduce(found[place]) for part, place in parts if place in found]
                scores[group.name] += self._scorer.added(sum(given, torch.zeros(group.size))).double().cpu()
        return scores

    def _run(self, batch: Any, moments: Moments) -> Tensor:
        alone = self._loss is _own_loss
        moments.forget(moments.step)
        if self._correct:
            moments.expect(self._model, batch, function=call if alone else self._loss)
        described = "The model" if alone else "loss(model, batch)"
        with torch.enable_grad():
            found = scalar(tried(partial(self._loss, self._model, batch), described, batch))
        moments.end()
        return found


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss in the outputs of a batch, or fixed random projections of the outputs."""
    outputs = call(model, batch)
    carried = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(carried, Tensor):
        return carried
    draws = torch.Generator().manual_seed(0)
    found = [value for _, value in tensors_of(outputs) if value.requires_grad]
    signs = [2 * torch.randint(2, value.shape, generator=draws).to(value) - 1 for value in found]
    if not found:
        raise StepError("The model's outputs have no gradient. Give calibrate() a loss.")
    return torch.stack([(value * sign).sum() for value, sign in zip(found, signs, strict=True)]).sum()
