"""`upop prune`: prunes a model without training."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from upop.cli import options as o
from upop.plain import as_text
from upop.starting import starting

_RATIO = 0.25


def prune(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder of transformers or open_clip, a name on the hub, or an output of upop."
        ),
    ],
    data: o.Data = None,
    ratio: Annotated[
        float | None,
        typer.Option(
            "--ratio",
            parser=o.as_ratio,
            metavar="<float>",
            help="Share of the prunable cost to remove. [default: 0.25]",
        ),
    ] = None,
    target: o.Target = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. [default: ./MODEL-pruned]")] = None,
    samples: o.Samples = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    val_data: o.ValData = None,
    image_root: o.ImageRoot = None,
    column: o.ColumnNames = None,
    rows: o.RowCount = None,
    batch_size_train: o.BatchSize = None,
    uniform: o.Uniform = None,
    depth: o.Depth = None,
    width: o.Width = None,
    vocabulary: o.Vocabulary = None,
    round_to: Annotated[
        str | None, typer.Option("--round-to", metavar="N", help="Round kept channels to multiples of this.")
    ] = None,
    device: o.DeviceName = None,
    seed: o.Seed = None,
    allow_outside: o.AllowOutside = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print an estimate of the memory.")] = False,
    overwrite: o.Overwrite = False,
    assign: o.Set = None,
) -> None:
    """Prune a model of transformers or open_clip without training, and evaluate it before and after."""
    with starting():
        from upop.checkpoints import open_checkpoint
        from upop.checkpoints.configs.vocabulary import read_vocabulary
        from upop.errors import SettingError
        from upop.report.results import results_table
        from upop.runs.memory import format_bytes
        from upop.tasks.estimate import estimate
        from upop.tasks.prune import prune as run_prune
        from upop.tasks.prune import task_for
        from upop.tasks.row_settings import RowSettings

    console = Console(highlight=False, soft_wrap=True)
    o.quiet_libraries()
    checkpoint = open_checkpoint(source)
    task = task_for(checkpoint)
    place = out if out is not None else Path(f"{checkpoint.path.name}-pruned")
    also: dict[str, Any] = {**o.columns(column), "pretrained": source, "output_dir": place, "round_to": round_to}
    beneath: dict[str, Any] = {"ratio": _RATIO} if ratio is None and target is None else {}
    settings = o.read(context, task.settings, None, assign, also=also, beneath={"num_workers": 0, **beneath})
    assert isinstance(settings, RowSettings)
    if settings.method != "upop":
        raise SettingError(f"upop prune has no method {settings.method}. Use upop compress {task.name} for it.")
    if dry_run:
        if settings.vocabulary is not None:
            read_vocabulary(settings.vocabulary)
        console.print(as_text(estimate(task, settings).described()))
        return
    results = run_prune(
        task,
        settings,
        overwrite=overwrite,
        command=shlex.join(["upop", *sys.argv[1:]]),
        notify=lambda line: console.print(as_text(line)),
    )
    console.print(results_table(results))
    dense, pruned = (result.parameters for result in results.models)
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    console.print(as_text(f"Weights: {format_bytes(size * dense // pruned)} -> {format_bytes(size)}."))
    console.print(as_text(f"Written to {place}. Load it in Python with upop.load({str(place)!r})."))
