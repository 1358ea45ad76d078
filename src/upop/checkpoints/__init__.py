"""Checkpoints of every format: `open_checkpoint` says what lies at a path; loading, saving and export take that."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upop.checkpoints.description import WEIGHTS, is_folder
    from upop.checkpoints.folder import save
    from upop.checkpoints.loading import load, load_into
    from upop.checkpoints.official import load_official, save_official
    from upop.checkpoints.opening import Checkpoint, open_checkpoint
    from upop.checkpoints.read import read_weights

__all__ = [
    "WEIGHTS",
    "Checkpoint",
    "is_folder",
    "load",
    "load_into",
    "load_official",
    "open_checkpoint",
    "read_weights",
    "save",
    "save_official",
]
_PLACES = {
    "folder": ("save",),
    "description": ("WEIGHTS", "is_folder"),
    "loading": ("load", "load_into"),
    "official": ("load_official", "save_official"),
    "opening": ("Checkpoint", "open_checkpoint"),
    "read": ("read_weights",),
}


def __getattr__(name: str) -> Any:
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{place}"), name)
    return found
