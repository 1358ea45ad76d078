"""`upop export`: a model as graphs for other runtimes."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from upop.checkpoints.convert import read_model
from upop.checkpoints.export import export as export_model
from upop.cli import options as o
from upop.errors import CheckpointError
from upop.files import check_folder
from upop.plain import as_text
from upop.reading import read_object


class GraphFormat(StrEnum):
    """What graphs are written as."""

    onnx = "onnx"
    torch_export = "torch-export"


def export(
    source: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A folder of ours or of transformers, a published .pth, or a hub name."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; older graphs of upop are replaced.")],
    format: Annotated[GraphFormat, typer.Option(help="Files for onnxruntime, or for torch.export.")] = GraphFormat.onnx,
    task: Annotated[
        str | None, typer.Option(help="Whose model a published file holds; told by its tensors if not given.")
    ] = None,
    overwrite: o.Overwrite = False,
    assign: o.Set = None,
) -> None:
    """Write a model, dense or compressed, for onnxruntime or torch.export, checked to compute the same there."""
    check_folder(out, "graphs", overwrite=overwrite)
    export_model(read_model(source, task, **o.overrides({}, assign)), out, format.value, overwrite=overwrite)
    console = Console(soft_wrap=True, highlight=False)
    for name, graph in read_object(out / "export.json", CheckpointError, "Export the model again.")["graphs"].items():
        axes = ", ".join(f"{key} {tuple(value)}".replace("'", "") for key, value in graph["inputs"].items())
        console.print(
            as_text(
                f"{out / graph['file']}: {name}({axes}) -> {', '.join(graph['outputs'])}; "
                f"largest difference {graph['largest_difference']:.1e}"
            )
        )
