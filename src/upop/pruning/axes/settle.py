"""Finds sizes that modules store (head counts, widths) and that a cut must update.

A copy on fake tensors is cut and run. The first operation whose shape differs from the prediction of the dense trace
points to a module with a stored size. Its integers are updated one at a time, then in pairs; an update is kept if the
run gets further.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from upop.pruning.again import snapshot
from upop.pruning.axes.axis import Axis, Dim, axes_in
from upop.pruning.axes.candidates import Candidate
from upop.pruning.axes.copies import Shapes, message_of
from upop.pruning.axes.idle import Idle, resting
from upop.pruning.axes.label import Step
from upop.pruning.axes.mode import Mode, kept_by, name_of, tensors_in
from upop.pruning.axes.multihead import narrow_multihead
from upop.pruning.axes.narrow import WIDTHS, Narrow, narrow_class, numbers_of
from upop.pruning.axes.trace import Trace, inside_modules
from upop.pruning.costs import call
from upop.pruning.groups import Attribute, Swap, Swapped, around
from upop.pruning.shrink import Assignment, cut, restore

NARROW, MULTIHEAD = "widths", "multihead"
SWAPS: dict[str, Swapped] = {NARROW: narrow_class, MULTIHEAD: narrow_multihead}
"""How a module's class becomes one that can be cut, by the name under which groups write it down."""
_LEVELS = 3
"""How many modules around an operation may keep the number that it takes: the one that runs, and those around it."""
_MOST_TRIED = 8
_ASIDE = 8
"""How many groups in a row keep different shares: what one of them keeps is not mistaken for another's number."""
_FEW = 8
"""Longest list that a module may keep its numbers in."""
_NEAR = 3
"""How many operations further on the one may be that a call was made for: a reshape first copies."""
_KINDS = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), "view"),
    "expand": "expand",
    **dict.fromkeys(("split", "split_with_sizes", "slice", "unsafe_split", "split_with_sizes_copy"), "part"),
}
COPIES = {"clone", "_to_copy", "contiguous", "detach", "alias", "lift_fresh"}
"""Whether a tensor is copied depends on how it lies in memory, which a cut may change."""


class _Off(BaseException):
    """Ends a run that deviates; a BaseException, so that no `except Exception` in a forward catches it."""


@dataclass(frozen=True)
class Stop:
    """Where a cut model deviates from the dense trace.

    Attributes:
        at: number of operations that matched.
        reason: the error, or the unexpected shape.
    """

    at: int
    reason: str


