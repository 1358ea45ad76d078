"""`upop profile`: measures the latency of layers by kind and size, for targets in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from upop.cli import options as o
from upop.defaults import POINTS, RUNTIMES
from upop.plain import as_text
from upop.starting import starting


def profile(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a published .pth or .safetensors, a name of timm, or a name on the hub.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("profile.json"),
    task: o.TaskOfFile = None,
    device: o.DeviceName = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 1,
    runtime: Annotated[str, typer.Option(help=f"Runtime: {' or '.join(RUNTIMES)}.")] = RUNTIMES[0],
    points: Annotated[int, typer.Option(min=1, help="Sizes to measure per kind of layer.")] = POINTS,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes per size.")] = 15,
    overwrite: o.Overwrite = False,
    assign: o.Set = None,
) -> None:
    """Measure the latency of a model's layers on this machine, for --target latency=0.5 or latency=12ms."""
    with starting():
        import torch
        from torch.utils._pytree import tree_map

        from upop.checkpoints.loading import load_named
        from upop.cli.inspected import example_of
        from upop.errors import SettingError
        from upop.profiling import batch_of, profile_model, write_profile

    model = load_named(source, task, **o.overrides({}, assign))
    inputs, note = example_of(model)
    if inputs is None:
        raise SettingError(f"The model cannot be timed: {note}. Use upop.profiling.profile_model(model, inputs).")
    name = device.value if device else "auto"
    on_gpu = torch.cuda.is_available() and runtime in ("eager", "compile")
    place = torch.device(("cuda" if on_gpu else "cpu") if name == "auto" else name)
    inputs = tree_map(lambda each: each.to(place) if hasattr(each, "to") else each, batch_of(inputs, batch))
    console = Console(highlight=False)
    console.print(as_text(f"{source}: {type(model).__name__}, batch {batch}, {runtime}, {place}"))
    found = profile_model(
        model.to(place).eval(),
        inputs,
        runtime=runtime,
        points=points,
        repeats=repeats,
        notify=lambda line: console.print(as_text(line)),
    )
    write_profile(found, out, overwrite=overwrite)
    least = found.dense - sum(each.at(1) * len(each.groups) for each in found.layers)
    console.print(
        as_text(f"{found.dense:.3g} ms, and {max(0.0, least):.3g} ms with one channel in every group. Wrote {out}")
    )
