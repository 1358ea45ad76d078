"""`upop train`, `upop compress` and `upop evaluate`, for every task.

Deep learning libraries are imported when a command runs, so that its help is instant.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from upop.cli import options as o
from upop.cli.shapes import score_captions_of_shapes
from upop.plain import as_text
from upop.tasks import TASKS, find_task

TaskName = Annotated[
    str,
    typer.Argument(metavar="TASK", help=f"Task: {', '.join(TASKS)}.", autocompletion=o.starting_with(lambda: TASKS)),
]


def train(
    context: typer.Context,
    task: TaskName,
    config: o.Config = None,
    pretrained: o.Pretrained = None,
    architecture: o.Architecture = None,
    data_path: o.DataPath = None,
    data: o.Data = None,
    val_data: o.ValData = None,
    image_root: o.ImageRoot = None,
    column: o.ColumnNames = None,
    rows: o.RowCount = None,
    output_dir: o.OutputDir = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Epochs of training.")] = None,
    epoch: o.OldEpoch = None,
    device: o.DeviceName = None,
    fsdp: o.Fsdp = None,
    seed: o.Seed = None,
    amp: o.Amp = None,
    batch_size_train: o.BatchSize = None,
    grad_checkpointing: o.GradCheckpointing = None,
    trackers: o.Tracker = None,
    resume: o.Resume = None,
    allow_changes: o.AllowChanges = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    dry_run: o.DryRun = False,
    assign: o.Set = None,
) -> None:
    """Train or fine-tune a dense model."""
    found = find_task(task)
    _prepare()
    settings = o.read(context, found.settings, config, assign, also={**o.sharding(fsdp), **o.columns(column)})
    if dry_run:
        from upop.cli.dry import explain

        explain(found, settings, "train")
        return
    _check_memory(found, settings)
    from upop.runs import verbs

    verbs.train(found, settings)


def compress(
    context: typer.Context,
    task: TaskName,
    config: o.Config = None,
    ratio: o.Ratio = None,
    p: o.OldRatio = None,
    target: o.Target = None,
    epochs: o.Epochs = None,
    epoch: o.OldEpoch = None,
    pretrained: o.Pretrained = None,
    architecture: o.Architecture = None,
    data_path: o.DataPath = None,
    data: o.Data = None,
    val_data: o.ValData = None,
    image_root: o.ImageRoot = None,
    column: o.ColumnNames = None,
    rows: o.RowCount = None,
    include: o.Include = None,
    exclude: o.Exclude = None,
    samples: o.Samples = None,
    lora: o.Lora = None,
    output_dir: o.OutputDir = None,
    device: o.DeviceName = None,
    fsdp: o.Fsdp = None,
    seed: o.Seed = None,
    amp: o.Amp = None,
    batch_size_train: o.BatchSize = None,
    grad_checkpointing: o.GradCheckpointing = None,
    trackers: o.Tracker = None,
    cost: Annotated[str | None, typer.Option(help="Cost of the budget: params, macs or reference.")] = None,
    round_to: o.RoundTo = None,
    align: o.OldAlign = None,
    uniform: o.Uniform = None,
    depth: o.Depth = None,
    width: o.Width = None,
    vocabulary: o.Vocabulary = None,
    interval: o.Interval = None,
    method: o.Method = None,
    w_sp_attn: o.SparsityAttention = None,
    w_sp_mlp: o.SparsityMlp = None,
    resume: o.Resume = None,
    allow_changes: o.AllowChanges = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    dry_run: o.DryRun = False,
    assign: o.Set = None,
) -> None:
    """Compress a dense model: search, cut, retrain and evaluate."""
    found = find_task(task)
    _prepare()
    settings = o.read(context, found.settings, config, assign, also={**o.sharding(fsdp), **o.columns(column)})
    if interval is not None and settings.method != "reference":
        from upop.errors import SettingError

        raise SettingError(
            f"--interval {interval} sets how often the published search updates its masks, and the method is "
            f"{settings.method}. Leave it out, or add --method reference."
        )
    if dry_run:
        from upop.cli.dry import explain

        explain(found, settings, "compress")
        return
    if epoch is not None:
        _note(
            f"--epoch {epoch}, as in the published commands, means {epoch} epochs of search and {epoch} of retraining, "
            f"the same as --epochs {2 * epoch}."
        )
    _check_memory(found, settings)
    from upop.runs import verbs

    verbs.compress(found, settings)


def evaluate(
    context: typer.Context,
    task: TaskName,
    config: o.Config = None,
    pretrained: o.Pretrained = None,
    architecture: o.Architecture = None,
    data_path: o.DataPath = None,
    data: o.Data = None,
    val_data: o.ValData = None,
    image_root: o.ImageRoot = None,
    column: o.ColumnNames = None,
    rows: o.RowCount = None,
    output_dir: o.OutputDir = None,
    device: o.DeviceName = None,
    amp: o.Amp = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    assign: o.Set = None,
) -> None:
    """Evaluate a checkpoint, dense or compressed."""
    found = find_task(task)
    _prepare()
    settings = o.read(context, found.settings, config, assign, also=o.columns(column))
    from upop.runs import verbs
    from upop.tasks.row_settings import RowSettings

    verbs.evaluate_checkpoint(found, settings.as_evaluated() if isinstance(settings, RowSettings) else settings)


def _check_memory(task: Any, settings: Any) -> None:
    from upop.tasks.row_settings import RowSettings

    if isinstance(settings, RowSettings):
        from upop.tasks.estimate import check_memory

        check_memory(task, settings, trained=True, notify=_note)


def _prepare() -> None:
    """Turn off progress bars of libraries, and register the metric of the generated captions."""
    o.quiet_libraries()
    score_captions_of_shapes()


def _note(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(as_text(f"Note: {message}"))
