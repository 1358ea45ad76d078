"""UPop: unified and progressive pruning of vision-language transformers.

The public API: `Pruner` and `shrink` compress a model inside any training loop, `find_units` says what can go,
`save` and `load` keep a compressed model without pickle, `load_official` reads the published checkpoints.
"""

from upop.checkpoints import load, load_official, save
from upop.pruning import Plan, Pruner, Unit, count_macs, count_parameters, find_units, shrink

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "Pruner",
    "Unit",
    "count_macs",
    "count_parameters",
    "find_units",
    "load",
    "load_official",
    "save",
    "shrink",
]
