"""The cut: validates the plan, builds smaller tensors, swaps them in, and verifies the result, or undoes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from upop.pruning.again import snapshot
from upop.pruning.carried import record_cut, refuse_unrecordable
from upop.pruning.dense import Dense
from upop.pruning.empty import empty_class
from upop.pruning.errors import LayoutError, VerificationError
from upop.pruning.groups import Group, has_number, number_of, owner_of, set_number, tensor_of
from upop.pruning.known import Prunable, is_known, remember, remember_cut
from upop.pruning.masks import Masks, refuse_masked, unmask, unwrapped
from upop.pruning.plan import Plan
from upop.pruning.seen import examples_of
from upop.pruning.sharded import is_sharded_tensor, refuse_sharded
from upop.pruning.slicing import slicing
from upop.pruning.slips import check_model
from upop.pruning.verify import Outputs, compare, narrowed, outputs_of, rounding_of
from upop.pruning.whole import whole
from upop.pruning.width import names_stream

MOST_COPIED = 2**28
"""Numbers of a model that is copied in float64, 2 GiB of it, to prove a cut on; a larger one is compared as it is."""


@dataclass
class Edit:
    """One attribute assignment of a cut, which can be undone."""

    module: nn.Module
    name: str
    new: Any

    def apply(self) -> Edit:
        """Apply the edit; return one that reverts it."""
        old = number_of(self.module, self.name)
        set_number(self.module, self.name, self.new)
        return Edit(self.module, self.name, old)


@dataclass
class Exchange:
    """New data of any shape for a parameter, which stays the same object for optimizers, averages and hooks.

    Attributes:
        parameter: gets new data and a new gradient.
        data: the new data.
        gradient: of the same shape, or None.
    """

    parameter: nn.Parameter
    data: Tensor
    gradient: Tensor | None

    def apply(self) -> Exchange:
        """Apply the exchange; return one that reverts it."""
        parameter = self.parameter
        back = Exchange(parameter, parameter.data, parameter.grad)
        parameter.grad = None
        # The graph of the last loss may be alive, and with it what autograd noted of the parameter's shape: that is
        # only made anew for numbers of another precision.
        other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=parameter.device)
        parameter.data = self.data
        parameter.grad = self.gradient
        return back


Assignment = Edit | Exchange


def shrink(model: nn.Module, plan: Plan | Mapping[str, Any], *, verify: Any = True, fold: bool = True) -> nn.Module:
    """Cut `model` to the channels that `plan` keeps; the same object comes back, physically smaller.

    The shrunken model computes the same outputs as the model with all other channels masked, which is verified. Every
    library divides attention scores by the square root of the current head_dim, so queries are multiplied by
    sqrt(kept / original) where head dims are pruned. Weights that are sharded by `fully_shard` are gathered on the CPU
    for the cut, and sharded again; all processes call this together. The model then carries the plan, which `upop.save`
    writes; a transformers model also carries it in its configuration, for its own `save_pretrained` and `push_to_hub`.

    Args:
        model: the dense model, without masks.
        plan: a `Plan`, or a mapping from group names to the channels to keep. Unnamed groups stay whole.
        verify: inputs on which masked and shrunken outputs are compared (a tensor, a tuple of arguments, a mapping
            of keyword arguments, or a function of the model). By default those with which this model, or another one of
            its class, was traced, or generated ones. False cuts without verification, as do `fold=False` and models on
            the meta device.
        fold: False does not rescale queries, for weights that are replaced right afterwards.

    Raises:
        PlanError: the plan does not fit the model.
        SettingError: the model is quantized.
        LayoutError: a tensor to cut is shared with a part of the model that is not cut.
        VerificationError: the outputs differ, the cut model cannot be run, or there is nothing to verify on. In every
            case the model is restored.
    """
    check_model(model, "shrink()")
    inner = unwrapped(model)
    refuse_unrecordable(inner)
    if not isinstance(plan, Plan):
        from upop.pruning.prunable import find_groups

        groups = find_groups(inner)
        if any(map(names_stream, {*plan} - {group.name for group in groups})):
            groups = find_groups(inner, width=True)
        plan = Plan.of(groups, plan)
    with whole(inner):
        apply_plan(inner, plan, verify=verify, fold=fold)
    record_cut(inner, plan)
    return model


def apply_plan(model: nn.Module, plan: Plan, *, verify: Any = True, fold: bool = True) -> None:
    """Cut an unwrapped model like `shrink`, without recording the plan on it."""
    refuse_sharded(model, "shrink()")
    groups = plan.check(model)
    refuse_masked(unmask(model), groups)
    if any(tensor_of(model, part.tensor).is_meta for group in groups for part in group.slices):
        if not any(verify is each for each in (True, False, None)):
            raise LayoutError(
                f"{type(model).__name__} is on the meta device and has no outputs to verify. Use verify=False."
            )
        verify = False
    from upop.pruning.prunable import is_of_ones_own

    # A model of a library is read by itself: a plan may leave some of its groups out.
    unknown = plan.groups(model) if plan.slices and not is_known(model) and is_of_ones_own(model) else []
    if fold:
        cut_verified(model, groups, plan, verify, examples_of(model))
    else:
        cut(model, groups, plan, fold=False)
        remember_cut(model, groups, plan)
    if unknown:  # a copy of a model that was read is not looked at again
        remember(model, Prunable(tuple(unknown), ()))
        remember_cut(model, groups, plan)


def cut_verified(
    model: nn.Module,
    groups: list[Group],
    plan: Mapping[str, Sequence[int]],
    verify: Any,
    seen: Iterable[Any],
    *,
    dense: Dense | None = None,
) -> list[Assignment]:
    """Cut the model, and verify that its outputs equal those of the masked model unless `verify` is False.

    Args:
        model: without masks.
        groups: of the model.
        plan: their kept channels.
        verify: inputs of a call; True takes the first of `seen` with which the model runs, False skips the check.
        seen: possible inputs.
        dense: backup of the parameters, which the caller restores; no other copy of the old sizes is then kept.

    Returns:
        The edits that undo the cut; parameters are left to `dense`, if given.

    Raises:
        VerificationError: the outputs differ or cannot be compared; the model is restored.
    """
    refuse_shared(model, groups)
    if verify is False:
        edits = cut(model, groups, plan, hold=dense is None)
        remember_cut(model, groups, plan)
        return edits
    inputs = seen if verify is True or verify is None else [verify]
    if all(len(plan[group.name]) == group.size for group in groups):
        return []
    put_back = snapshot(model)
    undo: list[Assignment] = []
    try:
        example, expected = _masked_outputs(model, groups, plan, inputs)
        proved = _proved_in_float64(model, groups, plan, example)
        undo = cut(model, groups, plan, hold=dense is None)
        found = _outputs_of_cut(model, example)
        expected = narrowed(expected, found, groups, plan)
        precision = tensor_of(model, groups[0].slices[0].tensor).dtype
        rounding = partial(rounding_of, partial(outputs_of, model, example), outputs=found)
        compare(expected, found, rounding, dtype=precision, proved=proved)
    except BaseException:
        restore(undo)
        put_back()  # what a forward keeps may have the sizes of the cut
        raise
    remember_cut(model, groups, plan)
    return undo


def cut(
    model: nn.Module,
    groups: list[Group],
    plan: Mapping[str, Sequence[int]],
    *,
    fold: bool = True,
    anew: bool = False,
    hold: bool = True,
) -> list[Assignment]:
    """Cut the model; return the edits that undo it. Nothing changes if building a tensor fails.

    Every parameter stays the same object; its data and gradient are cut.

    Args:
        model: without masks.
        groups: of the model.
        plan: their kept channels.
        fold: whether to rescale queries for a softmax scale that depends on the size.
        anew: replace parameters with new objects, for copies that share them with other models.
        hold: False frees the old data of each parameter at once; the caller has a backup.
    """
    refuse_shared(model, groups)
    going = [group for group in groups if len(plan[group.name]) < group.size]
    edits: list[Assignment] = []
    tensors = dict.fromkeys(part.tensor for group in going for part in group.slices)
    for tensor in tensors:
        found = _cut_tensor(model, tensor, going, plan, fold, anew)
        if not hold:
            for edit in [each for each in found if isinstance(each, Exchange)]:
                edit.apply()
                found.remove(edit)
        edits += found
    for group in going:
        edits += [Edit(model.get_submodule(swap.module), "__class__", swap.kind) for swap in group.swaps]
        edits += _emptied(model, group) if not len(plan[group.name]) else []
        for attribute in group.attributes:
            module = model.get_submodule(attribute.module)
            if has_number(module, attribute.name):
                edits.append(Edit(module, attribute.name, attribute.value(len(plan[group.name]))))
    undo = [edit.apply() for edit in edits]
    layers = dict.fromkeys(owner_of(model, tensor)[0] for tensor in tensors)
    return undo + [edit.apply() for layer in layers for edit in channels(layer)]


def _emptied(model: nn.Module, group: Group) -> list[Edit]:
    """Return the edits that let a module run whose attention was pruned whole."""
    holder = dict(model.named_modules(remove_duplicate=False)).get(group.name)
    if holder is None or group.kind != "attention" or group.swaps:
        return []
    return [Edit(holder, "__class__", empty_class(type(holder)))]


def restore(undo: list[Assignment]) -> None:
    """Undo the edits of `cut`."""
    for edit in reversed(undo):
        edit.apply()


def _cut_tensor(
    model: nn.Module, name: str, groups: list[Group], plan: Mapping[str, Sequence[int]], fold: bool, anew: bool = False
) -> list[Assignment]:
    """Cut one tensor along all axes that groups cut it along."""
    module, leaf = owner_of(model, name)
    old = tensor_of(model, name)
    left = slicing(old, name, groups, plan, fold)
    new = left.of(old, 1)
    edits: list[Assignment]
    holders = _holders(model, old) if any(group.kind == "residual" for group in groups) else [(module, leaf)]
    if isinstance(old, nn.Parameter) and not anew and not old.is_inference():  # those can be trained nowhere
        edits = [Exchange(old, new, None if old.grad is None else left.of(old.grad, -1))]
    else:
        made = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        edits = [Edit(holder, own, made) for holder, own in holders]
    for holder, own in holders:
        for dim in left.kept if own == "weight" else ():
            width = width_attribute(holder, dim)
            edits += [Edit(holder, width, new.shape[dim])] if width else []
    return edits


def _holders(model: nn.Module, tensor: Tensor) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold a tensor, each with its name there: tied embeddings have several."""
    return [
        (module, name)
        for module in model.modules()
        for name, held in (*module._parameters.items(), *module._buffers.items())
        if held is tensor
    ]