class _Follower(Mode):
    """Compares the shapes of a run with those predicted from the dense trace."""

    def __init__(self, steps: list[Step], sizes: Mapping[Axis, int], skipped: frozenset[str], last: int) -> None:
        super().__init__()
        self._steps, self._sizes, self._skipped, self._last = steps, sizes, skipped, last
        self.at = 0
        self.off = ""
        self.stack = [""]

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and compare its outputs."""
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        name = plain_name(name_of(func))
        if not outputs or name in COPIES or self._rests(self.stack[-1]):
            return result
        self.go_on()
        if self.at > self._last:
            raise _Off
        shapes = tuple(tuple(each.shape) for each in outputs)
        if self.at >= len(self._steps):
            self.off = f"it goes on with {name}"
            raise _Off
        step = self._steps[self.at]
        expected = tuple(
            shape if dims is None else tuple(now(dim, self._sizes) for dim in dims)
            for shape, dims in zip(shapes, step.dims, strict=False)
        )
        if name != plain_name(step.name) or list(map(_long, shapes)) != list(map(_long, expected)):
            self.off = f"{name} gives {shapes}, where {step.name} should give {expected}"
            raise _Off
        self.at += 1
        return result

    def go_on(self) -> None:
        """Skip to the next operation that is compared."""
        while self.at < len(self._steps) and (
            self._rests(self._steps[self.at].module) or plain_name(self._steps[self.at].name) in COPIES
        ):
            self.at += 1

    def _rests(self, module: str) -> bool:
        return any(module == path or module.startswith(f"{path}.") for path in self._skipped)


def plain_name(name: str) -> str:
    """Return the name of an operation; all kinds of views count as one."""
    return "view" if _KINDS.get(name) == "view" else name


def _long(shape: Sequence[int]) -> list[int]:
    """Return the lengths above 1, sorted, since some operations move dimensions past those of length 1."""
    return sorted(size for size in shape if size != 1)


def now(dim: Dim, sizes: Mapping[Axis, int]) -> int:
    """Return the length of a dimension for given axis sizes."""
    return math.prod(_now(factor, sizes) if isinstance(factor, Axis) else factor for factor in dim)


def _now(axis: Axis, sizes: Mapping[Axis, int]) -> int:
    root = axis.root
    if not root.parts:
        return sizes.get(root, root.size)
    return (sum if root.joined == "row" else math.prod)(_now(part, sizes) for part in root.parts)


def smaller(candidates: Iterable[Candidate]) -> dict[str, tuple[int, ...]]:
    """Return channels to keep per group: at most two thirds, with a distinct number and share for each group."""
    plan: dict[str, tuple[int, ...]] = {}
    beside, shares = Counter[int](), deque[Fraction](maxlen=_ASIDE)
    for each in candidates:
        size = each.group.size
        kept = max(1, size - max(1, round(size / 3)) - beside[size] % max(1, size // 3))
        beside[size] += 1
        kept = next((less for less in range(kept, 0, -1) if Fraction(less, size) not in shares), kept)
        shares.append(Fraction(kept, size))
        plan[each.group.name] = tuple(range(size - kept, size))
    return plan


class Trials:
    """Runs trials: cuts a copy on fake tensors, and runs it as far as the cut can matter.

    Args:
        shapes: makes copies on fake tensors.
        trace: of the dense model.
        still: modules to stub, with their outputs (see `kinds`).
        candidates: a run ends behind the last operation that carries one of their axes. Without candidates, each trial
            runs a fresh copy to the end.
    """

    def __init__(
        self,
        shapes: Shapes,
        trace: Trace,
        still: Mapping[str, Sequence[Any]] | None = None,
        candidates: Iterable[Candidate] = (),
    ) -> None:
        self.trace, self._shapes = trace, shapes
        carrying = [at for each in candidates for at in trace.carrying.get(each.axis.root, ())]
        self._last = max(carrying, default=len(trace.steps))
        self._again = shapes.copy() if carrying else None
        self._last_cut: tuple[Any, list[Assignment]] = None, []
        self._idle = [Idle(path, gave, shapes.mode) for path, gave in (still or {}).items()]

    def stop(self, candidates: list[Candidate]) -> Stop | None:
        """Cut the copy and run it; return where it deviates, or None."""
        plan = smaller(candidates)
        sizes = {each.axis.root: len(plan[each.group.name]) for each in candidates}
        swaps = (swap for each in candidates for swap in each.group.swaps if not issubclass(swap.kind, Narrow))
        skipped = frozenset((*(each.path for each in self._idle), *(swap.module for swap in swaps)))
        follower = _Follower(self.trace.steps, sizes, skipped, self._last)
        model = self._shapes.copy() if self._again is None else self._again
        for each in self._idle:
            each.start(torch.float32)
        with _put_back(model), resting(model, self._idle):
            undo = self._cut(model, candidates, plan)
            undo_numbers = cut(model, [replace(each.group, slices=()) for each in candidates], plan, fold=False)
            try:
                with self._shapes.running(), torch.no_grad(), inside_modules(model, follower.stack), follower:
                    call(model, self._shapes.example)
            except _Off:
                pass
            except Exception as error:
                follower.go_on()
                follower.off = follower.off or message_of(error)
            finally:
                restore(undo_numbers)
                self._last_cut = self._last_cut[0], [edit.apply() for edit in reversed(undo)][::-1]
        return Stop(follower.at, follower.off) if follower.off else None

    def _cut(
        self, model: nn.Module, candidates: list[Candidate], plan: Mapping[str, Sequence[int]]
    ) -> list[Assignment]:
        """Cut the tensors alone; return the edits that take it back.

        Most trials differ in the numbers that modules keep, and cut the same tensors, which are made once.
        """
        groups = [replace(each.group, attributes=(), swaps=()) for each in candidates]
        key, again = self._last_cut
        if key == groups and self._again is not None and self._shapes.mode is not None:
            return [edit.apply() for edit in again]
        self._last_cut = groups, []
        # All copies without numbers hold the same parameters.
        return cut(model, groups, plan, fold=False, anew=True)


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Restore the state of a copy after a run."""
    put_back = snapshot(model)
    numbers = [(each, each.clone()) for each in model.buffers() if not isinstance(each, FakeTensor)]
    try:
        yield
    finally:
        put_back()
        for buffer, before in numbers:
            buffer.copy_(before)


@dataclass(frozen=True)
class _Remedy:
    """A possible fix: stored numbers to update, each for some candidates, and classes to swap."""

    attributes: tuple[tuple[Attribute, tuple[Candidate, ...]], ...] = ()
    swaps: tuple[Swap, ...] = ()


_Way = tuple[tuple[type[nn.Module], str], ...]
"""The classes of modules that a remedy concerns, with the names of their numbers, or of how their class is swapped."""


def _way(model: nn.Module, remedy: _Remedy) -> _Way:
    numbers = ((each.module, each.name) for each, _ in remedy.attributes)
    swaps = ((each.module, each.how) for each in remedy.swaps)
    return tuple((type(model.get_submodule(path)), name) for path, name in (*numbers, *swaps))


