"""CrossGET's published command, `train_retrieval_clip.py`, with its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from upop.cli import options as o
from upop.cli.app import main
from upop.cli.dry import explain
from upop.cli.help import Command
from upop.runs.verbs import evaluate_checkpoint, train
from upop.tasks.retrieval_crossget import CrossGetSettings, CrossGetTask

CONFIG = Path("configs/retrieval_flickr_crossget.yaml")
_IGNORED = "Accepted, but has no effect: torchrun's environment decides."

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    cls=Command,
    epilog="Example: python train_retrieval_clip.py --evaluate --pretrained clip_ours.pth --reduce ours --rv 16 --rl 0",
)
def command(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="YAML file of settings; flags override it.")] = CONFIG,
    output_dir: o.OutputDir = Path("output/Retrieval_flickr"),
    only_evaluate: Annotated[bool, typer.Option("--evaluate", help="Only evaluate --pretrained.")] = False,
    dry_run: o.DryRun = False,
    device: o.DeviceName = None,
    seed: o.Seed = None,
    pretrained: o.Pretrained = None,
    init_lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate.")] = None,
    max_epoch: Annotated[int | None, typer.Option("--epoch", help="Epochs of training.")] = None,
    reduce: Annotated[
        Literal["ours", "none"] | None,
        typer.Option("--reduce", help="ours merges tokens; none is plain CLIP. [default: ours]"),
    ] = None,
    rv: Annotated[int | None, typer.Option("--rv", help="Image tokens removed per layer. [default: 16]")] = None,
    rl: Annotated[int | None, typer.Option("--rl", help="Text tokens removed per layer. [default: 0]")] = None,
    amp: o.Amp = None,
    resume: o.Resume = None,
    world_size: Annotated[int | None, typer.Option("--world_size", help=_IGNORED)] = None,
    dist_url: Annotated[str | None, typer.Option("--dist_url", help=_IGNORED)] = None,
    distributed: Annotated[str | None, typer.Option("--distributed", help=_IGNORED)] = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    assign: o.Set = None,
) -> None:
    """Train CLIP with token merging, and evaluate it; or evaluate a checkpoint."""
    del world_size, dist_url, distributed
    settings = o.read(context, CrossGetSettings, config, assign)
    if dry_run:
        explain(CrossGetTask(), settings, "evaluate" if only_evaluate else "train")
        return
    verb = evaluate_checkpoint if only_evaluate else train
    verb(CrossGetTask(), settings)


def run_crossget() -> None:
    """Run the published command."""
    main(app)
