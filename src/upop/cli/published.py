"""The published commands, `compress_<task>.py`, with the published flags, on top of `upop compress`."""

from __future__ import annotations

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

_IGNORED = "Accepted, but has no effect: torchrun's environment decides."


def blip_command(task: str, config: str) -> typer.Typer:
    """Return the published command of a BLIP task.

    Args:
        task: name of the task.
        config: the default of `--config`, the published file.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

    script = f"compress_{task.replace('-', '_')}.py"

    @app.command(cls=Command, epilog=f"Example: python {script} --p 0.5 --epoch 15 --pretrained pretrained/model.pth")
    def command(
        context: typer.Context,
        config: Annotated[Path, typer.Option(help="YAML file of settings; flags override it.")] = Path(config),
        output_dir: o.OutputDir = Path(f"output/{task}"),
        only_evaluate: Annotated[bool, typer.Option("--evaluate", help="Only evaluate --pretrained.")] = False,
        dry_run: o.DryRun = False,
        device: o.DeviceName = None,
        fsdp: o.Fsdp = None,
        seed: o.Seed = None,
        pretrained: o.Pretrained = None,
        w_sp_attn: o.SparsityAttention = None,
        w_sp_mlp: o.SparsityMlp = None,
        epoch: o.PublishedEpoch = None,
        ratio: o.PublishedRatio = None,
        method: o.PublishedMethod = None,
        amp: o.Amp = None,
        init_lr: Annotated[float | None, typer.Option("--lr", help="Highest learning rate.")] = None,
        world_size: Annotated[int | None, typer.Option("--world_size", help=_IGNORED)] = None,
        dist_url: Annotated[str | None, typer.Option("--dist_url", help=_IGNORED)] = None,
        distributed: Annotated[str | None, typer.Option("--distributed", help=_IGNORED)] = None,
        use_ceph: Annotated[bool, typer.Option("--use_ceph", help="Not supported.")] = False,
        resume: o.Resume = None,
        skip_bad_images: o.SkipBadImages = None,
        allow_outside: o.AllowOutside = None,
        assign: o.Set = None,
    ) -> None:
        """Search, cut, retrain and evaluate; or evaluate a checkpoint."""
        del world_size, dist_url, distributed
        if use_ceph:
            raise SettingError(
                "--use_ceph reads from a private storage system, which upop does not support. Leave it out."
            )
        found = find_task(task)
        settings = o.read(context, found.settings, config, assign, also=o.sharding(fsdp), published=not only_evaluate)
        if dry_run:
            explain(found, settings, "evaluate" if only_evaluate else "compress")
            return
        verb = evaluate_checkpoint if only_evaluate else compress
        verb(found, settings)

    return app


def run_blip(task: str, config: str) -> None:
    """Run the published command of a BLIP task; arguments are those of `blip_command`."""
    main(blip_command(task, config))
