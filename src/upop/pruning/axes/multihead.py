"""torch.nn.MultiheadAttention at any width of its heads, for the class itself and for those made of it."""

from __future__ import annotations

from torch import nn

from upop.pruning.layouts.packed import NarrowMultiheadAttention

_classes: dict[type[nn.Module], type[nn.Module]] = {nn.MultiheadAttention: NarrowMultiheadAttention}


def narrow_multihead(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a MultiheadAttention of class `kind` takes on when it is cut.

    What `kind` adds to torch's class stays: its forward, where it has one, calls the narrow one for torch's.
    """
    if kind not in _classes:
        content = {"uncut_class": kind, "__reduce__": _reduced}
        _classes[kind] = type(f"Narrow{kind.__name__}", (kind, NarrowMultiheadAttention), content)
    return _classes[kind]


def _reduced(self: nn.Module) -> object:
    """Copy and pickle by the class as it was: no module holds the narrow one."""
    return _revived, (type(self).__dict__["uncut_class"],), self.__dict__


def _revived(kind: type[nn.Module]) -> nn.Module:
    return narrow_multihead(kind).__new__(narrow_multihead(kind))
