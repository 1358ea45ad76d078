"""One-shot compression: calibration batches rank the channels, and a least-squares correction follows the cut.

First-order terms of the loss rank all channels under one budget, as in the search, and are taken anew after every part
of the cut; the layers that read what was cut are corrected over the same batches.
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
from upop.pruning.costs import Cost, call, channel_costs, evaluating
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
from upop.pruning.prunable import find_groups, groups_to_search, waits_for_batch
from upop.pruning.recompute import recomputing
from upop.pruning.round_to import RoundTo, check_round_to
from upop.pruning.scores import FreedRows, Importance, Scoring, accumulator, scoring
from upop.pruning.seen import FirstCall, Kept, examples_of, read_first, remember_inputs
from upop.pruning.sharded import refuse_sharded
from upop.pruning.shrink import Assignment, cut_verified, refuse_shared, restore
from upop.pruning.slips import check_loss, check_model, listed, refuse_inference_mode, scalar, tried
from upop.pruning.stated import Stated
from upop.pruning.targets import Target
from upop.pruning.uniform import Uniform, check_uniform, to_keep_alike
from upop.pruning.verify import tensors_of
from upop.pruning.warn import warn_of_none

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
) -> Plan:
    """Cut `model` with a few batches and no training; it is changed in place, and physically smaller afterwards.

    It then carries the plan, as after `upop.shrink`.

    A channel matters as much as the loss of the batches would change without it, by its first-order term: the sum over
    the batches of the absolute gradient of the loss to its mask. Use this where there is no time or data to train, and
    `Pruner` where there is: the first is done in seconds to minutes, the second loses less.

    It holds little beside the model: gradients become scores, and are freed, as they come; where activations are many
    (a sixteenth of the weights' bytes, and 256 MiB of a small model), those of layers in a row are computed again in
    the backward pass; and what it takes to put the model back is on the CPU, or of a large model there in a temporary
    file.

    Args:
        model: the dense model, without masks. It is evaluated, not trained: no drop-out, and buffers stay. Frozen
            weights are cut like others, and stay frozen.
        batches: 8 to 64 of them, of the kind that the model will see; they are kept in a list. Each is what `loss`
            takes, or without it a tensor, a tuple of arguments or a mapping of keyword arguments of the model.
        ratio: share of the prunable cost to remove, in (0, 1).
        target: in place of a ratio, what is left of the whole model, as for `Pruner`; the forward pass of "macs" and
            "cache" is that of `example`, or else of the first batch, where the model is called with it.
        profile: for a target in milliseconds, as for `Pruner`.
        loss: (model, batch) -> the mean loss of the batch, a scalar. By default the `loss` that the model's outputs
            carry (as transformers' do when they are given labels); or else a channel matters as much as the outputs
            would move without it, by the gradients of random projections of them.
        stages: in so many parts the cost is removed, each of them the same share of what there is; scores and
            corrections are made anew for each. By default as many as it takes for no part to be more than a quarter:
            one for a ratio of up to 0.25, three for 0.5, five for 0.75.
        correct: False only cuts. "auto" holds at most a quarter of the weights' bytes on the model's device for the
            correction (on the CPU 256 MiB where that is more): the rest waits on the CPU, or the model runs once more
            for every few layers. True holds what all layers are given at once, at most 2 n^2 numbers for n inputs.
        ridge: how strongly corrected weights are held to the old ones, as a share of the inputs' mean square. By
            default it is decided for each layer, by how well weights that are corrected for one half of the batches do
            on the other half: where they would do no better than the old ones, a layer is not corrected. A number
            holds for all layers, whether it helps them or not.
        cost: what a channel costs; see `Pruner`.
        round_to: kept channels are multiples of this; see `Pruner`.
        importance: what a batch adds to the scores: "absolute", "squared", or a function; see `Pruner`.
        include: names or patterns of the groups to cut; default all.
        exclude: names or patterns of groups to leave alone.
        example: inputs for one forward pass, for cost="flops", and to read the groups of a model with classes of one's
            own (`find_prunable`). Without one, those of such a model are read with the first batch.
        groups: what is known of groups beside (`upop.GroupSpec`); see `Pruner`.
        verify: inputs on which the masked and the cut model are compared at every stage, as for `upop.shrink`. By
            default a few samples of the first batch. False cuts without proof.
        uniform: "tower" has all layers of a tower keep equally many; see `Pruner`.
        depth: True lets whole branches, and layers, go; see `Pruner`.

    Returns:
        What every group kept, in the channels of the dense model.

    Raises:
        SettingError: a setting is out of range, there is no batch, the ratio or the target cannot be reached, or the
            model is quantized.
        LayoutError: the model has no group, or a group's weights are shared, masked or sharded.
        StepError: the loss has no gradient, or one that is not finite.
        VerificationError: the outputs differ, or the cut model cannot be run. In every case the model is as it was.
    """
    check_model(model, "calibrate()")
    refuse_inference_mode("calibrate()")
    goal, round_to = Goal(ratio, target, profile), check_round_to(round_to)
    model = unwrapped(model)
    refuse_sharded(model, "calibrate()")
    refuse_unrecordable(model)
    batches = listed(batches)
    check_loss(loss, batches)
    if stages is not None:
        check_whole("stages", stages)
    check_uniform(uniform)
    check_depth(depth)
    check_correct(correct)
    if ridge is not None and not ridge > 0:
        raise SettingError(
            f"ridge must be above 0, or the weights are not determined; found {ridge!r}. Without it, it is chosen."
        )
    scorer = scoring(importance)
    kept_call = _first_call(model, batches[0], loss)
    if example is None and waits_for_batch(model):
        found = read_first(kept_call.inputs(model), lambda inputs: groups_to_search(model, inputs, groups))
    else:
        found = groups_to_search(model, example, groups)
    called = batches[0] if example is None and loss is None else example
    choice = {"include": include, "exclude": exclude, "uniform": uniform, "depth": depth, "cost": cost}
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
) -> None:
    """Raise what `calibrate` would for a budget and a choice of groups, so that nothing long runs before it.

    Args:
        model: as of `calibrate`, as are the others.
        ratio: share of the prunable cost to remove.
        target: in place of a ratio.
        profile: for a target in milliseconds.
        cost: what a channel costs.
        round_to: kept channels are multiples of this.
        include: names or patterns of the groups to cut.
        exclude: names or patterns of groups to leave alone.
        example: inputs for one forward pass.
        uniform: "tower" or None.

    Raises:
        SettingError: a setting is out of range, or the ratio or the target cannot be reached.
        LayoutError: the model has no group, or a group's weights are frozen, shared, masked or sharded.
    """
    goal, model = Goal(ratio, target, profile), unwrapped(model)
    check_uniform(uniform)
    choice: dict[str, Any] = {"include": include, "exclude": exclude, "uniform": uniform, "depth": False, "cost": cost}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what stays whole; it is said when the model is cut
        found = groups_to_search(model, example)
        _begin(goal, model, found, check_round_to(round_to), example, example, lambda: iter(()), **choice)


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
    """Tell a goal what it means for a model; return the groups that are searched, and what their channels cost.

    Args:
        goal: of the compression.
        model: dense.
        found: all groups of it.
        round_to: kept channels are multiples of this.
        called: inputs whose forward pass the goal counts.
        example: inputs whose forward pass the cost counts.
        inputs: gives inputs that branches are found with.
        include: names or patterns of the groups to cut.
        exclude: names or patterns of groups to leave alone.
        uniform: "tower" or None.
        depth: whether branches may go.
        cost: what a channel costs.
    """
    searched = chosen(found, include, exclude, depth=depth)
    dense, towers, layers = to_keep_alike(model, searched, uniform, found, depth=depth)
    refuse_unscored(model, dense)
    refuse_masked(model, dense)
    refuse_shared(model, dense)
    costs = channel_costs(model, dense, cost, example)
    branches: list[tuple[str, ...]] = []
    if depth:
        branches = branches_of(model, dense, inputs(), layers if uniform else None)
    goal.begin(model, dense, costs, round_to, called, towers, branches)
    return dense, costs


def stage_parts(share: float, stages: int | None = None) -> list[float]:
    """Return which part of the way is gone after each stage, the last of them 1.

    Every stage takes the same share of what there is.

    Args:
        share: of the cost that goes in all, in (0, 1].
        stages: how many; by default as many as it takes for none to take more than `_MOST`.
    """
    share = min(share, _NEARLY_ALL)
    if stages is None:
        stages = max(1, math.ceil(math.log1p(-share) / math.log1p(-_MOST) - 1e-9))
    return [(1 - (1 - share) ** (stage / stages)) / share for stage in range(1, stages)] + [1.0]


def _first_call(model: nn.Module, batch: Any, loss: Loss | None) -> Kept:
    """Return what the model is called with for the first batch, or the loss of it if that calls parts of it alone."""
    if loss is None:
        kept = Kept(model, batch)
        remember_inputs(model, kept)
        return kept
    first = FirstCall(model)
    device = next(model.parameters()).device
    try:
        with evaluating(model), buffers_kept(model), random_numbers_kept(device):
            tried(partial(loss, model, batch), "loss(model, batch)", batch)
    finally:
        first.release()
    return first.kept or Kept(model, lambda other: loss(other, batch))


def _inputs(model: nn.Module, kept: Kept, example: Any) -> Iterator[Any]:
    yield from kept.inputs(model)
    if example is not None:
        yield example
    yield from examples_of(model)


class _Observing:
    """Looks at a model over all batches.

    Args:
        model: the model.
        batches: of `loss`.
        loss: (model, batch) -> loss.
        scorer: how gradients become scores.
        correct: whether layers will be corrected, and with how much memory.
    """

    def __init__(self, model: nn.Module, batches: list[Any], loss: Loss, scorer: Scoring, correct: Correct) -> None:
        self._model, self._batches, self._loss, self._scorer = model, batches, loss, scorer
        self._correct = correct
        self._thrifty = True  # until the model is seen not to allow it

    @contextmanager
    def of(self, groups: list[Group]) -> Iterator[tuple[dict[str, Tensor], Moments]]:
        """Yield scores [size] (high ones go first), and what the readers of the groups are given.

        Raises:
            StepError: a loss has no gradient, or one that is not finite.
        """
        model, pruned = self._model, [group for group in groups if not group.size]
        groups = [group for group in groups if group.size]
        sizes = [layers[0].in_features for group in groups if (layers := consumers(model, group))]
        kind = accumulator(next(model.parameters()))
        fits = sum(moments_bytes(size, kind) for size in sizes) <= allowed_bytes(model, self._correct)
        moments = Moments(at_once=fits, alone=len(self._batches) < PARTS)
        parameters = {
            part.tensor: (tensor_of(model, part.tensor), part.dim) for group in groups for part in group.producers
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

    def _scores(self, groups: list[Group], rows: FreedRows, moments: Moments) -> dict[str, Tensor]:
        scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        if self._correct:
            moments.observe(self._model, groups, announced=True)
        for number, batch in enumerate(self._batches):
            moments.step = number
            self._model.zero_grad()
            found = rows.of(partial(self._run, batch, moments))
            if not found:
                raise StepError("The loss gave no gradient to any weight that could go. Is it of this model?")
            for group in groups:
                given = [part.reduce(found[part.tensor]) for part in group.producers if part.tensor in found]
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
    """Return the loss in the outputs of a batch, or random projections of all of them, the same ones at every call."""
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
