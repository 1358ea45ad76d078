"""Parameters, multiply-adds and cache of a model once it is cut, computed from the sizes that its groups keep.

Nothing is cut for the count. The length of a tensor is linear in the pruned channels of a group, and every count is a
formula of such lengths. Parameters show theirs. Operations of the forward are probed: it runs a few times on the meta
device, each time with one channel less in half of the groups; the runs in which a length changes encode its group.
Finally, the prediction for an uneven cut must hold exactly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from upop.pruning.again import random_numbers_kept
from upop.pruning.costs import Arguments, call, evaluating, flop_counter, flop_formulas
from upop.pruning.errors import LayoutError, SettingError
from upop.pruning.groups import Group, tensor_of
from upop.pruning.shrink import cut, restore
from upop.pruning.traits import momentum_prefixes

Sizes = Mapping[str, int]
"""Group -> how many channels it keeps, or loses."""


@dataclass(frozen=True)
class Length:
    """A length of a tensor: `whole` minus `steps` per pruned channel of a group."""

    whole: int
    steps: tuple[tuple[str, int], ...] = ()

    def at(self, lost: Sizes) -> int:
        """Return the length for given numbers of pruned channels."""
        return self.whole - sum(step * lost.get(group, 0) for group, step in self.steps)


@dataclass(frozen=True)
class Term:
    """One counted term and its multiplicity.

    Attributes:
        formula: the count as a function of the values, nested as in `form`; lengths come as integers.
        values: the lengths and other arguments.
        form: the nesting of the values.
        times: the multiplicity.
    """

    formula: Callable[[Any], int]
    values: tuple[Any, ...]
    form: TreeSpec
    times: int = 1

    def at(self, lost: Sizes) -> int:
        """Return the count for given numbers of pruned channels."""
        values = [each.at(lost) if isinstance(each, Length) else each for each in self.values]
        return self.times * self.formula(tree_unflatten(values, self.form))


class Quantity:
    """A count of the whole model, as a function of the kept channels.

    Args:
        groups: of the model.
        terms: the summands.

    Attributes:
        whole: the count of the uncut model.
    """

    def __init__(self, groups: Sequence[Group], terms: Iterable[Term]) -> None:
        self._sizes = {group.name: group.size for group in groups}
        moving: dict[Any, Term] = {}
        self._fixed = 0
        for each in terms:
            if any(isinstance(value, Length) and value.steps for value in each.values):
                key = (each.formula, repr(each.form), each.values)  # forms have no hash in every torch
                known = moving.get(key)
                moving[key] = each if known is None else replace(known, times=known.times + each.times)
            else:
                self._fixed += each.at({})
        self._terms = list(moving.values())
        self.whole = self.at(self._sizes)

    def at(self, kept: Sizes) -> int:
        """Return the count for given numbers of kept channels; unnamed groups keep all."""
        lost = {name: self._sizes[name] - count for name, count in kept.items() if name in self._sizes}
        return self._fixed + sum(term.at(lost) for term in self._terms)


def parameters_of(
    model: nn.Module, groups: Sequence[Group], bytes_of: Callable[[Tensor], int] | None = None
) -> Quantity:
    """Return the number of parameters; shared ones count once, momentum copies not at all.

    Args:
        model: masked or not, sharded or whole.
        groups: of it.
        bytes_of: bytes per number of a parameter; counts bytes instead.
    """
    steps: dict[str, dict[int, list[tuple[str, int]]]] = {}
    for group in groups:
        for part in group.slices:
            steps.setdefault(part.tensor, {}).setdefault(part.dim, []).append((group.name, sum(part.inners)))
    copies = momentum_prefixes(model)
    where = {id(tensor_of(model, name)): name for name in steps}
    terms = []
    for name, parameter in model.named_parameters():
        if not name.startswith(copies):
            dims = steps.get(where.get(id(parameter), ""), {})
            lengths = tuple(Length(length, tuple(dims.get(dim, ()))) for dim, length in enumerate(parameter.shape))
            form = tree_flatten(list(lengths))[1]
            terms.append(Term(_product, lengths, form, 1 if bytes_of is None else bytes_of(parameter)))
    return Quantity(groups, terms)


def multiply_adds_of(model: nn.Module, groups: Sequence[Group], example: Any) -> Quantity:
    """Return the multiply-adds of all matrix products and convolutions in one forward pass in evaluation mode.

    Args:
        model: left as it is.
        groups: of it.
        example: inputs of the pass, as `call` takes them.

    Raises:
        LayoutError: the cut model runs other operations, so that the count cannot be predicted.
    """
    return _learnt(model, groups, example, _operations, "multiply-adds")


def cache_of(model: nn.Module, groups: Sequence[Group], example: Any) -> Quantity:
    """Return the bytes that a decoder's cache of keys and values takes after one forward pass.

    Args:
        model: left as it is.
        groups: of it.
        example: keyword arguments of the pass; `use_cache=True` is added to them.

    Raises:
        SettingError: the model gives no cache.
        LayoutError: as `multiply_adds_of`.
    """
    if isinstance(example, Arguments):
        example = Arguments(example.args, {**example.kwargs, "use_cache": True})
    elif isinstance(example, Mapping):
        example = {**example, "use_cache": True}
    found = _learnt(model, groups, example, _cached, "bytes of the cache")
    if not found.whole:
        raise SettingError(
            f"A target for the cache was given, and {type(model).__name__} returns no cache for the example. "
            "Give the keyword arguments of a decoder's call: example={'input_ids': ...}."
        )
    return found


Seen = list[tuple[Callable[[Any], int], Any]]
"""What is counted in a run: formulas, and what they are given, with the shapes of tensors in their place."""


def _operations(model: nn.Module, example: Any) -> Seen:
    seen: Seen = []

    def noted(formula: Callable[..., Any]) -> Callable[..., int]:
        def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            seen.append((_FORMULAS.setdefault(formula, _Counted(formula)), _shapes((args, kwargs, out_val))))
            return 0

        count._get_raw = True  # type: ignore[attr-defined]  # torch's counter gives it the tensors themselves
        return count

    mapping = {operation: noted(formula) for operation, formula in flop_formulas().items()}
    with evaluating(model), flop_counter(mapping):
        call(model, example)
    return seen


def _cached(model: nn.Module, example: Any) -> Seen:
    with evaluating(model):
        outputs = call(model, example)
    named = dict(outputs.items()) if isinstance(outputs, Mapping) else {}
    held = next((named[name] for name in ("cache", "past_key_values") if name in named), None)
    seen: set[int] = set()
    found: list[Tensor] = []

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping | list | tuple):
            for each in value.values() if isinstance(value, Mapping) else value:
                walk(each)
        elif hasattr(value, "__dict__") and id(value) not in seen:
            seen.add(id(value))
            walk(vars(value))

    walk(held)
    # Tensors of no dimension, or of one, count positions.
    return [(_product, [*each.shape, each.element_size()]) for each in found if each.dim() > 1]


class _Counted:
    """The formula of torch's counter: multiply-adds of an operation, from the shapes of its inputs."""

    def __init__(self, formula: Callable[..., Any]) -> None:
        self._formula = formula

    def __call__(self, given: Any) -> int:
        args, kwargs, out = given
        if any(0 in shape for shape in args if isinstance(shape, tuple)):
            return 0  # torch's formula of grouped queries divides by the number of keys' heads
        return int(self._formula(*args, **kwargs, out_val=out)) // 2