def width_attribute(module: nn.Module, dim: int) -> str | None:
    """Return the name of the attribute with the length of a weight along `dim`, or None."""
    if isinstance(module, nn.Linear):
        return ("out_features", "in_features")[dim]
    if isinstance(module, nn.Embedding):
        return ("num_embeddings", "embedding_dim")[dim]
    # transformers' Conv1D, whose weight is that of a linear layer transposed
    return ("nx", "nf")[dim] if hasattr(module, "nf") else None


def channels(layer: nn.Module) -> list[Edit]:
    """Return the edits that update the stored channel counts of a cut convolution or norm."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return []
    widths: dict[str, int] = {}
    if isinstance(layer, nn.modules.conv._ConvNd):
        first, second = weight.shape[0], weight.shape[1] * layer.groups
        into, out = (first, second) if layer.transposed else (second, first)
        widths = {"in_channels": into, "out_channels": out}
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        widths = {"num_features": len(weight)}
    return [Edit(layer, name, width) for name, width in widths.items() if getattr(layer, name) != width]


def refuse_shared(model: nn.Module, groups: list[Group]) -> None:
    """Raise a `LayoutError` if a tensor of `groups` is also held by another module of the model.

    A module with several names is cut once, and is allowed.
    """
    names: dict[int, dict[tuple[int, str], str]] = {}
    for path, module in model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(tensor), {})[id(module), leaf] = f"{path}.{leaf}" if path else leaf
    for group in groups:
        for part in group.slices if group.kind != "residual" else ():  # whoever holds a table of words has its width
            module, leaf = owner_of(model, part.tensor)
            holders = names.get(id(tensor_of(model, part.tensor)), {})
            others = [name for place, name in holders.items() if place != (id(module), leaf)]
            if others:
                raise LayoutError(
                    f"Group {group.name} cannot be cut: {part.tensor} is the same tensor as {', '.join(others)}. "
                    "Exclude the group."
                )


def _masked_outputs(
    model: nn.Module, groups: list[Group], plan: Mapping[str, Sequence[int]], inputs: Iterable[Any]
) -> tuple[Any, Outputs]:
    """Return the first inputs that run, and the masked outputs for them."""
    failure: Exception | None = None
    for each in inputs:
        try:
            with _masked(model, groups, plan):
                return each, outputs_of(model, each)
        except Exception as error:
            failure = failure or error
    if failure is None:
        raise VerificationError(
            f"The cut of {type(model).__name__} cannot be verified: no inputs were recorded, and none could be "
            "generated. Give the arguments of a call as verify= (a tensor, a tuple of arguments, a mapping of keyword "
            "arguments, or a function of the model), or skip the check with verify=False."
        )
    raise VerificationError(
        f"The cut cannot be verified: {type(model).__name__} does not run on the inputs, even before the cut "
        f"({_described(failure)}). Give the arguments of a call as verify= (a tensor, a tuple of arguments, a mapping "
        "of keyword arguments, or a function of the model)."
    ) from failure


@contextmanager
def _masked(model: nn.Module, groups: list[Group], plan: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Mask groups and their momentum copies, which are cut too and may contribute to the outputs."""
    groups = [replace(group, slices=tuple(replace(part, follows=False) for part in group.slices)) for group in groups]
    masks = Masks(model, groups)
    try:
        values = {group.name: torch.zeros(group.size) for group in groups}
        for name, value in values.items():
            value[list(plan[name])] = 1
        masks.set(values)
        yield
    finally:
        masks.remove()


