"""The flags that several commands share, each written once; both spellings (--output-dir, --output_dir) work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from upop.errors import SettingError
from upop.yaml_files import parse_yaml


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cuda = "cuda"
    mps = "mps"
    cpu = "cpu"


class ResumeWhen(StrEnum):
    """Whether a run goes on from a checkpoint."""

    auto = "auto"
    must = "must"


Config = Annotated[Path | None, typer.Option(help="YAML file of settings; flags beat it.")]
Pretrained = Annotated[
    str | None,
    typer.Option(help="Checkpoint: a .pth (file or URL), a folder of ours or of transformers, or a name on the hub."),
]
DataPath = Annotated[
    Path | None, typer.Option("--data-path", "--data_path", help="Folder of train/CLASS/* and val/CLASS/*.")
]
Architecture = Annotated[str | None, typer.Option("--model", help="timm's name of a vision transformer.")]
OutputDir = Annotated[Path | None, typer.Option("--output-dir", "--output_dir", help="Run folder.")]
DeviceName = Annotated[Device | None, typer.Option(help="Where to compute; torchrun decides about processes.")]
Fsdp = Annotated[
    bool | None,
    typer.Option("--fsdp", help="Share weights, gradients and the optimizer's state out over torchrun's processes."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of all random draws. [default: 42; classification 0]")]
Amp = Annotated[bool | None, typer.Option("--amp", help="bfloat16 autocast.")]
BatchSize = Annotated[
    str | None,
    typer.Option("--batch-size", "--batch_size", help="Records per process and pass, or auto: the largest that fits."),
]
GradCheckpointing = Annotated[
    bool | None,
    typer.Option("--grad-checkpointing", help="Compute activations again in the backward pass: less memory."),
]
Tracker = Annotated[
    list[str] | None, typer.Option("--tracker", help="tensorboard, or any tracker that Accelerate knows; repeatable.")
]
Ratio = Annotated[float | None, typer.Option("--p", help="Share of the prunable cost to remove; 0.5 is 2x.")]
Epoch = Annotated[
    int | None,
    typer.Option("--epoch", "--epochs", help="Epochs of the published search, and of retraining: half of all epochs."),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="upop, reference (the search as published), or magnitude: one cut by weight norm. [default: upop]"
    ),
]
SparsityAttention = Annotated[
    float | None,
    typer.Option("--w-sp-attn", "--w_sp_attn", help="Weight of the attention masks' sum in the logged loss."),
]
SparsityMlp = Annotated[
    float | None,
    typer.Option("--w-sp-mlp", "--w_sp_mlp", help="Weight of the MLP masks' sum in the logged loss."),
]
Interval = Annotated[
    int | None, typer.Option("--interval", help="Steps between moves of the masks, with --method reference.")
]
EpochsSearch = Annotated[int | None, typer.Option("--epochs-search", help="Epochs of the published search.")]
SearchRate = Annotated[
    float | None, typer.Option("--lr-search", help="Learning rate of the search, with --method reference.")
]
Resume = Annotated[
    ResumeWhen | None,
    typer.Option(
        "--resume",
        help="Go on from the newest checkpoint in --output-dir; auto starts the run where there is none. "
        "[without a value: must]",
    ),
]
SkipBadImages = Annotated[
    int | None,
    typer.Option(
        "--skip-bad-images",
        "--skip_bad_images",
        metavar="N",
        help="Do without up to N unreadable image files, and list them; one more stops the run. [default: 0]",
    ),
]
AllowOutside = Annotated[
    bool | None,
    typer.Option(
        "--allow-outside",
        "--allow_outside",
        help="Pictures may lie outside of their folder: by absolute paths, .. or links.",
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeatable.")]


def with_resume_value(arguments: Sequence[str]) -> list[str]:
    """Return command-line arguments with the value that a `--resume` without one stands for."""
    completed = []
    for place, argument in enumerate(arguments):
        completed.append(argument)
        if argument == "--resume" and (place + 1 == len(arguments) or arguments[place + 1].startswith("-")):
            completed.append(ResumeWhen.must.value)
    return completed


def overrides(flags: Mapping[str, Any], assignments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return settings from the flags that were given (are not None) and from `--set` assignments, read as YAML.

    Raises:
        SettingError: an assignment is not KEY=VALUE.
    """
    values = {name: value for name, value in flags.items() if value is not None}
    for assignment in assignments or ():
        key, equals, text = assignment.partition("=")
        if not key or not equals:
            raise SettingError(f"--set takes KEY=VALUE, such as --set num_workers=2; found {assignment!r}.")
        try:
            values[key.strip()] = parse_yaml(text)
        except ValueError as error:
            raise SettingError(f"--set {assignment!r}: the value cannot be read: {error}") from error
    return values


def sharding(fsdp: bool | None) -> dict[str, str | None]:
    """Return the setting that `--fsdp` stands for."""
    return {"sharding": "fsdp" if fsdp else None}


def epochs(epoch: int | None) -> dict[str, int | None]:
    """Return the settings that the published `--epoch` stands for: as many epochs of search as of retraining."""
    return {"max_epoch": epoch, "epochs_search": epoch}
