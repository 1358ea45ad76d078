"""`upop convert`: converts between published files, folders of upop, and transformers models."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from upop.checkpoints.convert import check_target, read_model, write_model
from upop.cli import options as o
from upop.plain import as_text
from upop.pruning import count_parameters


class Form(StrEnum):
    """The output form of a model."""

    official = "official"
    upop = "upop"
    hugging_face = "hugging-face"


Source = Annotated[str, typer.Argument(help="A published .pth or .safetensors, a folder, or a name on the hub.")]


def convert(
    source: Source,
    target: Annotated[Path, typer.Argument(help="File (.pth) or folder to write; an older one of upop is replaced.")],
    to: Annotated[
        Form | None,
        typer.Option(help="What to write. [default: official for a .pth, else upop]"),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Whose model a published file holds; told by its tensors if not given.")
    ] = None,
    overwrite: o.Overwrite = False,
    assign: o.Set = None,
) -> None:
    """Write a BLIP, CLIP, DeiT or Segmenter model, dense or compressed, in another form; its outputs stay the same.

    `--set vision_heads=6` and the like say what the shapes in a published file do not tell: numbers of heads, and MLP
    widths before pruning, where they are not the published ones.
    """
    form = to or (Form.official if target.suffix == ".pth" else Form.upop)
    check_target(target, form.value, overwrite=overwrite)
    model = read_model(source, task, **o.overrides({}, assign))
    write_model(model, target, form.value, overwrite=overwrite)
    console = Console(soft_wrap=True, highlight=False)
    size = f"{count_parameters(model) / 1e6:.1f} M parameters"
    console.print(as_text(f"{source} -> {target}: {type(model).__name__}, {size}"))
    if form is Form.hugging_face:
        console.print(
            "Load it with from_pretrained, after `import upop` if it is compressed. Tokenizer and processor are "
            "no part of it: save them into the same folder."
        )
