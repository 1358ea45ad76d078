"""Attention without channels: its output projection returns its bias.

Linear layers without rows or columns compute that by themselves. Only an open length, as in
`view(batch, tokens, -1, head_dim)`, cannot be inferred for an empty tensor. It is set to the length of the input at
that position (tokens), or else to 1 (heads).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn, reshape
from torch.overrides import TorchFunctionMode

from upop.pruning.uncut import Uncut, mixed

_SHAPED = (Tensor.view, Tensor.reshape, reshape)


class _Open(TorchFunctionMode):
    """Fills in the open length of a shape with another length of 0."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func in _SHAPED and len(args) > 1 and isinstance(args[0], Tensor) and not args[0].numel():
            sizes = args[1:] if isinstance(args[1], int) else args[1]
            if isinstance(sizes, tuple | list) and -1 in sizes and 0 in sizes:
                return func(args[0], _with_open_length(args[0].shape, list(sizes)))
        return func(*args, **(kwargs or {}))


def _with_open_length(shape: Sequence[int], sizes: list[Any]) -> list[Any]:
    open_at = sizes.index(-1)
    if open_at < len(shape) and list(shape[:open_at]) == sizes[:open_at]:
        sizes[open_at] = shape[open_at] or 1
    return sizes


class Empty(Uncut):
    """Mixin for a module whose attention was pruned whole."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the original forward, with lengths that cannot be inferred filled in."""
        with _Open():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


def empty_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class for a module of class `kind` whose attention was pruned whole.

    A class that already replaces the original for a cut is returned as it is, since it knows all lengths.
    """
    return kind if "uncut_class" in kind.__dict__ else mixed(Empty, kind)
