"""`upop inspect`: shows the groups of a model, and previews a budget without training."""

from __future__ import annotations

from typing import Annotated

import typer

from upop.cli import options as o
from upop.starting import starting


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a published .pth or .safetensors, a name of timm, or a name on the hub.",
        ),
    ],
    task: o.TaskOfFile = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio",
            "--p",
            parser=o.as_ratio,
            metavar="<float>",
            help="Also preview the sizes after this share of the cost is removed.",
        ),
    ] = None,
    target: o.Target = None,
    round_to: o.RoundTo = None,
    align: o.OldAlign = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every group and every reason.")] = False,
    assign: o.Set = None,
) -> None:
    """Show a model's groups, parameters and GMACs per modality, its coverage, and preview a budget."""
    with starting():
        from upop.cli.inspected import show

    show(
        source,
        task,
        ratio=ratio,
        target=target,
        round_to=round_to or align or "1",
        as_json=as_json,
        overrides=o.overrides({}, assign),
    )