def settle(model: nn.Module, trials: Trials, candidates: list[Candidate]) -> tuple[list[Candidate], dict[str, str]]:
    """Find the stored sizes of every group; return the groups that can be cut, and why the others cannot."""
    lost: dict[str, str] = {}
    helped: set[_Way] = set()
    trace = trials.trace
    stop = trials.stop(candidates) if candidates else None
    while candidates and stop is not None:
        involved = _involved(trace, candidates, stop.at)
        ours = {each.group.name for each in involved}
        better, furthest, best = candidates, stop, None
        remedies = dict.fromkeys(_remedies(model, trace, involved, stop.at))  # some come twice
        usual = [each for each in remedies if _way(model, each) in helped]
        for remedy in dict.fromkeys((*usual, *remedies)):
            if better is not candidates and len(remedy.attributes) > 1 and not remedy.swaps:
                continue  # two numbers, where one alone helped
            tried = _with(model, candidates, remedy, involved)
            after = trials.stop(tried)
            if after is None or after.at > furthest.at:
                better, furthest, best = tried, after or Stop(len(trace.steps), ""), remedy
                if after is None or not ours & {each.group.name for each in _involved(trace, tried, after.at)}:
                    break  # of these groups, nothing more goes wrong
                if remedy in usual:
                    break  # what helped in a layer of the same classes was compared with the others there
        if best is not None:
            helped.add(_way(model, best))
        if better is not candidates:
            candidates, stop = better, furthest if furthest.reason else None
            continue
        line = trace.steps[min(stop.at, len(trace.steps) - 1)].line
        # Where the operation carries none of them, as in an assertion, it is those that do not run alone either.
        blamed = involved or [each for each in candidates if trials.stop([each]) is not None] or candidates
        for each in blamed:
            lost[each.group.name] = f"{line or 'its forward'} insists on a size: {stop.reason}"
        candidates = [each for each in candidates if each.group.name not in lost]
        stop = trials.stop(candidates) if candidates else None
    return candidates, lost


def _involved(trace: Trace, candidates: list[Candidate], at: int) -> list[Candidate]:
    """Return the candidates whose axes appear in the deviating operation, or in one shortly before."""
    by_axis = {each.axis.root: each for each in candidates}
    for step in itertools.chain(trace.steps[at : at + 1], reversed(trace.steps[max(0, at - 8) : at])):
        found = {
            leaf: by_axis[leaf]
            for dims in (*step.dims, step.given)
            for axis in axes_in(dims or ())
            for leaf in axis.leaves()
            if leaf in by_axis
        }
        if found:
            return list(found.values())
    return []


