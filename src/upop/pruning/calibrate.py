"""Compression without training: a few batches say what matters, and the layers that read the rest make up for it.

First-order terms of the loss rank all entries under one budget, as in the search, and are taken anew after every part
of the cut. What a removed entry gave to the layer that reads it is partly in the entries that stay; least squares on
the inputs of that layer, over the same batches, find the weights that bring its outputs closest to what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from upop.pruning import budget
from upop.pruning.choice import chosen, refuse_frozen
from upop.pruning.costs import Cost, call, entry_costs, evaluating
from upop.pruning.errors import SettingError, StepError
from upop.pruning.layouts import find_units
from upop.pruning.masks import refuse_masked, unwrapped
from upop.pruning.plan import Plan
from upop.pruning.scores import RowScores, Score, score_function
from upop.pruning.sharded import refuse_sharded
from upop.pruning.shrink import Edit, cut, refuse_shared, restore, tensors_of
from upop.pruning.units import Unit, owner_of, tensor_of

_IDLE = 0.01
"""Weight in the correction of tokens that the loss does not depend on."""
Loss = Callable[[nn.Module, Any], Tensor]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    ratio: float,
    *,
    loss: Loss | None = None,
    stages: int = 8,
    correct: bool = True,
    ridge: float = 1e-3,
    cost: Cost = "params",
    align: int = 1,
    score: str | Score = "signed",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example: Any = None,
) -> Plan:
    """Cut `model` with a few batches and no training; it is changed in place, and physically smaller afterwards.

    An entry matters as much as the loss of the batches would change without it, by its first-order term: the sum over
    the batches of the absolute gradient of the loss to its mask. Use this where there is no time or data to train, and
    `Pruner` where there is: the first is done in seconds to minutes, the second loses less.

    Args:
        model: the dense model, without masks. It is evaluated, not trained: no drop-out, and buffers stay.
        batches: 8 to 64 of them, of the kind that the model will see; they are kept in a list. Each is what `loss`
            takes, or without it a tensor, a tuple of arguments or a mapping of keyword arguments of the model.
        ratio: share of the prunable cost to remove, in (0, 1).
        loss: (model, batch) -> the mean loss of the batch, a scalar. By default the `loss` that the model's outputs
            carry (as transformers' do when they are given labels); or else an entry matters as much as the outputs
            would move without it, by the gradients of random projections of them.
        stages: in so many equal parts the cost is removed; scores and corrections are made anew for each.
        correct: False only cuts.
        ridge: how strongly the corrected weights are held to the old ones, as a share of the inputs' mean square.
        cost: what an entry costs; see `Pruner`.
        align: kept sizes are multiples of this.
        score: (weight, its gradient) -> one number per row; "signed" is the gradient to the mask.
        include: names or patterns of the units to cut; default all.
        exclude: names or patterns of units to leave alone.
        example: inputs for one forward pass; needed by cost="flops" alone.

    Returns:
        What every unit kept, in the entries of the dense model.

    Raises:
        SettingError: a setting is out of range, there is no batch, or the ratio cannot be reached.
        LayoutError: the model has no unit, or a unit's weights are frozen, shared, masked or sharded.
        StepError: the loss has no gradient, or one that is not finite; the model is as it was.
    """
    model = unwrapped(model)
    refuse_sharded(model, "calibrate()")
    batches = list(batches)
    if not batches:
        raise SettingError("calibrate() needs batches to learn from, and there was none. Give 8 to 64.")
    if not 0 < ratio < 1:
        raise SettingError(f"ratio is the share of the cost to remove, strictly between 0 and 1; found {ratio!r}.")
    if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
        raise SettingError(f"stages must be a whole number of at least 1; found {stages!r}.")
    if not ridge > 0:
        raise SettingError(f"ridge must be above 0, or the weights are not determined; found {ridge!r}.")
    function = score_function(score)
    dense = chosen(find_units(model), include, exclude)
    refuse_frozen(model, dense)
    refuse_masked(model, dense)
    refuse_shared(model, dense)
    costs = entry_costs(model, dense, cost, example)
    budget.check_reachable(dense, costs, ratio, align)
    whole = sum(costs[unit.name] * unit.size for unit in dense)
    names = {unit.name for unit in dense}
    kept = {unit.name: torch.arange(unit.size) for unit in dense}
    undo: list[Edit] = []
    try:
        for stage in range(1, stages + 1):
            units = [unit for unit in find_units(model) if unit.name in names]
            left = sum(costs[unit.name] * unit.size for unit in units)
            share = max(0.0, 1 - whole * (1 - ratio * stage / stages) / left)
            scores, inputs = _observe(model, units, batches, loss or _own_loss, function, correct)
            # What the loss would lose is comparable as it is; standardised, what ranks first depends on the tails.
            marked = budget.select(units, scores, costs, share, align, standardised=False).marked
            plan = Plan.of(units, {name: (~gone).nonzero().flatten().tolist() for name, gone in marked.items()})
            before = {unit.name: list(map(_affine, _readers(model, unit))) for unit in units if unit.name in inputs}
            undo += cut(model, units, plan)
            for unit in units:
                entries = torch.tensor(plan[unit.name])
                if unit.name in inputs and len(entries) < unit.size:
                    columns = unit.online[-1].index(entries, unit.size)
                    for reader, weights in zip(_readers(model, unit), before[unit.name], strict=True):
                        undo += _correct(reader, columns, inputs[unit.name], weights, ridge)
            kept = {name: entries[list(plan[name])] for name, entries in kept.items()}
    except BaseException:
        restore(undo)
        raise
    described = cost if isinstance(cost, str) else "given"
    return Plan.of(
        dense,
        {name: entries.tolist() for name, entries in kept.items()},
        method="calibrate",
        ratio=ratio,
        stages=stages,
        correct=correct,
        cost=described,
        align=align,
    )


def _observe(
    model: nn.Module, units: list[Unit], batches: list[Any], loss: Loss, function: Score, correct: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return scores [size] (high ones go first), and second moments [n + 1, n + 1] of what the readers are given."""
    parameters = {part.tensor: (tensor_of(model, part.tensor), part.dim) for unit in units for part in unit.producers}
    rows = RowScores(function)
    moments: dict[str, Tensor] = {}
    hooks = [_watch(model, unit, moments) for unit in units if correct and _readers(model, unit)]
    scores = {unit.name: torch.zeros(unit.size, dtype=torch.float64) for unit in units}
    try:
        with evaluating(model):
            for batch in batches:
                model.zero_grad()
                with torch.enable_grad():
                    value = loss(model, batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                    raise StepError("loss(model, batch) must return a scalar tensor with a gradient. It did not.")
                value.backward()
                found = rows.of(parameters)
                if not found:
                    raise StepError("The loss gave no gradient to any weight that could go. Is it of this model?")
                for unit in units:
                    given = [part.reduce(found[part.tensor]) for part in unit.producers if part.tensor in found]
                    scores[unit.name] -= sum(given, torch.zeros(())).abs().double().cpu()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    if not all(bool(score.isfinite().all()) for score in scores.values()):
        raise StepError("The loss of a batch, or a gradient, is not finite. Check the batches, and use float32.")
    return scores, moments


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


def _readers(model: nn.Module, unit: Unit) -> list[nn.Linear]:
    """Return the layer that reads the unit's axis and then its momentum copies, if it is a plain linear layer."""
    reader = unit.online[-1]
    copies = [part for part in unit.slices if part.follows and not part.produces and part.dim == 1]
    modules = [owner_of(model, part.tensor)[0] for part in (reader, *copies) if part.tensor.endswith(".weight")]
    plain = reader.dim == 1 and modules and all(type(each).forward is nn.Linear.forward for each in modules)
    return [each for each in modules if isinstance(each, nn.Linear)] if plain else []


def _watch(model: nn.Module, unit: Unit, moments: dict[str, Tensor]) -> RemovableHandle:
    """Sum up `x x^T` of the inputs of a unit's reader, with a 1 behind each, in `moments`, as gradients come back.

    Tokens that the loss does not depend on (padding, all but the class token in a last layer) say little of what the
    layer is for: they only steady the fit.
    """

    def add(inputs: Tensor, gradient: Tensor) -> None:
        rows = inputs.flatten(0, -2)
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        idle = (gradient.flatten(0, -2) == 0).all(1, keepdim=True)
        product = (rows.t() @ torch.where(idle, _IDLE * rows, rows)).double()
        moments[unit.name] = moments[unit.name] + product if unit.name in moments else product

    def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        del module
        if output.requires_grad:
            inputs = args[0].detach()
            output.register_hook(lambda gradient: add(inputs, gradient))

    return _readers(model, unit)[0].register_forward_hook(watch)


def _affine(layer: nn.Linear) -> Tensor:
    """Return a layer's weights with its bias as the last column, [outputs, inputs + 1], in float64."""
    weight = layer.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    return torch.cat([weight, bias.unsqueeze(1)], dim=1)


def _correct(reader: nn.Linear, columns: Tensor, moments: Tensor, before: Tensor, ridge: float) -> list[Edit]:
    """Give a reader that was cut the weights W' that minimise sum |W x - W' x'|^2 + r |W' - W|^2 over its inputs.

    Args:
        reader: the layer after the cut.
        columns: the inputs that stayed.
        moments: from before the cut, [n + 1, n + 1].
        before: the weights from before the cut, [outputs, n + 1].
        ridge: r, as a share of the mean square of the inputs that stayed.
    """
    columns = columns.to(moments.device)
    if reader.bias is not None:
        columns = torch.cat([columns, columns.new_tensor([len(moments) - 1])])
    squares = moments[columns][:, columns]
    inputs = reader.weight.shape[1]
    held = torch.zeros_like(squares.diagonal())
    held[:inputs] = ridge * squares.diagonal()[:inputs].mean().clamp_min(torch.finfo(torch.float32).tiny)
    aim = before @ moments[:, columns] + before[:, columns] * held
    new = torch.linalg.solve(squares + held.diag(), aim.t()).t()
    kind = reader.weight.dtype
    weight = nn.Parameter(new[:, :inputs].to(kind).contiguous(), requires_grad=reader.weight.requires_grad)
    edits = [Edit(reader, "weight", weight)]
    if reader.bias is not None:
        bias = nn.Parameter(new[:, inputs].to(kind).contiguous(), requires_grad=reader.bias.requires_grad)
        edits.append(Edit(reader, "bias", bias))
    return [edit.apply() for edit in edits]
