"""Compares the outputs of two models up to rounding; the size of rounding is measured, never assumed.

A difference counts as rounding if it is at most a few times the difference of the same model with its sums in another
order. If a copy in float64 fits into memory, the cut is proved on that, where rounding is negligible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upop.pruning.again import buffers_kept, drawing_the_same
from upop.pruning.costs import call, evaluating
from upop.pruning.errors import VerificationError
from upop.pruning.groups import Group

Outputs = list[tuple[str, Tensor]]
"""The floating-point tensors that a call gave, each with its place."""

_TIMES = 4
"""A difference of so many times the measured rounding is allowed: one more sample of what was sampled a few times."""
_ORDERS = 4
"""In how many other orders sums are taken before a difference is refused."""
_ENDS, _ENDS_OF_PROVED, _LEAST = 4, 64, 1e-10
"""Differences of so many units in the last place need no measurement, nor do those of 1e-10 of the outputs."""
_AT_ONCE = 2**22
"""Elements that are compared at once: logits over a large vocabulary take as much memory as a model."""
_LARGE = 1e-5
"""What of the outputs may be rounding where weights are in float64: a forward may compute in float32 all the same."""


def outputs_of(model: nn.Module, inputs: Any) -> Outputs:
    """Return every floating-point tensor in the model's outputs for `inputs`, with its path in them.

    Runs in evaluation mode, without gradients and without autocast, at full float32 precision; buffers stay as they
    are, and random numbers are the same at every call and left as they were.
    """
    precision = torch.get_float32_matmul_precision()
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    torch.set_float32_matmul_precision("highest")
    try:
        with ExitStack() as stack:
            for context in (evaluating(model), _unpatched(model), buffers_kept(model), drawing_the_same(device)):
                stack.enter_context(context)
            stack.enter_context(torch.autocast(device.type, enabled=False))
            return [(place, value.detach().clone()) for place, value in tensors_of(call(model, inputs))]
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def _unpatched(model: nn.Module) -> Iterator[None]:
    """Restore the original forwards that Accelerate wrapped for mixed precision."""
    modules: list[Any] = [module for module in model.modules() if "_original_forward" in vars(module)]
    patched = [(module, module.forward) for module in modules]
    for module in modules:
        module.forward = module._original_forward
    try:
        yield
    finally:
        for module, forward in patched:
            module.forward = forward


def tensors_of(value: Any, place: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield every floating-point tensor in a model's outputs, with its path in them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield place, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_of(part, f"{place}[{key!r}]")
    elif isinstance(value, tuple | list):
        for position, part in enumerate(value):
            yield from tensors_of(part, f"{place}[{position}]")
    elif is_dataclass(value):
        for part in fields(value):
            yield from tensors_of(getattr(value, part.name), f"{place}.{part.name}")


@dataclass(frozen=True)
class Difference:
    """The difference of one output, and the part that rounding explains, relative to its largest element."""

    place: str
    size: float
    explained: float


def compare(
    expected: Outputs,
    found: Outputs,
    rounding: Callable[[], Iterable[Sequence[float]]],
    *,
    dtype: torch.dtype | None = None,
    proved: bool = False,
) -> None:
    """Raise a `VerificationError` if two lists of outputs differ, or cannot be compared; see `difference`."""
    refuse_unlike(expected, found)
    off = difference(expected, found, rounding, dtype=dtype, proved=proved)
    if off is not None:
        next(iter(rounding()), None)  # says so where two calls of the same model do not agree either
        raise VerificationError(
            f"The cut model does not compute what the masked one does: {off.place} differs by "
            f"{off.size:.1e} of its largest element; rounding explains only {off.explained:.0e}. "
            "The model was left as it was. Exclude groups to find the one that is cut wrong, and please report it."
        )


def difference(
    expected: Outputs,
    found: Outputs,
    rounding: Callable[[], Iterable[Sequence[float]]],
    *,
    dtype: torch.dtype | None = None,
    proved: bool = False,
) -> Difference | None:
    """Return the worst difference between two lists of outputs, or None if rounding explains all.

    Args:
        expected: outputs of the masked model.
        found: outputs of the cut model.
        rounding: yields measurements of how much each output differs by rounding alone; it is used only if a
            difference exceeds a few units in the last place.
        dtype: precision of the weights, which may be lower than that of the outputs.
        proved: whether the cut was proved in higher precision, so that this check only covers its run in this one.
    """
    differences = [_difference(one, other) for (_, one), (_, other) in zip(expected, found, strict=True)]
    spread = [0.0] * len(differences)
    measured: Iterator[Sequence[float]] | None = None
    while True:
        allowed, mosts = [], []
        for (_, value), (_, scale), rounded in zip(expected, differences, spread, strict=True):
            end = max(torch.finfo(each).eps for each in (value.dtype, dtype) if each is not None)
            most = max(end**0.5, _LARGE) * scale  # above that, rounding would hide a wrong cut
            free = min(_ENDS_OF_PROVED * end * scale, most) if proved else max(_ENDS * end, _LEAST) * scale
            allowed.append(max(_TIMES * rounded, free) if proved else min(max(_TIMES * rounded, free), most))
            mosts.append(float("inf") if proved else most)
        worst = max(range(len(differences)), key=lambda at: differences[at][0] / max(allowed[at], 1e-300))
        size, scale = differences[worst]
        if size <= allowed[worst]:
            return None
        if size > mosts[worst]:  # whatever is measured
            return Difference(expected[worst][0], size / scale, mosts[worst] / scale)
        measured = iter(rounding()) if measured is None else measured
        more = next(measured, None)
        if more is None:
            return Difference(expected[worst][0], size / scale, allowed[worst] / scale)
        spread = [max(pair) for pair in zip(spread, more, strict=True)]


def narrowed(expected: Outputs, found: Outputs, groups: Iterable[Group], plan: Mapping[str, Sequence[int]]) -> Outputs:
    """Return masked outputs without those channels of residual streams that the cut outputs do not have: they are 0.

    A model may hand on what its parts gave, hidden states for one, beside its outputs.

    Args:
        expected: of the masked model.
        found: of the cut one.
        groups: that are cut.
        plan: what they keep.
    """
    streams = [group for group in groups if group.kind == "residual"]
    if not streams or len(expected) != len(found):
        return expected
    return [
        (place, _without(value, other, streams, plan))
        for (place, value), (_, other) in zip(expected, found, strict=True)
    ]


def _without(value: Tensor, cut: Tensor, streams: Sequence[Group], plan: Mapping[str, Sequence[int]]) -> Tensor:
    for group in streams if value.dim() == cut.dim() else ():
        kept = torch.tensor(list(plan[group.name]), dtype=torch.long, device=value.device)
        lost = torch.tensor(
            [each for each in range(group.size) if each not in set(plan[group.name])], device=value.device
        )
        for dim, sizes in enumerate(zip(value.shape, cut.shape, strict=True)):
            if sizes == (group.size, len(kept)) and len(lost) and not value.index_select(dim, lost).any():
                value = value.index_select(dim, kept)
    return value


def refuse_unlike(expected: Outputs, found: Outputs) -> None:
    """Raise a `VerificationError` if two lists of outputs cannot be compared elementwise."""
    if not any(value.numel() for _, value in expected):
        raise VerificationError(
            "The model returned no floating-point tensor to compare. Give verify= inputs for which it returns "
            "tensors, or a function: verify=lambda model: model.part(inputs)."
        )
    if [place for place, _ in expected] != [place for place, _ in found]:
        raise VerificationError(
            f"The model returned {len(expected)} output tensors with masks and {len(found)} after the cut. "
            "The model was left as it was."
        )
    if not any(_is_finite(value) or bool(value.isfinite().any()) for _, value in expected):
        raise VerificationError(
            "No output of the masked model is finite, so there is nothing to compare. Give verify= inputs for which "
            "its outputs are finite."
        )
    for (place, masked), (_, shrunk) in zip(expected, found, strict=True):
        if masked.shape != shrunk.shape:
            raise VerificationError(
                f"{place} has shape {tuple(masked.shape)} with masks, {tuple(shrunk.shape)} after the cut."
            )
        if _is_finite(masked) and _is_finite(shrunk):
            continue
        finite = masked.isfinite()
        if not torch.equal(masked[~finite].nan_to_num(), shrunk[~finite].nan_to_num()) or not bool(
            shrunk[finite].isfinite().all()
        ):
            raise VerificationError(
                f"{place} is infinite or NaN at other positions after the cut. The model was left as it was."
            )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite; a finite sum decides that at once."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Return the largest difference of two tensors, and the largest of the elements that differ, in float64."""
    if torch.equal(one, other):
        return 0.0, 0.0
    worst = []
    parts = (each.detach().flatten().split(_AT_ONCE) for each in (one, other))
    for a, b in zip(*parts, strict=True):
        alike = (a == b) | ~a.isfinite()  # masks of -inf or of the smallest number are the same in both
        a, b = (each.masked_fill(alike, 0).cpu().double() for each in (a, b))
        worst.append(torch.stack([(a - b).abs().max(), a.abs().maximum(b.abs()).max()]))
    size, scale = torch.stack(worst).amax(0).tolist()
    return size, scale


