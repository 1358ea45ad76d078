"""Tokens that a model merged on their way: how they come back to all of their places, where that is known.

The method knows nothing of merging. Who merges tokens says here how they are put back, so that a model with fewer of
them can be compared with one that has all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

Unmerge = Callable[[Tensor], Tensor]

finders: list[Callable[[Tensor], Unmerge | None]] = []
"""Each takes tokens [B, T', C] of the pass that is running, and returns what puts them back, [B, T, C], if it knows."""

suspenders: list[Callable[[nn.Module], AbstractContextManager[None]]] = []
"""Each has a model keep all of its tokens within a block."""


@contextmanager
def all_tokens(model: nn.Module) -> Iterator[None]:
    """Have a model that merges tokens keep them all within the block."""
    with ExitStack() as stack:
        for each in suspenders:
            stack.enter_context(each(model))
        yield


def unmerge_of(tokens: Tensor) -> Unmerge | None:
    """Return what puts tokens of the pass that is running back to all of their places; None where none were merged."""
    if torch.compiler.is_compiling():
        return None
    return next((found for find in finders if (found := find(tokens)) is not None), None)