_FORMULAS: dict[Callable[..., Any], _Counted] = {}


def _shapes(values: Any) -> Any:
    return tree_map(lambda each: tuple(each.shape) if isinstance(each, Tensor) else each, values)


def _product(lengths: Sequence[int]) -> int:
    count = 1
    for each in lengths:
        count *= each
    return count


def _learnt(
    model: nn.Module,
    groups: Sequence[Group],
    example: Any,
    observe: Callable[[nn.Module, Any], Seen],
    what: str,
) -> Quantity:
    from upop.pruning.axes.copies import Shapes

    with random_numbers_kept():
        shapes = Shapes(model, example)
        copied = shapes.copy()

        def run(lost: Sizes) -> Seen:
            going = [group for group in groups if lost.get(group.name)]
            undo = cut(copied, going, {group.name: range(group.size - lost[group.name]) for group in going}, fold=False)
            try:
                with shapes.running(), torch.no_grad():
                    return observe(copied, shapes.example)
            finally:
                restore(undo)

        quantity = _confirmed(groups, run, 0) or _confirmed(groups, run, 1)
    if quantity is None:
        raise LayoutError(
            f"The {what} of {type(model).__name__} cannot be predicted: its forward pass takes another path when "
            "layers are smaller. Give a target in params, or a ratio with cost='macs'."
        )
    return quantity


