"""Labelled axes: what each dimension of a tensor is composed of, and which axes must be cut together.

A dimension is a row-major list of factors. A factor is either an `Axis`, which starts as a dimension of a parameter or
a part of one, or a plain number (tokens, batches, constants). Operations unite the axes that they tie together. A
reshape turns an axis into a product of axes; slicing and concatenation turn it into a row of parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

Dim = tuple["Axis | int", ...]
"""The factors of one dimension, outermost first; a dimension of size 1 has none."""


_doing = [""]


@contextmanager
def doing(operation: str, line: str) -> Iterator[None]:
    """Record the operation and the source line for every axis that is fixed inside this context."""
    _doing.append(f" ({operation} in {line})" if line else "")
    try:
        yield
    finally:
        _doing.pop()


class Axis:
    """One axis, or a set of axes that were found to be one (union-find).

    Attributes:
        size: its length.
        parts: the smaller axes that it was split into; empty if it is whole.
        joined: how the parts form the axis: nested ("product") or one after the other ("row").
        fixed: why it cannot be cut; None where it can.
        barred: why it cannot be cut as a residual stream either, whose norms can be masked; None where it can.
        marks: its uses, any of "dimension" (contracted between activations), "head" (a batch of such a product),
            "attends" (what such a product made was summed with values), "residual" (a stream that blocks add to),
            "bent" (gated, or not in proportion any more to what made it, where a weight sums over it).
    """

    def __init__(self, size: int, parts: Sequence[Axis] = (), joined: Literal["product", "row"] = "product") -> None:
        self.size, self.parts, self.joined = size, tuple(parts), joined
        self.fixed: str | None = None
        self.barred: str | None = None
        self.marks: set[str] = set()
        self.row: tuple[Axis, ...] = ()  # of a number of parts: the parts that it tells apart
        self._united: Axis | None = None

    @property
    def root(self) -> Axis:
        """The representative of the set of united axes."""
        axis = self
        while axis._united is not None:
            axis = axis._united
        if axis is not self:
            self._united = axis
        return axis

    def factors(self) -> Iterator[Axis]:
        """Yield the axes whose product this axis is, outermost first; the axis itself if it is no product."""
        root = self.root
        if root.parts and root.joined == "product":
            for part in root.parts:
                yield from part.factors()
        else:
            yield root

    def leaves(self) -> Iterator[Axis]:
        """Yield the parts that are not split further."""
        root = self.root
        if not root.parts:
            yield root
        for part in root.parts:
            yield from part.leaves()

    def fix(self, reason: str, *, bars: bool = True) -> None:
        """Exclude the axis and its parts from pruning; the first reason is kept, with its operation and line.

        Args:
            reason: in words.
            bars: whether it cannot be cut as a residual stream either.
        """
        for leaf in self.leaves():
            leaf.fixed = leaf.fixed or reason + _doing[-1]
            if bars:
                leaf.barred = leaf.barred or reason + _doing[-1]

    def mark(self, mark: str) -> None:
        """Add a mark to all parts."""
        for leaf in self.leaves():
            leaf.marks.add(mark)

    def refine(self, sizes: Sequence[int], joined: Literal["product", "row"]) -> None:
        """Split a whole axis into parts of these sizes."""
        root = self.root
        assert not root.parts
        root.parts, root.joined = tuple(Axis(size) for size in sizes), joined
        for part in root.parts:
            part.fixed, part.barred, part.marks = root.fixed, root.barred, set(root.marks)

    def channels(self, of: Axis) -> Tensor:
        """Return the channel of the axis `of` at each position, [size], int64; -1 where there is none."""
        root = self.root
        if root is of:
            return torch.arange(self.size)
        if not root.parts:
            return torch.full((self.size,), -1)
        found = [part.channels(of) for part in root.parts]
        if root.joined == "row":
            return torch.cat(found)
        result = torch.full([len(part) for part in found], -1)
        for place, part in enumerate(found):
            if (part >= 0).any():
                shape = [-1 if each == place else 1 for each in range(len(found))]
                result = torch.where(part.view(shape) >= 0, part.view(shape), result)
        return result.flatten()


def factors_of(dim: Dim) -> list[Axis | int]:
    """Return the current factors of a dimension, without those of size 1."""
    found: list[Axis | int] = []
    for factor in dim:
        found += factor.factors() if isinstance(factor, Axis) else [factor]
    return [factor for factor in found if size_of(factor) != 1]


def dim_of(size: int) -> Dim:
    """Return a dimension of plain numbers."""
    return (size,) if size != 1 else ()


def size_of(factor: Axis | int) -> int:
    """Return the length of a factor."""
    return factor.size if isinstance(factor, Axis) else factor


def length(dim: Dim) -> int:
    """Return the length of a dimension."""
    return math.prod(map(size_of, dim))


def axes_in(dims: Iterable[Dim]) -> Iterator[Axis]:
    """Yield the axes among the factors of the dimensions."""
    for dim in dims:
        for factor in dim:
            if isinstance(factor, Axis):
                yield factor


def leaves_of(dims: Iterable[Dim]) -> set[Axis]:
    """Return the parts that are not split further of all axes among the factors."""
    return {leaf for axis in axes_in(dims) for leaf in axis.leaves()}


def fix(dim: Dim, reason: str, *, bars: bool = True) -> None:
    """Exclude every axis of a dimension from pruning; see `Axis.fix`."""
    for axis in axes_in([dim]):
        axis.fix(reason, bars=bars)


def split(factor: Axis | int, outer: int) -> tuple[Axis | int, Axis | int] | None:
    """Split a factor into an outer one of size `outer` and an inner one; None if it does not divide that way."""
    size = size_of(factor)
    if size % outer:
        return None
    if not isinstance(factor, Axis):
        return outer, size // outer
    root = factor.root
    if not root.parts:
        root.refine((outer, size // outer), "product")
    if root.joined == "row":
        _turn_row_into_product(root, outer)
    if root.joined == "product" and len(root.parts) == 2 and root.parts[0].size == outer:
        return root.parts[0], root.parts[1]
    return None


def _turn_row_into_product(root: Axis, outer: int) -> None:
    """Turn a row of equal parts into a product, which couples equal channels of all parts."""
    if len(root.parts) != outer or len({part.size for part in root.parts}) > 1:
        return
    row = first, *others = root.parts
    for other in others:
        unite(first, other)
    number = Axis(outer)
    number.fix("its parts are told apart by their places")
    number.row = row
    root.parts, root.joined = (number, first), "product"


def regroup(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """Return the dimensions after a reshape of `dims` to `sizes`; axes that it splits unevenly are fixed."""
    rest = [factor for dim in dims for factor in factors_of(dim)]
    if 0 in sizes:
        return [(size,) for size in sizes]
    wanted = list(sizes)
    found: list[Dim] = []
    while wanted:
        size = wanted.pop(0)
        taken: list[Axis | int] = []
        left = size
        while left > 1 and rest:
            factor = rest.pop(0)
            whole = size_of(factor)
            if left % whole == 0:
                taken.append(factor)
                left //= whole
                continue
            parts = split(factor, left)
            if parts is None:
                found += _lost([*taken, factor], rest, size, wanted)
                break
            taken.append(parts[0])
            rest.insert(0, parts[1])
            left = 1
        else:
            found.append(tuple(taken))
    return found


def _lost(factors: list[Axis | int], rest: list[Axis | int], size: int, wanted: list[int]) -> list[Dim]:
    """Return plain dimensions from `size` up to the next place where old and new dimensions both end."""
    found, have, made = [size], math.prod(map(size_of, factors)), size
    while have != made:
        if have < made:
            factors.append(rest.pop(0))
            have *= size_of(factors[-1])
        else:
            found.append(wanted.pop(0))
            made *= found[-1]
    fix(tuple(factors), "a reshape cuts it in the middle")
    return list(map(dim_of, found))


def unite(one: Axis, other: Axis) -> None:
    """Unite two axes of the same size."""
    a, b = one.root, other.root
    if a is b:
        return
    if a.parts and b.parts:
        _unite_parts(a, b)
        return
    if b.parts:
        a, b = b, a
    reason, bar, marks = b.fixed, b.barred, b.marks
    b._united = a
    if reason:
        for leaf in a.leaves():
            leaf.fixed, leaf.barred = leaf.fixed or reason, leaf.barred or bar
    for mark in marks:
        a.mark(mark)


def _unite_parts(a: Axis, b: Axis) -> None:
    if a.joined == "product" and b.joined == "product":
        b_parts = b.parts
        tie(tuple(a.factors()), tuple(x for part in b_parts for x in part.factors()), "axes of other parts meet")
        return
    if a.joined == "row" and b.joined == "row":
        ends_a, ends_b = _ends(a), _ends(b)
        if ends_a != ends_b:
            _cut_row(a, ends_b)
            _cut_row(b, ends_a)
        if _ends(a) == _ends(b):
            for x, y in zip(a.parts, b.parts, strict=True):
                unite(x, y)
            b._united = a
            return
    else:
        row, product = (a, b) if a.joined == "row" else (b, a)
        _turn_row_into_product(row, product.parts[0].size)
        if row.joined == "product":
            _unite_parts(row, product)
            return
    for axis in (a, b):
        axis.fix("it meets an axis that has other parts")


def _ends(row: Axis) -> list[int]:
    return list(accumulate(part.size for part in row.parts))


def _cut_row(row: Axis, ends: Sequence[int]) -> None:
    """Split the whole parts of a row at the positions in `ends`."""
    parts: list[Axis] = []
    start = 0
    for part in row.parts:
        inside = [end - start for end in ends if start < end < start + part.size]
        if inside and not part.root.parts:
            places = [0, *inside, part.size]
            part.refine([b - a for a, b in pairwise(places)], "row")
        if part.root.parts and part.root.joined == "row":
            parts += part.root.parts
        else:
            parts.append(part)
        start += part.size
    row.parts = tuple(parts)


def tie(one: Dim, other: Dim, reason: str) -> None:
    """Tie two dimensions of equal length: their axes unite, and an axis that meets a plain number is fixed."""
    first, second = factors_of(one), factors_of(other)
    while first and second:
        a, b = first.pop(0), second.pop(0)
        if size_of(a) != size_of(b):
            large, small = (a, b) if size_of(a) > size_of(b) else (b, a)
            rest = first if large is a else second
            parts = split(large, size_of(small))
            if parts is None:
                for factor in (a, b, *first, *second):
                    fix((factor,), "it meets an axis that has other parts")
                return
            rest.insert(0, parts[1])
            a, b = parts[0], small
        if isinstance(a, Axis) and isinstance(b, Axis):
            unite(a, b)
        else:
            fix((a, b), reason)


def cut_out(dim: Dim, start: int, stop: int) -> Dim:
    """Return the factors of a slice of a dimension."""
    size = length(dim)
    if (start, stop) == (0, size):
        return dim
    factors = factors_of(dim)
    if stop - start <= 0:
        return (0,)
    if not factors:
        return ()
    first = factors[0]
    inner = size // size_of(first)
    if len(factors) > 1:
        if start % inner or stop % inner:
            fix(dim, "a slice cuts it in the middle")
            return dim_of(stop - start)
        return (*cut_out((first,), start // inner, stop // inner), *factors[1:])
    if not isinstance(first, Axis):
        return dim_of(stop - start)
    root = first.root
    if not root.parts:
        places = sorted({0, start, stop, size})
        root.refine([b - a for a, b in pairwise(places)], "row")
    _cut_row(root, [start, stop])
    ends = [0, *_ends(root)]
    if start in ends and stop in ends:
        inside = root.parts[ends.index(start) : ends.index(stop)]
        if len(inside) == 1:
            return (inside[0],)
        return (Axis(stop - start, inside, "row"),)
    fix(dim, "a slice cuts it in the middle")
    return (stop - start,)


def concatenate(dims: Sequence[Dim]) -> Dim:
    """Return the factors of a concatenation along dimensions."""
    dims = [dim for dim in dims if length(dim)]
    if len(dims) == 1:
        return dims[0]
    if not any(axes_in(dims)):
        return (sum(map(length, dims)),)
    parts: list[Axis] = []
    common: list[Axis | int] = []
    lists = [factors_of(dim) for dim in dims]
    while max(map(len, lists)) > 1 and all(factors and factors[-1] == lists[0][-1] for factors in lists):
        common.insert(0, lists[0][-1])  # it lies inside all of them
        lists = [factors[:-1] for factors in lists]
    for factors in lists:
        made = [factor if isinstance(factor, Axis) else _plain(factor) for factor in factors] or [Axis(1)]
        parts.append(made[0] if len(made) == 1 else Axis(length(tuple(factors)), made, "product"))
    return (Axis(sum(part.size for part in parts), parts, "row"), *common)


def _plain(size: int) -> Axis:
    axis = Axis(size)
    axis.fix("it lies beside something that is no axis")
    return axis