def _outputs_of_cut(model: nn.Module, inputs: Any) -> Outputs:
    try:
        return outputs_of(model, inputs)
    except Exception as error:
        raise VerificationError(
            f"{type(model).__name__} runs with masks, but not after the cut ({_described(error)}). The model was left "
            "as it was. "
            "It has a hard-coded size that was not found: exclude the group, and please report it."
        ) from error


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _proved_in_float64(model: nn.Module, groups: list[Group], plan: Mapping[str, Sequence[int]], inputs: Any) -> bool:
    """Verify the cut on a copy in float64; return whether that was possible.

    It is impossible for models that are too large, or that compute in a fixed precision.

    Raises:
        VerificationError: the outputs of the cut copy differ from the masked ones.
    """
    from upop.pruning.axes.copies import forgetting
    from upop.pruning.axes.proof import Precise

    try:
        copied = precise_copy(model, inputs)
        if copied is None:
            return False
        precise, inputs = copied
        with forgetting(), _masked(precise, groups, plan), Precise(torch.float64):
            expected = outputs_of(precise, inputs)
    except Exception:
        return False
    cut(precise, groups, plan)
    with forgetting(), Precise(torch.float64):
        found = _outputs_of_cut(precise, inputs)
        expected = narrowed(expected, found, groups, plan)
        compare(expected, found, partial(rounding_of, partial(outputs_of, precise, inputs), outputs=found))
    return True


def precise_copy(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any] | None:
    """Return a copy of a model, without masks, and inputs in float64.

    None if the model is sharded, too large for that or in float64 already, or if the inputs are a function of it:
    nobody else can make precise what that gives to the model.

    Raises:
        LayoutError: the model cannot be copied.
    """
    from upop.pruning.axes.copies import changed, copied

    tensors = [*model.parameters(), *model.buffers()]
    numbers = sum(each.numel() for each in tensors if each.is_floating_point())
    if any(map(is_sharded_tensor, tensors)):
        return None
    if numbers > MOST_COPIED or all(each.dtype == torch.float64 for each in model.parameters()):
        return None
    if not any(isinstance(each, Tensor) for each in tree_leaves(inputs)):
        return None

    def precise(value: Any) -> Any:
        return value.to(torch.float64) if isinstance(value, Tensor) and value.is_floating_point() else value

    inputs = tree_map(precise, dict(inputs) if isinstance(inputs, Mapping) else inputs)
    return copied(model, changed(model, lambda each: precise(each).clone())), inputs
