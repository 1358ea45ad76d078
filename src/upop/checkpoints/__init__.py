"""Checkpoints of every format: `open_checkpoint` says what lies at a path; loading, saving and export take that."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upop.checkpoints.files.description import WEIGHTS, is_folder
    from upop.checkpoints.files.weights import read_weights
    from upop.checkpoints.loading import load, load_into
    from upop.checkpoints.official import load_official, save_official
    from upop.checkpoints.opening import Checkpoint, open_checkpoint
    from upop.checkpoints.saving.folder import save

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
    "saving.folder": ("save",),
    "files.description": ("WEIGHTS", "is_folder"),
    "loading": ("load", "load_into"),
    "official": ("load_official", "save_official"),
    "opening": ("Checkpoint", "open_checkpoint"),
    "files.weights": ("read_weights",),
}


def __getattr__(name: str) -> Any:
    place = next((place for place, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{place}"), name)
    return found