def _remedies(model: nn.Module, trace: Trace, involved: list[Candidate], at: int) -> Iterator[_Remedy]:
    if at >= len(trace.steps):
        return
    step = trace.steps[at]
    near = list(around(step.module))[:_LEVELS]
    numbers: dict[Attribute, tuple[Candidate, ...]] = {}
    for path in near:
        for name, value in kept_numbers(model.get_submodule(path)):
            for each in involved:
                number = Attribute(path, name, value // each.group.size)
                if value > 0 and value % each.group.size == 0 and number not in each.group.attributes:
                    numbers[number] = (*numbers.get(number, ()), each)
    tried = list(numbers.items())[:_MOST_TRIED]
    yield from (_Remedy((number,)) for number in tried)
    for _, alike in itertools.groupby(tried, lambda each: (each[0].module, each[0].name.split("[")[0])):
        ordered = sorted(alike, key=lambda each: -(each[0].factor or 0))
        yield _Remedy(tuple({each[0].name: each for each in ordered}.values()))  # each number is the longest axis's
    for _, alike in itertools.groupby(tried, lambda each: (each[0].module, each[0].name.split("[")[0], each[0].factor)):
        yield _Remedy(tuple(alike))  # equal numbers of one list
    for path in near:
        module = model.get_submodule(path)
        if path in trace.attending:
            of_a_head = ((Attribute(path, "head_dim"), tuple(involved)),)
            numbers_too = of_a_head if isinstance(module, nn.MultiheadAttention) else ()
            yield _Remedy(numbers_too, (Swap(path, narrow_multihead(type(module)), MULTIHEAD),))
        for after in trace.steps[at : at + _NEAR]:
            widths = tuple(_widths(after, path, involved))
            if widths:
                yield _Remedy(widths, (Swap(path, narrow_class(type(module)), NARROW),))
    alone = [(number, (each,)) for number, owners in tried for each in owners][:_MOST_TRIED]
    yield from map(_Remedy, itertools.combinations(alone, 2))
    yield from map(_Remedy, itertools.combinations(tried, 2))


def _widths(step: Step, path: str, involved: list[Candidate]) -> Iterator[tuple[Attribute, tuple[Candidate, ...]]]:
    """Yield the widths that a reshape, expand or split of a tensor with a group's axis may hard-code."""
    kind = _KINDS.get(step.name)
    dims, given = step.given if kind == "part" else step.dims[0], step.given
    if kind is None or dims is None or given is None:
        return
    for place, each in itertools.product(range(len(dims)), involved):
        whole, others = now(dims[place], {}), now(dims[place], {each.axis.root: 0})
        key = f"{len(dims)}.{place}.{whole}"
        if kind == "part" and 0 < others < whole:  # it lies beside other axes
            for at, out in enumerate(step.dims):
                piece = now(out[place], {}) if out is not None else 0
                if out is not None and piece and now(out[place], {each.axis.root: 0}) == 0:
                    piece_key = f"piece.{len(dims)}.{place}.{piece}.{at}.{len(step.dims)}"
                    yield Attribute(path, f"{WIDTHS}[{piece_key}]", piece // each.group.size), (each,)
        if others or whole == 1:
            continue
        if kind != "part":
            whence = [at for at, other in enumerate(given) if now(other, {each.axis.root: 0}) == 0]
            if kind == "expand":
                whence = [place - len(dims) + len(given)]
            if not whence or whence[0] < 0:
                continue
            key += f".{len(given)}.{whence[0]}.{now(given[whence[0]], {})}"
        yield Attribute(path, f"{WIDTHS}[{kind}.{key}]", whole // each.group.size), (each,)


def mistakable(trace: Trace, candidate: Candidate) -> list[int]:
    """Return kept sizes at which an uncut tensor could be mistaken for a cut one, where a forward hard-codes widths.

    These are one channel, and sizes at which the input of another call of the same kind has the cut width.
    """
    found: set[int] = set()
    size = candidate.group.size
    for attribute in candidate.group.attributes:
        if not attribute.name.startswith(WIDTHS):
            continue
        found.add(1)
        kind, *numbers = numbers_of(attribute.name[len(WIDTHS) + 1 : -1])
        rank, place, old = map(int, numbers[:3] if kind == "piece" else numbers[-3:])
        for step in trace.steps:
            if _KINDS.get(step.name) == kind and step.given is not None and len(step.given) == rank:
                length = now(step.given[place], {})
                if attribute.module in around(step.module) and length * size % old == 0:
                    found.add(length * size // old)
    return sorted(each for each in found if 0 < each < size)[:_MOST_TRIED]


def kept_numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield the integers that a module stores, with names for `number_of`."""
    for name, value in kept_by(module).items():
        yield from _numbers_in(name, value, 2)


def _numbers_in(name: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    if type(value) is int:
        yield name, value
    elif depth and type(value) in (list, tuple, torch.Size) and len(value) <= _FEW:
        for place, each in enumerate(value):
            yield from _numbers_in(f"{name}[{place}]", each, depth - 1)
    elif depth and type(value) is dict and len(value) <= _FEW:
        for key, each in value.items():
            if isinstance(key, str) and not set(key) & set("[]"):
                yield from _numbers_in(f"{name}[{key}]", each, depth - 1)


def _with(model: nn.Module, candidates: list[Candidate], remedy: _Remedy, involved: list[Candidate]) -> list[Candidate]:
    """Apply a remedy to the candidates that it concerns."""
    result = []
    for each in candidates:
        attributes, swaps = list(each.group.attributes), list(each.group.swaps)
        for attribute, owners in remedy.attributes:
            if each in owners:
                value = dict(kept_numbers(model.get_submodule(attribute.module))).get(attribute.name)
                assert attribute.factor is not None
                fits = value == attribute.factor * each.group.size or attribute.name.startswith(WIDTHS)
                if fits and attribute not in map(_plain, attributes):
                    attributes.append(attribute)
        if each in involved:
            swaps += [swap for swap in remedy.swaps if all(other.module != swap.module for other in swaps)]
        result.append(replace(each, group=replace(each.group, attributes=tuple(attributes), swaps=tuple(swaps))))
    return told_apart(result)


def told_apart(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return the candidates with widths under different names, where a module runs several of the same old width."""
    taken: set[tuple[str, str]] = set()

    def named(attribute: Attribute) -> Attribute:
        if attribute.name.startswith(WIDTHS):
            plain, place = _plain(attribute), 0
            while ((attribute := _numbered(plain, place)).module, attribute.name) in taken:
                place += 1
            taken.add((attribute.module, attribute.name))
        return attribute

    return [
        replace(each, group=replace(each.group, attributes=tuple(map(named, each.group.attributes))))
        for each in candidates
    ]


def _plain(attribute: Attribute) -> Attribute:
    return replace(attribute, name=re.sub(r"#\d+]$", "]", attribute.name))


def _numbered(attribute: Attribute, place: int) -> Attribute:
    return replace(attribute, name=f"{attribute.name[:-1]}#{place}]") if place else attribute
