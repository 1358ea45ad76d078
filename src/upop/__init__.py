"""UPop: unified and progressive pruning of vision-language transformers.

The public API: `Pruner` and `shrink` compress a model inside any training loop, `calibrate` does it without training,
`distill` has the dense model teach, `find_units` says what can go, `save`, `load` and `load_into` keep a compressed
model without pickle, `export` writes it for other runtimes, `load_official` reads the published checkpoints.
Importing it lets transformers reload compressed models by itself. Where a library is missing that files need, the
method is there all the same, beside torch alone.
"""

from typing import Any

from upop.starting import watch_start

watch_start()  # before what takes seconds to import

from upop.pruning import (  # noqa: E402
    Plan,
    Pruner,
    Unit,
    UnitSpec,
    calibrate,
    count_macs,
    count_parameters,
    distill,
    find_units,
    gather,
    shrink,
    skeleton,
    survey,
    unmask,
)

_missing: str | None = None
try:
    from upop.checkpoints import Pruner, calibrate, load, load_into, load_official, save, shrink
    from upop.checkpoints.export import export
except ModuleNotFoundError as error:
    _missing = error.name
    if _missing is None or _missing.partition(".")[0] == "upop":
        raise

from upop.compression import Compression  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Compression",
    "Plan",
    "Pruner",
    "Unit",
    "UnitSpec",
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
    "unmask",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        raise ImportError(
            f"upop.{name} needs {_missing}, which is not installed. pip install {_missing}", name=_missing
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