class _OtherwiseError(Exception):
    """The cut model runs other operations."""


def _confirmed(groups: Sequence[Group], run: Callable[[Sizes], Seen], least: int) -> Quantity | None:
    """Return the count of a forward, confirmed for the whole model and for an uneven cut.

    Args:
        groups: of the model.
        run: runs a forward with given numbers of pruned channels.
        least: pruned channels of every group in all runs, since a cut module may use other operations than a whole one.
    """
    moving = [group for group in groups if group.size > 1 + least]
    base = {group.name: min(least, group.size - 1) for group in groups}
    draw = random.Random(0)
    lost = {group.name: draw.randint(base[group.name], group.size - 1) for group in groups}
    try:
        quantity = Quantity(groups, _followed([group.name for group in moving], run, base))
        foretold = [quantity.whole, quantity.at({group.name: group.size - lost[group.name] for group in groups})]
        counted = [sum(formula(values) for formula, values in run(each)) for each in ({}, lost)]
    except _OtherwiseError:
        return None
    return quantity if foretold == counted else None


def _followed(groups: Sequence[str], run: Callable[[Sizes], Seen], base: Sizes) -> list[Term]:
    """Return the count of a forward, with the group of every length."""
    dense = [(formula, *tree_flatten(values)) for formula, values in run(base)]
    bits = max(1, (len(groups) - 1).bit_length())
    codes = {name: [at >> bit & 1 for bit in range(bits)] for at, name in enumerate(groups)}
    halves = [[name for name in groups if codes[name][bit] == side] for bit in range(bits) for side in (0, 1)]
    deltas = [_deltas(dense, run(_more(base, half))) for half in halves]
    places = [(at, place) for at, (_, values, _) in enumerate(dense) for place in range(len(values))]
    steps: dict[tuple[int, int], tuple[tuple[str, int], ...]] = {}
    unclear: dict[tuple[int, int], list[str]] = {}
    for key in places:
        pairs = [(deltas[2 * bit].get(key, 0), deltas[2 * bit + 1].get(key, 0)) for bit in range(bits)]
        if not any(map(any, pairs)):
            continue
        described = [name for name in groups if all(pair[side] for pair, side in zip(pairs, codes[name], strict=True))]
        if len(described) == 1 and all(0 in pair and sum(pair) == sum(pairs[0]) for pair in pairs):
            steps[key] = ((described[0], sum(pairs[0])),)
        else:  # several groups lie in it, side by side
            unclear[key] = described
    alone = {name: _deltas(dense, run(_more(base, [name]))) for name in dict.fromkeys(chain(*unclear.values()))}
    for key, names in unclear.items():
        steps[key] = tuple((name, alone[name][key]) for name in names if key in alone[name])
    return [
        Term(
            formula, tuple(_length(value, steps.get((at, place), ()), base) for place, value in enumerate(values)), form
        )
        for at, (formula, values, form) in enumerate(dense)
    ]


def _more(base: Sizes, groups: Iterable[str]) -> Sizes:
    return {**base, **{name: base[name] + 1 for name in groups}}


def _length(value: Any, steps: tuple[tuple[str, int], ...], base: Sizes) -> Any:
    return Length(value + sum(step * base[name] for name, step in steps), steps) if steps else value


def _deltas(dense: Sequence[tuple[Any, list[Any], TreeSpec]], seen: Seen) -> dict[tuple[int, int], int]:
    """Return how much each integer of a run is smaller than in the first run, by position."""
    if len(seen) != len(dense):
        raise _OtherwiseError
    found = {}
    for at, ((formula, values, form), (other, given)) in enumerate(zip(dense, seen, strict=True)):
        now, now_form = tree_flatten(given)
        if formula is not other or form != now_form:
            raise _OtherwiseError
        for place, (before, after) in enumerate(zip(values, now, strict=True)):
            if type(before) is int and before != after:
                found[at, place] = before - after
    return found
