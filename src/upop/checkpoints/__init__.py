"""Checkpoints: published files, and the folders of upop."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upop.checkpoints.description import is_folder
    from upop.checkpoints.folder import WEIGHTS, load, load_into, save
    from upop.checkpoints.official import load_official, save_official
    from upop.checkpoints.read import read_weights

__all__ = [
    "WEIGHTS",
    "is_folder",
    "load",
    "load_into",
    "load_official",
    "read_weights",
    "save",
    "save_official",
]
_PLACES = {
    "folder": ("WEIGHTS", "load", "load_into", "save"),
    "description": ("is_folder",),
    "official": ("load_official", "save_official"),
    "read": ("read_weights",),
}


def __getattr__(name: str) -> Any:
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{place}"), name)
    return found
