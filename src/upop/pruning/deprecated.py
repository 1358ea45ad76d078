"""Renamed names: the old ones work for one more release, with a warning that states the new one."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound=type[Any])

NAMES = {
    "Survey": "Prunable",
    "Unit": "Group",
    "UnitSpec": "GroupSpec",
    "find_units": "find_groups",
    "gather": "full_copy",
    "skeleton": "meta_copy",
    "survey": "find_prunable",
}
"""Old public name -> new public name."""
MOVED = dict.fromkeys(("Distillation", "distill"), "upop.distillation")
"""What the method held before -> the module that it is in now."""


def older_names(module: str) -> Callable[[str], Any]:
    """Return a module `__getattr__` that resolves old names, for scripts and pickles."""

    def get(name: str) -> Any:
        found = vars(sys.modules[module])
        if name in NAMES and NAMES[name] in found:
            warn_renamed(f"{module}.{name}", f"{module}.{NAMES[name]}")
            return found[NAMES[name]]
        if module == "upop.pruning" and name in MOVED:
            place = MOVED[name]
            warn_renamed(f"{module}.{name}", f"{place}.{name}")
            return getattr(import_module(place), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return get


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn of an old name."""
    warnings.warn(f"{old} is now called {new}; the next release removes the old name.", DeprecationWarning, stacklevel)


def outside_upop() -> int:
    """Return the `stacklevel` with which a warning points to the user's line outside of upop."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "upop":
        level, frame = level + 1, frame.f_back
    return level + 1


def current_arguments(renamed: Mapping[str, str], given: Mapping[str, Any], *, stacklevel: int = 4) -> dict[str, Any]:
    """Rename deprecated keyword arguments.

    Args:
        renamed: old name -> new name.
        given: keyword arguments.
        stacklevel: that of the user's call.

    Raises:
        TypeError: an argument is given under both names.
    """
    current = dict(given)
    for old, new in renamed.items():
        if old in current:
            if new in current:
                raise TypeError(f"{old} is an older name of {new}, and both are given. Leave {old} out.")
            warn_renamed(old, new, stacklevel=stacklevel)
            current[new] = current.pop(old)
    return current


def renamed_arguments(**renamed: str) -> Callable[[F], F]:
    """Accept keyword arguments under their old names too: `@renamed_arguments(old="new")`."""

    def changed(function: F) -> F:
        @wraps(function)
        def called(*args: Any, **given: Any) -> Any:
            if not renamed.keys().isdisjoint(given):
                given = current_arguments(renamed, given)
            return function(*args, **given)

        return called  # type: ignore[return-value]

    return changed


def renamed_attributes(**renamed: str) -> Callable[[C], C]:
    """Provide attributes and methods of a class under their old names too; dataclasses also accept these as arguments.

    Objects that were pickled with the old names are read without a warning, as files are.
    """

    def changed(kind: C) -> C:
        fields = getattr(kind, "__dataclass_fields__", {})
        arguments = {old: new for old, new in renamed.items() if new in fields}
        if arguments:
            kind.__init__ = renamed_arguments(**arguments)(kind.__init__)
            kind.__setstate__ = _state_of_today(arguments)
        for old, new in renamed.items():

            def get(self: Any, old: str = old, new: str = new) -> Any:
                warn_renamed(f"{kind.__name__}.{old}", new)
                return getattr(self, new)

            get.__doc__ = f"The older name of `{new}`."
            setattr(kind, old, property(get))
        return kind

    return changed


def _state_of_today(renamed: Mapping[str, str]) -> Callable[[Any, Mapping[str, Any]], None]:
    def set_state(self: Any, state: Mapping[str, Any]) -> None:
        self.__dict__.update({renamed.get(name, name): value for name, value in state.items()})

    return set_state
