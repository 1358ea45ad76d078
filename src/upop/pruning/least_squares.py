"""Least squares with a ridge, of rows or of their second moments: of whichever is less to hold and to solve."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from upop.pruning.sharded import many_processes

PARTS = 2
_CHUNK = 4096
"""Rows that are multiplied at a time, so that few of them are held in full precision at once."""
_ENOUGH = 1e-2
"""What rounding may do to a solution: `size / ridge` bounds the condition number, as ridges are shares of the mean."""


class Squares:
    """A problem given by second moments: the D that minimises `sum |y - x D|^2 + r |D|^2`.

    Attributes:
        nothing: the sum of `|y|^2`.

    Args:
        squares: the sum of `x x^T`, [n, n].
        shared: that of `x y^T`, [n, outputs].
        nothing: as above.
        inputs: how many of the n are held; what comes after them is free (the bias).
    """

    def __init__(self, squares: Tensor, shared: Tensor, nothing: Tensor, inputs: int) -> None:
        self._squares, self._shared, self.nothing, self._inputs = squares, shared, nothing, inputs

    def solve(self, ridge: float) -> Tensor:
        """Return D, [n, outputs], for r as a share of the mean square of an input; NaN where it is not determined."""
        force = ridge * self._squares.diagonal()[: self._inputs].mean().clamp_min(torch.finfo(torch.float32).tiny)
        held = self._squares.clone()
        held.diagonal()[: self._inputs].add_(force)
        return _solved(held, self._shared)

    def gain(self, change: Tensor) -> Tensor:
        """Return by how much D changes the sum of `|y - x D|^2`: below 0 where it helps."""
        return (change * (self._squares @ change - 2 * self._shared)).sum()


class Rows:
    """The same problem given by rows, fewer than inputs: it is solved in as many unknowns as there are rows.

    Args:
        rows: x, [rows, inputs], each multiplied by the root of its weight.
        aims: y, [rows, outputs], likewise.
        ones: these roots, [rows], where there is a bias; else None.
    """

    def __init__(self, rows: Tensor, aims: Tensor, ones: Tensor | None) -> None:
        self._rows, self._aims, self._ones = rows, aims, ones
        self.nothing = aims.square().sum()
        self._products: Tensor | None = None

    def solve(self, ridge: float) -> Tensor:
        """Return D, as `Squares.solve`: what is free is left out by taking away the weighted mean."""
        rows, aims, ones = self._rows, self._aims, self._ones
        force = ridge * (rows.square().sum() / rows.shape[1]).clamp_min(torch.finfo(torch.float32).tiny)
        means = None
        if ones is not None:
            means = [(ones @ each) / ones.square().sum().clamp_min(force.new_tensor(1e-30)) for each in (rows, aims)]
            rows, aims = (each - ones.outer(mean) for each, mean in zip((rows, aims), means, strict=True))
        if self._products is None:  # the same for every ridge
            self._products = rows @ rows.t()
        held = self._products.clone()
        held.diagonal().add_(force)
        found = rows.t() @ _solved(held, aims)
        return found if means is None else torch.cat([found, (means[1] - means[0] @ found).unsqueeze(0)])

    def gain(self, change: Tensor) -> Tensor:
        """Return by how much D changes the sum of squares, as `Squares.gain`."""
        inputs = self._rows.shape[1]
        made = self._rows @ change[:inputs]
        if self._ones is not None:
            made += self._ones.outer(change[inputs])
        return (made * (made - 2 * self._aims)).sum()


def _solved(held: Tensor, shared: Tensor) -> Tensor:
    """Return `held^-1 shared`; `held` is symmetric, and its memory is used up."""
    factor, failed = torch.linalg.cholesky_ex(held)
    del held
    found = torch.cholesky_solve(shared, factor)
    return torch.where(failed == 0, found, torch.nan)


def precision(size: int, ridge: float, given: torch.dtype) -> torch.dtype:
    """Return the precision that a problem of `size` unknowns is solved in: float32 where that is as good."""
    enough = size / ridge * torch.finfo(torch.float32).eps < _ENOUGH
    return torch.float32 if enough and given != torch.float64 else torch.float64


class ReaderInputs:
    """What a layer is given, in two parts: its rows as they are, or their second moments where these take less.

    Args:
        width: inputs of the layer, n.
        dtype: in which moments are summed.
        home: where they are kept; None is where they are.
    """

    def __init__(self, width: int, dtype: torch.dtype, home: torch.device | None = None) -> None:
        self._width, self._dtype, self._home = width, dtype, home
        self._rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(PARTS)]
        self._moments: Tensor | None = None
        self._bytes = 0

    def tensors(self) -> Iterator[Tensor]:
        """Yield what is held."""
        yield from (rows for part in self._rows for rows, _ in part)
        if self._moments is not None:
            yield self._moments

    def add(self, rows: Tensor, weights: Tensor, part: int) -> None:
        """Add rows [count, n], how much each counts, [count], and which part they belong to.

        Rows that are not finite add nothing, none of those that are given with them.
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
        """Make moments of the rows, which `device` multiplies."""
        held, self._rows = self._rows, [[] for _ in range(PARTS)]
        size = self._width + 1
        self._moments = torch.zeros(PARTS, size, size, dtype=self._dtype, device=self._home or device)
        for part, several in enumerate(held):
            for rows, weights in several:
                self._add_products(rows.to(device), weights.to(device), part)

    def _add_products(self, rows: Tensor, weights: Tensor, part: int) -> None:
        assert self._moments is not None
        for some, counts in zip(rows.split(_CHUNK), weights.split(_CHUNK), strict=True):
            ours = torch.cat([some.to(self._dtype), some.new_ones(len(some), 1, dtype=self._dtype)], dim=1)
            # Weighed, not picked: picking waits for the device.
            product = ours.t() @ (ours * counts.to(ours).unsqueeze(1))
            self._moments[part] += torch.where(product.isfinite().all(), product, 0.0).to(self._moments.device)

    def add_up(self, device: torch.device) -> None:
        """Add up over all processes, by way of `device`."""
        if many_processes():
            if self._moments is None:
                self._fold(device)
            assert self._moments is not None
            together = self._moments.to(device)
            torch.distributed.all_reduce(together)
            self._moments = together

    def problem(self, part: int | None, kept: Tensor, gone: Tensor, lost: Tensor, *, bias: bool) -> Squares | Rows:
        """Return what makes `kept` inputs give what the others gave: y is the product of what goes and its weights.

        Args:
            part: of the rows; None is both.
            kept: which inputs stay, [kept], int64, on the device that computes.
            gone: which go, [gone].
            lost: the weights of those, [gone, outputs], in the precision that computes.
            bias: whether there is one to change too.
        """
        parts = range(PARTS) if part is None else [part]
        if self._moments is not None:
            moments = sum((self._moments[each].to(lost) for each in parts[1:]), self._moments[parts[0]].to(lost))
            return _of_moments(moments, kept, gone, lost, bias=bias)
        held = [each for number in parts for each in self._rows[number]]
        if sum(len(rows) for rows, _ in held) < len(kept):
            found = list(_scaled(held, lost))
            empty = lost.new_zeros(0, self._width), lost.new_zeros(0)
            rows, roots = (torch.cat(each) for each in zip(*(found or [empty]), strict=True))
            return Rows(rows[:, kept], rows[:, gone] @ lost, roots if bias else None)
        size = len(kept) + bias
        squares, shared, nothing = lost.new_zeros(size, size), lost.new_zeros(size, lost.shape[1]), lost.new_zeros(())
        for rows, roots in _scaled(held, lost):
            aims, ours = rows[:, gone] @ lost, rows[:, kept]
            ours = torch.cat([ours, roots.unsqueeze(1)], dim=1) if bias else ours
            squares.addmm_(ours.t(), ours)
            shared.addmm_(ours.t(), aims)
            nothing += aims.square().sum()
        return Squares(squares, shared, nothing, len(kept))


def _of_moments(moments: Tensor, kept: Tensor, gone: Tensor, lost: Tensor, *, bias: bool) -> Squares:
    places = torch.cat([kept, kept.new_tensor([moments.shape[-1] - 1])]) if bias else kept
    shared = moments[places.unsqueeze(1), gone] @ lost
    nothing = (lost * (moments[gone.unsqueeze(1), gone] @ lost)).sum()
    return Squares(moments[places.unsqueeze(1), places], shared, nothing, len(kept))


def _scaled(held: list[tuple[Tensor, Tensor]], like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows multiplied by the roots of their weights, and these roots, a few at a time."""
    for rows, weights in held:
        for some, counts in zip(rows.split(_CHUNK), weights.split(_CHUNK), strict=True):
            roots = counts.to(like).sqrt()
            yield some.to(like) * roots.unsqueeze(1), roots


def moments_bytes(width: int, dtype: torch.dtype) -> int:
    """Return what second moments of so many inputs take."""
    return PARTS * (width + 1) ** 2 * dtype.itemsize
