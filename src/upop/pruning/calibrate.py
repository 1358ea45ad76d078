"""Compression without training: a few batches say what matters, and the layers that read the rest make up for it.

First-order terms of the loss rank all entries under one budget, as in the search, and are taken anew after every part
of the cut; the layers that read what was cut are corrected over the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from upop.pruning.again import buffers_kept, random_numbers_kept
from upop.pruning.align import Align, check_align
from upop.pruning.carried import record_cut, refuse_unrecordable
from upop.pruning.choice import check_whole, chosen, refuse_frozen
from upop.pruning.correction import Change, Choice
from upop.pruning.costs import Cost, call, entry_costs, evaluating
from upop.pruning.errors import SettingError, StepError
from upop.pruning.goal import Goal
from upop.pruning.masks import refuse_masked, unwrapped
from upop.pruning.moments import PARTS, Moments, readers
from upop.pruning.plan import Plan
from upop.pruning.scores import RowScores, Score, Scoring, scoring
from upop.pruning.seen import FirstCall, Kept, examples_of, read_first, remember_inputs
from upop.pruning.sharded import refuse_sharded
from upop.pruning.shrink import Assignment, Exchange, cut_verified, refuse_shared, restore
from upop.pruning.slips import check_loss, check_model, listed, refuse_inference_mode, scalar, tried
from upop.pruning.stated import Stated
from upop.pruning.surveys import find_units, units_to_search, waits_for_batch
from upop.pruning.targets import Target
from upop.pruning.told import warn_of_none
from upop.pruning.uniform import Uniform, check_uniform, to_keep_alike
from upop.pruning.units import Unit, tensor_of
from upop.pruning.verify import tensors_of

Loss = Callable[[nn.Module, Any], Tensor]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    ratio: float | None = None,
    *,
    target: Target | None = None,
    loss: Loss | None = None,
    stages: int = 8,
    correct: bool = True,
    ridge: float | None = None,
    cost: Cost = "params",
    align: Align = 1,
    score: str | Score = "absolute",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example: Any = None,
    units: Sequence[Stated] = (),
    verify: Any = True,
    uniform: Uniform | None = None,
) -> Plan:
    """Cut `model` with a few batches and no training; it is changed in place, and physically smaller afterwards.

    It then carries the plan, as after `upop.shrink`.

    An entry matters as much as the loss of the batches would change without it, by its first-order term: the sum over
    the batches of the absolute gradient of the loss to its mask. Use this where there is no time or data to train, and
    `Pruner` where there is: the first is done in seconds to minutes, the second loses less.

    Args:
        model: the dense model, without masks. It is evaluated, not trained: no drop-out, and buffers stay.
        batches: 8 to 64 of them, of the kind that the model will see; they are kept in a list. Each is what `loss`
            takes, or without it a tensor, a tuple of arguments or a mapping of keyword arguments of the model.
        ratio: share of the prunable cost to remove, in (0, 1).
        target: in place of a ratio, what is left of the whole model, as for `Pruner`; the forward pass of "macs" and
            "cache" is that of `example`, or else of the first batch, where the model is called with it.
        loss: (model, batch) -> the mean loss of the batch, a scalar. By default the `loss` that the model's outputs
            carry (as transformers' do when they are given labels); or else an entry matters as much as the outputs
            would move without it, by the gradients of random projections of them.
        stages: in so many equal parts the cost is removed; scores and corrections are made anew for each.
        correct: False only cuts.
        ridge: how strongly corrected weights are held to the old ones, as a share of the inputs' mean square. By
            default it is decided for each layer, by how well weights that are corrected for one half of the batches do
            on the other half: where they would do no better than the old ones, a layer is not corrected. A number
            holds for all layers, whether it helps them or not.
        cost: what an entry costs; see `Pruner`.
        align: kept channels are multiples of this; see `Pruner`.
        score: what a batch adds to the scores: "absolute", "squared", or a function; see `Pruner`.
        include: names or patterns of the units to cut; default all.
        exclude: names or patterns of units to leave alone.
        example: inputs for one forward pass, for cost="flops", and to read the units of a model with classes of one's
            own (`survey`). Without one, those of such a model are read with the first batch.
        units: what is known of units beside (`upop.UnitSpec`); see `Pruner`.
        verify: inputs on which the masked and the cut model are compared at every stage, as for `upop.shrink`. By
            default a few samples of the first batch. False cuts without proof.
        uniform: "tower" has all layers of a tower keep equally many; see `Pruner`.

    Returns:
        What every unit kept, in the entries of the dense model.

    Raises:
        SettingError: a setting is out of range, there is no batch, the ratio or the target cannot be reached, or the
            model is quantized.
        LayoutError: the model has no unit, or a unit's weights are frozen, shared, masked or sharded.
        StepError: the loss has no gradient, or one that is not finite.
        VerificationError: the outputs differ, or the cut model cannot be run. In every case the model is as it was.
    """
    check_model(model, "calibrate()")
    refuse_inference_mode("calibrate()")
    goal, align = Goal(ratio, target), check_align(align)
    model = unwrapped(model)
    refuse_sharded(model, "calibrate()")
    refuse_unrecordable(model)
    batches = listed(batches)
    check_loss(loss, batches)
    check_whole("stages", stages)
    check_uniform(uniform)
    if ridge is not None and not ridge > 0:
        raise SettingError(
            f"ridge must be above 0, or the weights are not determined; found {ridge!r}. Without it, it is chosen."
        )
    scorer = scoring(score)
    kept_call = _first_call(model, batches[0], loss)
    if example is None and waits_for_batch(model):
        found = read_first(kept_call.inputs(model), lambda inputs: units_to_search(model, inputs, units))
    else:
        found = units_to_search(model, example, units)
    dense, towers = to_keep_alike(model, chosen(found, include, exclude), uniform, found)
    refuse_frozen(model, dense)
    refuse_masked(model, dense)
    refuse_shared(model, dense)
    costs = entry_costs(model, dense, cost, example)
    goal.begin(model, dense, costs, align, batches[0] if example is None and loss is None else example, towers)
    names = {unit.name for unit in dense}
    kept = {unit.name: torch.arange(unit.size) for unit in dense}
    undo: list[Assignment] = []
    choices: list[Choice] = []
    try:
        for stage in range(1, stages + 1):
            stand = [unit for unit in find_units(model) if unit.name in names]
            scores, inputs = _observe(model, stand, batches, loss or _own_loss, scorer, correct)
            # What the loss would lose is comparable as it is; standardised, what ranks first depends on the tails.
            marked = goal.select(stand, scores, costs, stage / stages, align, standardised=False).marked
            plan = Plan.of(stand, {name: (~gone).nonzero().flatten().tolist() for name, gone in marked.items()})
            for unit in stand:
                if unit.name in inputs and marked[unit.name].any():
                    layers = readers(model, unit)
                    undo += [edit.apply() for layer in layers for edit in _copies(layer)]
                    kept_now, gone = ((marked[unit.name] == is_gone).nonzero().flatten() for is_gone in (False, True))
                    choices.append(Change(unit, kept_now, gone, inputs[unit.name]).apply(layers, ridge))
            undo += cut_verified(model, stand, plan, verify, _inputs(model, kept_call, example))
            kept = {name: entries[list(plan[name])] for name, entries in kept.items()}
    except BaseException:
        restore(undo)
        raise
    warn_of_none([choice.ridge is not None for choice in choices], "Give more batches.", stacklevel=3)
    described = cost if isinstance(cost, str) else "given"
    plan = Plan.of(
        dense,
        {name: entries.tolist() for name, entries in kept.items()},
        method="calibrate",
        **goal.told({name: len(entries) for name, entries in kept.items()}),
        stages=stages,
        correct=correct,
        cost=described,
        align=align,
        **({"uniform": uniform} if uniform else {}),
    )
    record_cut(model, plan)
    return plan


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


def _observe(
    model: nn.Module, units: list[Unit], batches: list[Any], loss: Loss, scorer: Scoring, correct: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return scores [size] (high ones go first), and second moments [n + 1, n + 1] of what the readers are given."""
    told = "The model" if loss is _own_loss else "loss(model, batch)"
    parameters = {part.tensor: (tensor_of(model, part.tensor), part.dim) for unit in units for part in unit.producers}
    rows = RowScores(scorer.rows)
    moments = Moments()
    if correct:
        moments.watch(model, units)
    scores = {unit.name: torch.zeros(unit.size, dtype=torch.float64) for unit in units}
    try:
        with evaluating(model):
            for number, batch in enumerate(batches):
                moments.part = number % PARTS if len(batches) >= PARTS else None
                model.zero_grad()
                with torch.enable_grad():
                    scalar(tried(partial(loss, model, batch), told, batch)).backward()
                found = rows.of(parameters)
                if not found:
                    raise StepError("The loss gave no gradient to any weight that could go. Is it of this model?")
                for unit in units:
                    given = [part.reduce(found[part.tensor]) for part in unit.producers if part.tensor in found]
                    scores[unit.name] += scorer.added(sum(given, torch.zeros(unit.size))).double().cpu()
    finally:
        moments.release()
        model.zero_grad()
    if not all(bool(score.isfinite().all()) for score in scores.values()):
        raise StepError("The loss of a batch, or a gradient, is not finite. Check the batches, and use float32.")
    return scores, moments.values


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


def _copies(layer: nn.Linear) -> list[Exchange]:
    """Return what gives a layer copies of its weights, so that a change of them can be taken back."""
    return [Exchange(old, old.detach().clone(), old.grad) for old in layer.parameters(recurse=False)]
