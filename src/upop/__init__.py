"""UPop: unified and progressive pruning of vision-language transformers.

The public API: `Pruner` and `shrink` compress a model inside any training loop, `calibrate` does it without training,
`distill` has the dense model teach, `find_units` says what can go, `save`, `load` and `load_into` keep a compressed
model without pickle, `export` writes it for other runtimes, `load_official` reads the published checkpoints.
Importing it lets transformers reload compressed models by itself.
"""

from upop.starting import watch_start

watch_start()  # before what takes seconds to import

from upop.checkpoints import Pruner, calibrate, load, load_into, load_official, save, shrink  # noqa: E402
from upop.checkpoints.export import export  # noqa: E402
from upop.pruning import Plan, Unit, count_macs, count_parameters, distill, find_units, gather, skeleton, survey  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Pruner",
    "Unit",
    "calibrate",
    "count_macs",
    "count_parameters",
    "distill",
    "export",
    "find_units",
    "gather",
    "load",
    "load_into",
    "load_official",
    "save",
    "shrink",
    "skeleton",
    "survey",
]