def refuse_unsteady(outputs: Outputs, again: Outputs) -> None:
    """Raise a `VerificationError` if two calls of the same model give different outputs."""
    for (place, one), (_, other) in zip(outputs, again, strict=True):
        size, scale = _difference(one, other)
        if size > torch.finfo(one.dtype).eps ** 0.5 * scale:
            raise VerificationError(
                f"Two calls of the model on the same inputs differ ({place} by "
                f"{size / scale:.1e} of its largest element): it draws random numbers in evaluation mode that "
                "torch.manual_seed does not fix, or keeps state between calls, so a cut cannot be verified. The model "
                "was left as it was. Give a function that calls a deterministic part, as example= or verify=: "
                "lambda model: model.part(inputs)."
            )


def rounding_of(run: Callable[[], Outputs], *, outputs: Outputs | None = None) -> Iterator[list[float]]:
    """Yield how much each output changes when products are summed in another random order, repeatedly.

    Args:
        run: returns the outputs of a call.
        outputs: its outputs so far; if a second call differs, rounding cannot be measured.

    Raises:
        VerificationError: two calls give different outputs.
    """
    from upop.pruning.axes.copies import written_out

    if outputs is not None:
        refuse_unsteady(outputs, run())
    with written_out():
        with _Lowered() as lowered:
            plain = run()
        least = [lowered.end * _largest(value) for _, value in plain]
        for seed in range(_ORDERS):
            with _OtherOrder(seed):
                other = run()
            yield [
                max(_difference(one, two)[0], end) for (_, one), (_, two), end in zip(plain, other, least, strict=True)
            ]


