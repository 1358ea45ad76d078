"""Classes that replace those of cut modules, each built from a mixin and the original class."""

from __future__ import annotations

from typing import Any

from torch import nn


class Uncut:
    """Base of the mixins. Modules are copied and pickled by the parts of their class, which cannot be imported.

    Attributes:
        uncut_class: the original class.
    """

    uncut_class: type[nn.Module]

    def __reduce__(self: Any) -> Any:
        """Name the mixin and the original class."""
        made = next(kind for kind in type(self).__mro__ if "uncut_class" in kind.__dict__)
        return _revived, (made.__bases__[0], self.uncut_class), self.__dict__


_classes: dict[tuple[type[Uncut], type[nn.Module]], type[nn.Module]] = {}


def mixed(mixin: type[Uncut], kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a mixin and an original class, always the same one.

    Args:
        mixin: goes before the original class.
        kind: the original class.
    """
    if (mixin, kind) not in _classes:
        _classes[mixin, kind] = type(f"Cut{kind.__name__}", (mixin, kind), {"uncut_class": kind})
    return _classes[mixin, kind]


def _revived(mixin: type[Uncut], kind: type[nn.Module]) -> nn.Module:
    made = mixed(mixin, kind)
    return made.__new__(made)
