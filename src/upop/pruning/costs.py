"""The cost of one channel of a group: in parameters, in multiply-adds, as published, or custom."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from upop.pruning.deprecated import outside_upop, warn_renamed
from upop.pruning.errors import SettingError, nearest
from upop.pruning.groups import Group, tensor_of
from upop.pruning.sharded import reshard

Cost = str | Mapping[str, float] | Callable[[Group], float]

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

COSTS = ("params", "macs", "reference")
# The published implementation's cost of an attention channel, where an MLP channel costs 1.
_PUBLISHED_ATTENTION_COST = {"vision-language": 36.0, "vision": 12.0}
_QK = ("query", "key")  # the first two arguments of torch.nn.MultiheadAttention


def current_cost(cost: Cost) -> Cost:
    """Return a cost under its current name; "flops", which counted multiply-adds, warns."""
    if cost != "flops":
        return cost
    warn_renamed("cost='flops'", "cost='macs'", stacklevel=outside_upop())
    return "macs"


def channel_costs(model: nn.Module, groups: Sequence[Group], cost: Cost, example: Any = None) -> dict[str, float]:
    """Return the cost of one channel for every group.

    Args:
        model: the dense model.
        groups: its groups.
        cost: "params" (parameters that the channel removes), "macs" (multiply-adds that it removes in one forward
            pass over `example`), "reference" (attention 36 or, in a model without text groups, 12; MLP 1), a mapping
            from group names or patterns to numbers, or a function of a group.
        example: inputs for one forward pass, as `call` takes them; needed by "macs" only.

    Raises:
        SettingError: the cost is unknown, matches no group, leaves one out, is not positive, or misses its example.
    """
    if callable(cost):
        costs = {group.name: float(cost(group)) for group in groups}
    elif isinstance(cost, Mapping):
        costs = _given(groups, cost)
    elif cost == "params":
        costs = {group.name: _parameters(model, group) for group in groups}
    elif cost == "macs":
        if example is None:
            raise SettingError(
                "cost='macs' counts one forward pass, and no example inputs were given. Pass example=... "
                "(a tensor, a tuple of arguments, or a mapping of keyword arguments)."
            )
        costs = _multiply_adds(model, groups, example)
    elif cost == "reference":
        family = "vision-language" if any(group.modality == "text" for group in groups) else "vision"
        attention = _PUBLISHED_ATTENTION_COST[family]
        costs = {group.name: attention if group.kind == "attention" else 1.0 for group in groups}
    else:
        raise SettingError(
            f"cost={cost!r} is not known{nearest(str(cost), COSTS)}. "
            f"Use one of {', '.join(map(repr, COSTS))}, a mapping from groups to costs, or a function of a group."
        )
    bad = {name: value for name, value in costs.items() if not 0 < value < float("inf")}
    if bad:
        raise SettingError(f"Costs must be positive numbers; found {bad}. Exclude a group that costs nothing.")
    return costs


class Arguments(NamedTuple):
    """The arguments of a call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(model: nn.Module, inputs: Any) -> Any:
    """Run `model` on `inputs`: a mapping is keyword arguments, a tuple or list arguments, anything else the one
    argument; a function is given the model and returns its outputs.
    """
    if isinstance(inputs, Arguments):
        return model(*inputs.args, **inputs.kwargs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    if callable(inputs) and not isinstance(inputs, Tensor):
        return inputs(model)
    return model(inputs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode without gradients, and restore the mode of every module; see `evaluated`."""
    modes = {module: module.training for module in model.modules()}
    evaluated(model)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


Training = Literal["itself", "parts"]
"""The part of a model that is in training mode if it runs only so: the model itself, or all but torch's layers."""
_IN_TRAINING = "upop_in_training"
"""The attribute of a model, and of its copies, that says so."""


def evaluated(model: nn.Module) -> nn.Module:
    """Put a model into evaluation mode; return it.

    A model that is known to run only in training mode keeps that mode where it needs it; torch's layers neither apply
    dropout nor use batch statistics.
    """
    model.eval()
    way: Training | None = getattr(model, _IN_TRAINING, None)
    return model if way is None else _partly_training(model, way)


def _partly_training(model: nn.Module, way: Training) -> nn.Module:
    for module in model.modules():
        module.training = module is model or (way == "parts" and not _is_layer_of_torch(type(module)))
    return model


def _is_layer_of_torch(kind: type[nn.Module]) -> bool:
    """Whether a class is a layer of torch, or derived from one; containers are none."""
    homes = (each.__module__ for each in kind.__mro__ if each is not nn.Module)
    return any(home.startswith("torch.nn.modules.") and home != nn.Sequential.__module__ for home in homes)


def runs_in_training(model: nn.Module, run: Callable[[nn.Module], Any], tried: nn.Module | None = None) -> bool:
    """Whether a model that fails in evaluation mode runs in training mode; if so, that is remembered of it.

    Not of its class: another model of it may run in evaluation mode, and drop something or fail in training mode.

    Args:
        model: the model.
        run: calls it.
        tried: what is called, whose modes change; by default the model itself.
    """
    ways: tuple[Training, ...] = ("itself", "parts")
    for way in ways:
        try:
            run(_partly_training((model if tried is None else tried).eval(), way))
        except Exception:  # the model's own
            continue
        setattr(model, _IN_TRAINING, way)
        return True
    return False


def count_macs(model: nn.Module, inputs: Any) -> int:
    """Return the multiply-adds of all matrix products and convolutions in one forward pass (evaluation mode)."""
    return sum(_counted(model, inputs, lambda counter: {"": int(counter.get_total_flops())}).values()) // 2


def macs_by_module(model: nn.Module, inputs: Any) -> dict[str, int]:
    """Return module name -> its own multiply-adds in one forward pass, without those of its submodules."""
    root = type(model).__name__
    totals = {
        path.removeprefix(root).removeprefix("."): total
        for path, total in _counted(model, inputs, _by_path).items()
        if path == root or path.startswith(f"{root}.")
    }
    own = dict(totals)
    for path, total in totals.items():
        parent = path
        while parent:
            parent = parent.rpartition(".")[0]
            if parent in own:
                own[parent] -= total
                break
    return {path: count // 2 for path, count in own.items()}


def _by_path(counter: FlopCounterMode) -> dict[str, int]:
    return {path: sum(counts.values()) for path, counts in counter.get_flop_counts().items()}


def _counted(model: nn.Module, inputs: Any, read: Callable[[FlopCounterMode], dict[str, int]]) -> dict[str, int]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it does a layer in one operation, which is not counted
        # torch's counter asks every input of a module for its history, and a view of a weight that is trained has none.
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluating(model), flop_counter() as counter:
            call(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in trained:
            parameter.requires_grad_(True)
    return read(counter)


@cache
def flop_formulas() -> dict[Any, Callable[..., Any]]:
    """Return operation -> torch's FLOP formula; torch before 2.15 has none for attention on CPUs."""
    from torch.utils.flop_counter import flop_registry  # it imports Triton

    formula = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        return formula(*args, **kwargs)

    on_cpu._get_raw = True  # type: ignore[attr-defined]  # the formula takes tensors, as torch has made it do
    return {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: on_cpu, **flop_registry}


def flop_counter(mapping: Mapping[Any, Callable[..., Any]] | None = None) -> FlopCounterMode:
    """Return torch's FLOP counter, with missing formulas added or others replaced."""
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    lacking = {operation: each for operation, each in flop_formulas().items() if operation not in flop_registry}
    return FlopCounterMode(display=False, custom_mapping=lacking if mapping is None else dict(mapping))


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _given(groups: Sequence[Group], cost: Mapping[str, float]) -> dict[str, float]:
    names = [group.name for group in groups]
    for pattern in cost:
        if not fnmatch.filter(names, pattern):
            raise SettingError(f"cost names {pattern!r}, which matches no group{nearest(pattern, names)}.")
    costs = {}
    for name in names:
        matches = [value for pattern, value in cost.items() if pattern == name or fnmatch.fnmatch(name, pattern)]
        if not matches:
            raise SettingError(f"cost gives no number for group {name!r}. Add it, or exclude the group.")
        costs[name] = float(cost.get(name, matches[0]))
    return costs


def _parameters(model: nn.Module, group: Group) -> float:
    tensors = [tensor_of(model, part.tensor) for part in group.online]
    return sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter)) / group.size


def _multiply_adds(model: nn.Module, groups: Sequence[Group], example: Any) -> dict[str, float]:
    """Count linear layers per token, and attention per query-key pair."""
    calls: dict[str, list[_Call]] = {}

    def recorder(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.setdefault(name, []).append(_call_of(module, args, kwargs, output))

        return hook

    layers = {_layer_of(part.tensor) for group in groups for part in group.online if part.tensor.endswith("weight")}
    hooks = [model.get_submodule(name).register_forward_hook(recorder(name), with_kwargs=True) for name in layers]
    try:
        with evaluating(model):
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
        reshard(model)
    costs = {}
    for group in groups:
        weights = [part for part in group.online if part.tensor.endswith("weight") and _multiplies(model, part.tensor)]
        seen = [calls.get(_layer_of(part.tensor), []) for part in weights]
        # Some libraries read a layer's weight without calling the layer; it sees what the others of its group see.
        most = max(seen, key=len)
        linear = sum(
            tensor_of(model, part.tensor).numel()
            * sum(each.mean_tokens if of_part else each.tokens for each in of_part or most)
            for part, of_part in zip(weights, seen, strict=True)
        )
        seen = [of_part or most for of_part in seen]
        pairs = 0
        if group.kind == "attention":
            # Every query token meets every key token of its own sequence, once for the scores and once for the values.
            keys = seen[1] if sum(part.produces for part in weights) > 1 else seen[0]
            pairs = sum(query.tokens * key.keys for query, key in zip(seen[0], keys, strict=False))
        costs[group.name] = linear / group.size + 2 * group.width * pairs
        if not costs[group.name]:
            raise SettingError(f"The example inputs do not run group {group.name}. Exclude it, or give other inputs.")
    return costs


@dataclass(frozen=True)
class _Call:
    """The size of one call of a layer: its tokens, the keys per query, and the tokens per weight row.

    The last differs if one weight projects queries of some tokens and keys and values of others.
    """

    tokens: int
    keys: int
    mean_tokens: float


def _call_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> _Call:
    if isinstance(module, nn.MultiheadAttention):
        query, key = (kwargs.get(name, args[place] if place < len(args) else None) for place, name in enumerate(_QK))
        queries, keys = query.numel() // query.shape[-1], key.numel() // key.shape[-1]
        length = key.shape[-2 if module.batch_first or key.dim() == 2 else 0]
        return _Call(queries, length, (queries + 2 * keys) / 3)
    if isinstance(module, nn.Conv2d):
        tokens, length = output.numel() // output.shape[1], output[0, 0].numel()
    else:
        tokens, length = output.numel() // output.shape[-1], output.shape[-2] if output.dim() > 2 else 1
    return _Call(tokens, length, tokens)


def _multiplies(model: nn.Module, tensor: str) -> bool:
    """Whether a weight is multiplied with the inputs of its layer, not indexed by them."""
    return not isinstance(model.get_submodule(_layer_of(tensor)), nn.Embedding)


def _layer_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]
