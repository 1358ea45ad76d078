"""UPop: unified and progressive pruning of vision-language transformers.

The public API: `Compression` compresses a model while it is trained. `Pruner` and `shrink` do so inside any other
loop, `calibrate` prunes without training, and `distill` adds a loss against the dense model. `find_prunable` reports
the prunable groups. `save`, `load` and `load_into` keep a compressed model without pickle, `export` writes it for other
runtimes, and `load_official` reads the published checkpoints. `merge_tokens` merges tokens of image encoders,
`calibrate_with_tokens` shares one budget between tokens and weights, and `reduce_vocabulary` drops words that a task
never uses.

Names are imported on first use. Once both are imported, in either order, transformers reloads compressed models by
itself. Without the libraries that files need, the method still works with torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from upop.deprecated import find_moved_modules
from upop.libraries import missing, on_import_of_transformers
from upop.starting import watch_start

if TYPE_CHECKING:
    from upop.checkpoints import load, load_into, load_official, save
    from upop.checkpoints.configs.vocabulary import reduce_vocabulary
    from upop.checkpoints.export import export
    from upop.compression import Compression
    from upop.distillation import distill
    from upop.pruning import (
        Group,
        GroupSpec,
        ModelTraits,
        Plan,
        Pruner,
        calibrate,
        count_macs,
        count_parameters,
        find_groups,
        find_prunable,
        full_copy,
        meta_copy,
        shrink,
        unmask,
    )
    from upop.tokens.budget import calibrate_with_tokens
    from upop.tokens.encoders import merge_tokens

__version__ = "0.1.0"

__all__ = [
    "Compression",
    "Group",
    "GroupSpec",
    "ModelTraits",
    "Plan",
    "Pruner",
    "calibrate",
    "calibrate_with_tokens",
    "count_macs",
    "count_parameters",
    "distill",
    "export",
    "find_groups",
    "find_prunable",
    "full_copy",
    "load",
    "load_into",
    "load_official",
    "merge_tokens",
    "meta_copy",
    "reduce_vocabulary",
    "save",
    "shrink",
    "unmask",
]
_PLACES = {
    "Compression": "upop.compression",
    "calibrate_with_tokens": "upop.tokens.budget",
    "distill": "upop.distillation",
    "export": "upop.checkpoints.export",
    "merge_tokens": "upop.tokens.encoders",
    "reduce_vocabulary": "upop.checkpoints.configs.vocabulary",
    **dict.fromkeys(("load", "load_into", "load_official", "save"), "upop.checkpoints"),
}
"""Where the names are that do not belong to the method."""

find_moved_modules()
watch_start()  # before what takes seconds to import
on_import_of_transformers("upop.checkpoints.registered")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        from upop.pruning.deprecated import NAMES, warn_renamed

        if name in NAMES:
            warn_renamed(f"upop.{name}", f"upop.{NAMES[name]}")
            return __getattr__(NAMES[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = globals()[name] = getattr(import_module(_PLACES.get(name, "upop.pruning")), name)
        import_module("upop.checkpoints.configs.uniform_sizes")
    except ModuleNotFoundError as error:
        raise missing(error, f"upop.{name}") from None
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
