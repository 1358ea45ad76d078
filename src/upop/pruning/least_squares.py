"""Ridge regression from rows or from their second moments, whichever takes less memory and time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from upop.pruning.sharded import many_processes

PARTS = 2
_CHUNK = 4096
"""Rows that are multiplied at a time, so that few of them are held in full precision at once."""
_MANY = 512
"""Rows of each part, by their weights, with which one part alone tells ridges apart."""
_BLOCKS, _BLOCK = 8, 256
"""Blocks of columns in which products are made, and the smallest one: what is smaller is slower than its other half."""
_ENOUGH = 1e-2
"""What rounding may do to a solution: `size / ridge` bounds the condition number, as ridges are shares of the mean."""


class Squares:
    """Problems given by second moments: D minimises `sum |y - x D|^2 + r |D|^2`, for each part and for both.

    Args:
        moments: of x, of ones (for a bias), and of the pruned inputs g, in this order, [PARTS, n, n].
        inputs: how many of the n belong to x, which the ridge penalises; the bias is free.
    """

    def __init__(self, moments: Tensor, inputs: int) -> None:
        self._moments, self._inputs = moments, inputs

    def trial(self, lost: Tensor, *, bias: bool) -> Trial:
        """Return the trial that measures how much changes reduce the error.

        Args:
            lost: weights of the pruned inputs, [pruned, outputs]: y is their product with g.
            bias: whether to fit a bias as well.
        """
        size, after = self._inputs + bias, self._inputs + 1
        shared = self._moments[:, :size, after:].to(lost) @ lost
        nothing = (lost * (self._moments[:, after:, after:].to(lost) @ lost)).sum((1, 2))

        def gain(ridge: float, part: int) -> Tensor:
            other = PARTS - 1 - part
            change = _solved(self._held(self._moments[other, :size, :size].to(lost, copy=True), ridge), shared[other])
            return (change * (self._moments[part, :size, :size].to(lost) @ change - 2 * shared[part])).sum()

        many = bool((self._moments[:, self._inputs, self._inputs] >= _MANY).all())
        return Trial(nothing, gain, enough=1 if many else PARTS)

    def solve(self, lost: Tensor, ridge: float, *, bias: bool) -> Tensor:
        """Return D of both parts, [inputs (+ 1), outputs], for r as a share of the mean square of an input.

        It is NaN where the problem is singular.
        """
        size, after = self._inputs + bias, self._inputs + 1
        shared = self._moments[:, :size, after:].sum(0).to(lost) @ lost
        return _solved(self._held(self._moments[:, :size, :size].sum(0).to(lost), ridge), shared)

    def _held(self, squares: Tensor, ridge: float) -> Tensor:
        diagonal = squares.diagonal()[: self._inputs]
        diagonal += ridge * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
        return squares


class Rows:
    """The same problems given by fewer rows than inputs; solved with one unknown per row.

    Args:
        rows: x, ones and g, [rows, n], each multiplied by the root of its weight; the first part comes first.
        inputs: how many of the n belong to x.
        first: number of rows in the first part.
    """

    def __init__(self, rows: Tensor, inputs: int, first: int) -> None:
        self._rows, self._ones, self._missed = rows[:, :inputs], rows[:, inputs], rows[:, inputs + 1 :]
        self._parts = [slice(0, first), slice(first, len(rows))]
        self._products = _gram(self._rows.t()) if len(rows) else rows.new_zeros(0, 0)

    def trial(self, lost: Tensor, *, bias: bool) -> Trial:
        """Return the trial that measures how much changes reduce the error; see `Squares.trial`."""
        aims = self._missed.to(lost) @ lost
        nothing = torch.stack([aims[part].square().sum() for part in self._parts])

        def gain(ridge: float, part: int) -> Tensor:
            ours, other = self._parts[part], self._parts[PARTS - 1 - part]
            change, level = self._solved(other, aims[other], ridge, bias)
            made = self._products[ours, other].to(lost) @ change + self._ones[ours].to(lost).outer(level)
            return (made * (made - 2 * aims[ours])).sum()

        return Trial(nothing, gain, enough=PARTS)

    def solve(self, lost: Tensor, ridge: float, *, bias: bool) -> Tensor:
        """Return D of both parts; see `Squares.solve`."""
        change, level = self._solved(slice(None), self._missed.to(lost) @ lost, ridge, bias)
        found = self._rows.to(lost).t() @ change
        return torch.cat([found, level.unsqueeze(0)]) if bias else found

    def _solved(self, part: slice, aims: Tensor, ridge: float, bias: bool) -> tuple[Tensor, Tensor]:
        """Return the C of `D = x^T C`, [rows, outputs], and the change of the bias, [outputs]."""
        held = self._products[part, part].to(aims, copy=True)
        force = ridge * (held.trace() / self._rows.shape[1]).clamp_min(torch.finfo(torch.float32).tiny)
        if not bias:
            held.diagonal().add_(force)
            return _solved(held, aims), aims.new_zeros(aims.shape[1])
        # Both the rows and the aims without their weighted means, which are multiples of `ones`.
        ones = self._ones[part].to(aims)
        group = ones / ones.square().sum().clamp_min(1e-30)
        means, products = group @ aims, held @ group
        held -= ones.outer(products) + products.outer(ones) - ones.outer(ones) * (group @ products)
        held.diagonal().add_(force)
        change = _solved(held, aims - ones.outer(means))
        change -= group.outer(ones @ change)
        return change, means - products @ change


@dataclass(frozen=True)
class Trial:
    """The error of changes that were fitted on one part of the rows, on the other part.

    Attributes:
        nothing: the sum of `|y|^2` in each part, [PARTS].
        gain: (ridge, part) -> the change of the sum of `|y - x D|^2` in this part, for D fitted on the other; negative
            if D helps.
        enough: number of parts needed to compare ridges: one, if there are many rows.
    """

    nothing: Tensor
    gain: Callable[[float, int], Tensor]
    enough: int


def _gram(rows: Tensor, total: Tensor | None = None) -> Tensor:
    """Add `rows^T rows`, [n, n], to `total`; only one triangle is computed, and mirrored.

    Args:
        rows: [count, n].
        total: symmetric, [n, n]; it is changed.
    """
    size = rows.shape[1]
    total = rows.new_zeros(size, size) if total is None else total
    step = max(_BLOCK, -(-size // _BLOCKS))
    for begin in range(0, size, step):
        end = min(begin + step, size)
        total[begin:end, begin:].addmm_(rows[:, begin:end].t(), rows[:, begin:])
    for begin in range(step, size, step):
        total[begin : begin + step, :begin] = total[:begin, begin : begin + step].t()
    return total


def _solved(held: Tensor, shared: Tensor) -> Tensor:
    """Return `held^-1 shared` for a symmetric `held`, which is overwritten."""
    factor, failed = torch.linalg.cholesky_ex(held)
    del held
    found = torch.cholesky_solve(shared, factor)
    return torch.where(failed == 0, found, torch.nan)


def precision(size: int, ridge: float, given: torch.dtype) -> torch.dtype:
    """Return the precision for a problem of `size` unknowns: float32 if that is accurate enough."""
    enough = size / ridge * torch.finfo(torch.float32).eps < _ENOUGH
    return torch.float32 if enough and given != torch.float64 else torch.float64


class ConsumerInputs:
    """The inputs of a layer, in two parts: raw rows, or their second moments if these are smaller.

    Args:
        width: number of inputs of the layer, n.
        dtype: precision of the moments.
        home: device to keep them on; None keeps them where they are.
    """

    def __init__(self, width: int, dtype: torch.dtype, home: torch.device | None = None) -> None:
        self._width, self._dtype, self._home = width, dtype, home
        self._rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(PARTS)]
        self._moments: Tensor | None = None
        self._bytes = 0

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors held."""
        yield from (rows for part in self._rows for rows, _ in part)
        if self._moments is not None:
            yield self._moments

    def add(self, rows: Tensor, weights: Tensor, part: int) -> None:
        """Add rows [count, n] of one part, with their weights [count].

        If any row is not finite, none of these rows is added.
        """
        finite = rows.isfinite().all()
        rows, weights = torch.where(finite, rows, 0.0), torch.where(finite, weights, 0.0)
        if self._moments is None and self._bytes + rows.nbytes > moments_bytes(self._width, self._dtype):
            self._fold(rows.device)
        if self._moments is None:
            home = self._home or rows.device
            self._rows[part].append((rows.to(home), weights.to(home)))
            self._bytes += rows.nbytes
        else:
            self._add_products(rows, weights, part)

    def _fold(self, device: torch.device) -> None:
        """Replace the rows by their moments, computed on `device`."""
        held, self._rows = self._rows, [[] for _ in range(PARTS)]
        size = self._width + 1
        self._moments = torch.zeros(PARTS, size, size, dtype=self._dtype, device=self._home or device)
        for part, several in enumerate(held):
            for rows, weights in several:
                self._add_products(rows.to(device), weights.to(device), part)

    def _add_products(self, rows: Tensor, weights: Tensor, part: int) -> None:
        assert self._moments is not None
        for some, counts in zip(rows.split(_CHUNK), weights.split(_CHUNK), strict=True):
            # Weighed, not picked: picking waits for the device.
            ours = _weighed(some, counts, self._dtype)
            if self._moments.device == ours.device:
                _gram(ours, self._moments[part])
            else:
                self._moments[part] += _gram(ours).to(self._moments.device)

    def add_up(self, device: torch.device) -> None:
        """Sum over all processes, through `device`."""
        if many_processes():
            if self._moments is None:
                self._fold(device)
            assert self._moments is not None
            together = self._moments.to(device)
            torch.distributed.all_reduce(together)
            self._moments = together

    def problem(self, kept: Tensor, pruned: Tensor, device: torch.device) -> Squares | Rows:
        """Return the least-squares problem that reconstructs `pruned` inputs from `kept` ones, by part of the rows.

        It frees the rows, so it can be called only once.

        Args:
            kept: indices of the kept inputs, [kept], int64.
            pruned: indices of the pruned inputs, [pruned], int64.
            device: solves the problem.
        """
        places = torch.cat([kept, kept.new_full((1,), self._width), pruned])
        if self._moments is not None:
            places = places.to(self._moments.device)
            return Squares(torch.stack([each[places][:, places].to(device) for each in self._moments]), len(kept))
        places, held = places.to(device), self._rows
        self._rows = [[] for _ in range(PARTS)]
        counts = [sum(len(rows) for rows, _ in several) for several in held]

        def ours() -> Iterator[tuple[int, Tensor]]:
            for part, several in enumerate(held):
                while several:
                    rows, weights = several.pop(0)
                    for some, roots in zip(rows.split(_CHUNK), weights.split(_CHUNK), strict=True):
                        yield part, _weighed(some.to(device), roots.to(device), self._dtype)[:, places]

        if sum(counts) < len(kept):
            empty = torch.zeros(0, len(places), dtype=self._dtype, device=device)
            return Rows(torch.cat([empty, *(some for _, some in ours())]), len(kept), counts[0])
        moments = torch.zeros(PARTS, len(places), len(places), dtype=self._dtype, device=device)
        for part, some in ours():
            _gram(some, moments[part])
        return Squares(moments, len(kept))


def _weighed(rows: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows and a column of ones, [count, n + 1], times the roots of their weights, without overflow."""
    roots = weights.to(dtype).sqrt().unsqueeze(1)
    found = torch.cat([rows.to(dtype) * roots, roots], dim=1)
    return torch.where(found.square().sum(0).isfinite().all(), found, 0.0)


def moments_bytes(width: int, dtype: torch.dtype) -> int:
    """Return the bytes of second moments of `width` inputs."""
    return PARTS * (width + 1) ** 2 * dtype.itemsize
