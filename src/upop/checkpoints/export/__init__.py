"""Export: graphs for other runtimes (ONNX, OpenVINO, torch.export), and ordinary models for other libraries.

`graph_files` writes graphs: of upop's own tasks (`graphs`), of one call of any model (`any_graph`), or of a decoder
with its cache (`cached_graph`); `int8` quantizes ONNX files, and `sessions` runs them. `plain_models` writes models
that do not need upop: padded (`padded`), or with sizes per layer (`nemotron_nas`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upop.checkpoints.export.graph_files import export

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.graph_files"), name)
    return found
