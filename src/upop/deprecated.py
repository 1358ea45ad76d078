"""Renamed modules: their old paths can be imported for one more release, with a warning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_ROOMS = {
    "configs": "layers plain size_fields smaller_tokenizer uniform_sizes vocabulary",
    "files": "config_json description hub",
    "fitting": "fit likeness sizes",
    "libraries": "open_clip_models outside timm_models",
    "saving": "card folder loading_code quantizer",
}
"""Room of `upop.checkpoints` -> the modules that stood beside it."""
MOVED = {
    "upop.training": "upop.runs",
    "upop.tasks.verbs": "upop.runs.verbs",
    "upop.tasks.run": "upop.runs.run",
    "upop.tasks.story": "upop.runs.story",
    "upop.tasks.check": "upop.runs.check",
    "upop.tasks.inputs": "upop.runs.inputs",
    "upop.tasks.examples": "upop.runs.examples",
    "upop.tasks.caption_scores": "upop.metrics.captions",
    "upop.tasks.segmentation_scores": "upop.metrics.segmentation",
    "upop.data.shapes": "upop.demo",
    "upop.data.records": "upop.data.samples",
    "upop.pruning.units": "upop.pruning.groups",
    "upop.pruning.surveys": "upop.pruning.prunable",
    "upop.pruning.align": "upop.pruning.round_to",
    "upop.checkpoints.transformers_models": "upop.checkpoints.formats.transformers",
    "upop.checkpoints.plain_export": "upop.checkpoints.export.plain_models",
    "upop.checkpoints.blank": "upop.checkpoints.fitting.meta",
    "upop.checkpoints.clip_names": "upop.checkpoints.names.clip",
    "upop.checkpoints.hugging_face": "upop.checkpoints.names.counterparts",
    "upop.checkpoints.library": "upop.checkpoints.pretrained",
    "upop.checkpoints.model_inputs": "upop.checkpoints.processors",
    "upop.checkpoints.preparation": "upop.checkpoints.fitting.carried",
    "upop.checkpoints.read": "upop.checkpoints.files.weights",
    "upop.checkpoints.remote": "upop.checkpoints.files.hub",
    "upop.checkpoints.renamed": "upop.checkpoints.fitting.recorded_groups",
    "upop.checkpoints.resizing": "upop.checkpoints.official",
    "upop.checkpoints.runtimes": "upop.checkpoints.saving.card",
    "upop.checkpoints.write": "upop.checkpoints.files.weights",
    **{
        f"upop.checkpoints.{name}": f"upop.checkpoints.{room}.{name}"
        for room, names in _ROOMS.items()
        for name in names.split()
    },
    **{
        f"upop.checkpoints.{name}": f"upop.checkpoints.export.{name}"
        for name in ("any_graph", "cached_graph", "graphs", "int8", "nemotron_nas", "padded", "sessions")
    },
}
"""Old path of a module or package -> new path."""


class _Moved(Loader):
    """Loads the module of the new path in place of the old one."""

    def __init__(self, new: str) -> None:
        self._new = new
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the new path."""
        warnings.warn(f"{spec.name} is now called {self._new}.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(self._new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it is: the import system has given it the old path's spec, which it does not keep."""
        module.__spec__ = self._spec


class _Finder(MetaPathFinder):
    """Finds modules by their old paths."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how a module of an old path is imported; None for all others."""
        del path, target
        for old, new in MOVED.items():
            if fullname == old or fullname.startswith(f"{old}."):
                return ModuleSpec(fullname, _Moved(new + fullname.removeprefix(old)))
        return None


def find_moved_modules() -> None:
    """Make modules of upop importable by their old paths."""
    if not any(isinstance(each, _Finder) for each in sys.meta_path):
        # First: Python's own finder would load a second copy of a module whose package is found under its old path.
        sys.meta_path.insert(0, _Finder())
