"""The published command of Segmenter, `compress_segmenter.py`, with the published flags, on top of `upop compress`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from upop.cli import options as o
from upop.cli.app import main
from upop.cli.dry import explain
from upop.cli.help import Command
from upop.errors import SettingError
from upop.runs.verbs import compress, evaluate_checkpoint
from upop.tasks import find_task
from upop.tasks.segmentation import SegmentationSettings

TASK = "segmentation"
CONFIG = Path("configs/segmentation.yaml")
_DATASETS = ("ade20k",)

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    cls=Command,
    epilog="Example: DATASET=datasets/vision python compress_segmenter.py --evaluate model.pth --singlescale",
)
def command(
    context: typer.Context,
    data_set: Annotated[
        str, typer.Option("--dataset", help="Only ade20k, in the folder of the environment variable DATASET.")
    ] = _DATASETS[0],
    backbone: Annotated[str | None, typer.Option("--backbone", help="Encoder, such as vit_small_patch16_384.")] = None,
    decoder: Annotated[str | None, typer.Option("--decoder", help="mask_transformer or linear.")] = None,
    config: Annotated[Path, typer.Option(help="YAML file of settings; flags override it.")] = CONFIG,
    output_dir: Annotated[Path, typer.Option("--log-dir", help="Run directory.")] = Path("output/segmentation"),
    pretrained: o.Pretrained = None,
    evaluate: Annotated[str | None, typer.Option("--evaluate", help="Only evaluate this checkpoint.")] = None,
    dry_run: o.DryRun = False,
    multiscale: Annotated[
        bool | None, typer.Option("--multiscale/--singlescale", help="Evaluate at six scales with flips, or at one.")
    ] = None,
    resume: o.Resume = None,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start a new run, as published.")] = False,
    search_epochs: o.EpochsSearch = None,
    max_epoch: Annotated[int | None, typer.Option("--epochs", help="Epochs of retraining.")] = None,
    whole_batch: Annotated[int | None, typer.Option("--batch-size", help="Samples of all processes.")] = None,
    search_lr: o.SearchRate = None,
    init_lr: Annotated[float | None, typer.Option("-lr", "--learning-rate", help="Highest learning rate.")] = None,
    ratio: o.PublishedRatio = None,
    method: o.PublishedMethod = None,
    interval: o.Interval = None,
    w_sp_attn: o.SparsityAttention = None,
    w_sp_mlp: o.SparsityMlp = None,
    image_size: Annotated[int | None, typer.Option("--im-size", help="Short side of resized images.")] = None,
    crop_size: Annotated[int | None, typer.Option("--crop-size", help="Side of training crops.")] = None,
    window_size: Annotated[int | None, typer.Option("--window-size", help="Side of the sliding window.")] = None,
    window_stride: Annotated[int | None, typer.Option("--window-stride", help="Stride of the window.")] = None,
    normalization: Annotated[str | None, typer.Option("--normalization", help="vit or deit.")] = None,
    eval_freq: Annotated[
        int | None, typer.Option("--eval-freq", help="Accepted, but has no effect: every epoch is evaluated.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option("--optimizer", help="sgd or adamw.")] = None,
    scheduler: Annotated[str | None, typer.Option("--scheduler", help="polynomial, or cosine.")] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="Weight decay.")] = None,
    dropout: Annotated[float | None, typer.Option("--dropout", help="Dropout of the encoder.")] = None,
    drop_path: Annotated[
        float | None, typer.Option("--drop-path", help="Stochastic depth rate of the encoder's last block.")
    ] = None,
    amp: Annotated[bool | None, typer.Option("--amp/--no-amp", help="bfloat16 autocast.")] = None,
    device: o.DeviceName = None,
    seed: o.Seed = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    assign: o.Set = None,
) -> None:
    """Search, cut, retrain and evaluate; or evaluate a checkpoint."""
    del eval_freq
    if data_set not in _DATASETS:
        raise SettingError(f"--dataset {data_set} is not known; known are {', '.join(_DATASETS)}.")
    if resume and no_resume:
        raise SettingError("--resume and --no-resume were both given. Leave one out.")
    also = {
        "dataset_root": _dataset_root(),
        "pretrained": evaluate,
        "batch_size_train": _per_process(whole_batch),
        "schedule": {"cosine": "step"}.get(scheduler or "", scheduler),
    }
    settings = o.read(
        context,
        SegmentationSettings,
        config,
        assign,
        also=also,
        sources={"dataset_root": "from the environment variable DATASET"},
        published=not evaluate,
    )
    if dry_run:
        explain(find_task(TASK), settings, "evaluate" if evaluate else "compress")
        return
    verb = evaluate_checkpoint if evaluate else compress
    verb(find_task(TASK), settings)


def _dataset_root() -> Path:
    folder = os.environ.get("DATASET")
    if not folder:
        raise SettingError(
            "The environment variable DATASET is not set. Set it to the folder of data sets, which holds ade20k/: "
            "DATASET=datasets/vision python compress_segmenter.py ..."
        )
    return Path(folder)


def _per_process(batch_size: int | None) -> int | None:
    """Return the batch size per process; torchrun's environment has their number."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size is not None and batch_size % processes:
        raise SettingError(
            f"--batch-size {batch_size} is not a multiple of the number of processes, {processes}. Choose one that is."
        )
    return None if batch_size is None else batch_size // processes


def run_segmenter() -> None:
    """Run the published command."""
    main(app)