def _largest(tensor: Tensor) -> float:
    channels = tensor[tensor.isfinite()]
    return float(channels.abs().max()) if len(channels) else 0.0


class _Lowered(TorchDispatchMode):
    """Finds the lowest precision of intermediate results, whatever that of inputs and outputs.

    Attributes:
        end: its unit in the last place; 0 if no result is rounded.
    """

    end = 0.0

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        precise = min((_end(each) for each in tree_leaves(args) if _is_float(each)), default=1.0)
        ends = [_end(each) for each in tree_leaves(result) if _is_float(each)]
        self.end = max([self.end, *(end for end in ends if end > precise)])
        return result


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _end(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


class _OtherOrder(TorchDispatchMode):
    """Computes matrix products and convolutions as sums of two halves: the same function, rounded otherwise."""

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            return self._product(func, *args, **kwargs)
        if name in ("addmm", "baddbmm") and not kwargs:
            bias, one, other = args[:3]
            return bias + self._product(torch.matmul, one, other)
        if name == "linear":
            weight, *bias = args[1:]
            product = self._product(torch.matmul, args[0], weight.transpose(-1, -2))
            return product + bias[0] if bias and bias[0] is not None else product
        if name.startswith("_scaled_dot_product") and not name.endswith("backward"):
            order = self._order(args[0].shape[-1], args[0].device)
            return func(*(each.index_select(-1, order) for each in args[:2]), *args[2:], **kwargs)
        if name == "convolution" and args[8] == 1 and not args[6]:
            order = self._order(args[1].shape[1], args[0].device)
            return func(args[0].index_select(1, order), args[1].index_select(1, order), *args[2:], **kwargs)
        return func(*args, **kwargs)

    def _order(self, size: int, device: torch.device) -> Tensor:
        return torch.randperm(size, generator=self._draws, device="cpu").to(device)

    def _product(self, product: Any, one: Tensor, other: Tensor, **kwargs: Any) -> Tensor:
        """Return a product [..., n] x [n, ...] as the sum over two random halves of n."""
        order = self._order(one.shape[-1], one.device)
        parts = [
            product(one.index_select(-1, half), other.index_select(-2, half), **kwargs)
            for half in order.tensor_split(2)
            if len(half)
        ]
        found: Tensor = parts[0] if parts else product(one, other, **kwargs)
        return found + parts[1] if len(parts) > 1 else found
