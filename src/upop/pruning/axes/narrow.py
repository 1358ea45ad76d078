"""Corrects forwards that assume the width of their input is also the width of a pruned axis.

Many forwards write `B, N, C = x.shape` and later `.reshape(B, N, C)` of the heads, or `qkv[..., :C]`. A cut module with
such a forward gets a subclass that runs it under a torch function mode. The mode replaces the old width by the current
one, in the few calls that need it. This works under torch.compile and torch.export.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from upop.pruning.uncut import Uncut, mixed

WIDTHS = "cut_widths"
"""Attribute of a narrow module: which calls name which width -> the new one.

"part.rank.dim.old": takes apart a tensor of so many dimensions, of which one had the old length;
"piece.rank.dim.old.place.count": the same, into a list of so many lengths, of which one was the old one;
"view" and "expand", with ".rank.dim.old" of what comes out, and the same of what goes in;
"#1" behind any of them where one module runs several groups of the same old width, each cut to a width of its own.
"""

_SHAPED = (Tensor.view, Tensor.reshape, torch.reshape)
_UNFLATTEN = (Tensor.unflatten, torch.unflatten)
_SPLIT = (Tensor.split, torch.split, torch.functional.split, Tensor.split_with_sizes, torch.split_with_sizes)
_INDEXED = (Tensor.__getitem__, Tensor.__setitem__)


class _Widths(TorchFunctionMode):
    """Replaces old widths by new ones."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self._parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._pieces: dict[tuple[int, ...], list[int]] = {}
        self._named: dict[tuple[str, int, int, int, int], list[tuple[int, int, int]]] = {}
        for key, new in widths.items():
            kind, *numbers = numbers_of(key)
            rank, dim, old, *given = map(int, numbers)
            if kind == "part":
                self._parts.setdefault((rank, dim), []).append((old, new))
            elif kind == "piece":
                self._pieces.setdefault((rank, dim, old, *given), []).append(new)
            else:
                given_rank, given_dim, length = given
                here = length if length == 1 else length * new // old
                self._named.setdefault((kind, rank, dim, old, given_rank), []).append((given_dim, here, new))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func is Tensor.expand and len(args) > 1:
            sizes = _given(args)
            return func(args[0], self._cut("expand", args[0], sizes, 0, len(sizes)))
        if func in _UNFLATTEN and len(args) > 2:
            return func(*args[:2], self._unflattened(*args[:3]))
        if func in _SHAPED and len(args) > 1 and not isinstance(args[1], torch.dtype):
            sizes = _given(args)
            cut = self._cut("view", args[0], sizes, 0, len(sizes))
            return func(args[0], cut if _fits(args[0], cut) else list(sizes))
        if func in _SPLIT and len(args) > 1:
            dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
            return func(args[0], self._sizes(args[0], args[1], dim), dim)
        if func in _INDEXED:
            return func(args[0], self._index(args[0], args[1]), *args[2:])
        return func(*args, **kwargs)

    def _cut(self, kind: str, tensor: Tensor, sizes: Sequence[Any], first: int, rank: int) -> list[Any]:
        """Return the sizes of a call with the new widths, if the call gets a cut tensor."""
        found, shape = list(sizes), tensor.shape
        for place, size in enumerate(sizes):
            if not isinstance(size, int):  # a batch of any size, where a graph is traced
                continue
            for dim, here, new in self._named.get((kind, rank, first + place, size, len(shape)), ()):
                if shape[dim] == here:
                    found[place] = new
        return found

    def _unflattened(self, tensor: Tensor, dim: int, sizes: Sequence[int]) -> Sequence[int]:
        dim, rank = dim % tensor.dim(), tensor.dim() - 1 + len(sizes)
        cut = self._cut("view", tensor, sizes, dim, rank)
        return cut if -1 in cut or math.prod(cut) == tensor.shape[dim] else sizes

    def _ratio(self, tensor: Tensor, dim: int) -> tuple[int, int] | None:
        """Return the old and new length of a cut dimension."""
        rank = tensor.dim()
        for old, new in self._parts.get((rank, dim % rank), ()):  # torch.compile of torch 2.6 does not know next(...)
            if new == tensor.shape[dim]:
                return old, new
        return None

    def _sizes(self, tensor: Tensor, sizes: Any, dim: int) -> Any:
        if not isinstance(sizes, int):
            rank, count = (tensor.dim(), dim % tensor.dim()), len(sizes)
            pieces = [self._pieces.get((*rank, old, place, count), [old]) for place, old in enumerate(sizes)]
            if sum(sizes) != tensor.shape[dim]:
                for cut in _cuts(pieces):
                    if sum(cut) == tensor.shape[dim]:
                        return cut
        ratio = self._ratio(tensor, dim)
        if ratio is None:
            return sizes
        old, new = ratio
        if isinstance(sizes, int):
            return sizes * new // old
        return [size * new // old for size in sizes] if sum(sizes) == old else sizes

    def _index(self, tensor: Tensor, index: Any) -> Any:
        places = index if isinstance(index, tuple) else (index,)
        if not any(isinstance(each, slice) for each in places):
            return index
        used = sum(each is not None and each is not Ellipsis for each in places)
        found, dim = [], 0
        for each in places:
            if each is Ellipsis:
                dim += tensor.dim() - used
            elif each is not None:
                ratio = self._ratio(tensor, dim) if isinstance(each, slice) and dim < tensor.dim() else None
                if ratio is not None:
                    old, new = ratio
                    start, stop = (None if end is None else end * new // old for end in (each.start, each.stop))
                    each = slice(start, stop, each.step)
                dim += 1
            found.append(each)
        return tuple(found) if isinstance(index, tuple) else found[0]  # torch goes another way with a slice alone


def numbers_of(key: str) -> list[str]:
    """Return the words of a key of `WIDTHS`, without the suffix that distinguishes groups."""
    return key.partition("#")[0].split(".")


def piece_of(key: str) -> tuple[tuple[int, ...], int] | None:
    """Return the calls that a key of `WIDTHS` is of, and the place of its piece in them; None if it is of no piece."""
    kind, *numbers = numbers_of(key)
    rank, dim, _, place, count = map(int, numbers) if kind == "piece" else (0,) * 5
    return ((rank, dim, count), place) if kind == "piece" else None


def _given(args: tuple[Any, ...]) -> Any:
    """Return the sizes of a call, which are given one by one or together."""
    return args[1] if isinstance(args[1], tuple | list) else args[1:]


def _cuts(pieces: Sequence[list[int]]) -> list[list[int]]:
    """Return the lengths that the pieces of a split have after the cut, for each block that may run.

    Args:
        pieces: of every piece, its lengths in each of the groups that were cut.
    """
    return [[each[min(group, len(each) - 1)] for each in pieces] for group in range(max(map(len, pieces)))]


def _fits(tensor: Tensor, sizes: Sequence[Any]) -> bool:
    """Whether a tensor can take this shape; -1 stands for whole dimensions, or the rest of one."""
    sizes, shape = list(sizes), list(tensor.shape)
    while sizes and shape and not isinstance(sizes[0], int) and not isinstance(shape[0], int) and sizes[0] == shape[0]:
        del sizes[0], shape[0]  # of any size where a graph is traced, and so it shall stay
    known, numel = math.prod([size for size in sizes if size != -1]), math.prod(shape)
    if -1 not in sizes or not known or numel % known:
        return bool(known == numel)
    rest = numel // known
    start = math.prod(sizes[: sizes.index(-1)])
    ends = _ends(shape)
    whole = start in ends and start * rest in ends
    found = _ends([rest if size == -1 else size for size in sizes])
    return whole or all(end in found for end in ends)


def _ends(sizes: Sequence[int]) -> list[int]:
    """Return the cumulative products of a shape, where its dimensions end."""
    return [math.prod(sizes[:place]) for place in range(len(sizes) + 1)]


class Narrow(Uncut):
    """Mixin for a module whose forward hard-codes a width that was cut."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward with the current widths."""
        with _Widths(self.__dict__[WIDTHS]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def narrow_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class for a cut module of class `kind` whose forward hard-codes a width.

    A class that is already narrow is returned as it is: the module is cut once more.
    """
    return kind if issubclass(kind, Narrow) else mixed(Narrow, kind)
