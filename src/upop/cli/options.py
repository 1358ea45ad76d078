"""Flags that several commands share; both spellings (--output-dir, --output_dir) work.

This module imports typer alone: the help of a command shows flags without importing torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from upop.settings import RunSettings

S = TypeVar("S", bound="RunSettings")


def as_ratio(text: str) -> float:
    """Parse a number; the settings check whether it is a ratio.

    Raises:
        typer.BadParameter: it is not a number; for "50%" and "2x" the message says what to write.
    """
    try:
        return float(text)
    except ValueError:
        from upop.pruning.choice import meant

        raise typer.BadParameter(f"{text!r} is not a number between 0 and 1{meant(text)}") from None


def starting_with(known: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return a shell completion over known words."""

    def completed(incomplete: str) -> list[str]:
        return [word for word in known() if word.startswith(incomplete)]

    return completed


class Device(StrEnum):
    """Device of a run."""

    auto = "auto"
    cuda = "cuda"
    mps = "mps"
    cpu = "cpu"


class ResumeWhen(StrEnum):
    """When a run resumes from a checkpoint."""

    auto = "auto"
    must = "must"


Config = Annotated[Path | None, typer.Option(help="YAML file of settings; flags override it.")]
Pretrained = Annotated[
    str | None,
    typer.Option(help="Checkpoint: a .pth or .safetensors (file or URL), a folder, or a name on the hub."),
]
DataPath = Annotated[
    Path | None, typer.Option("--data-path", "--data_path", help="Folder of train/CLASS/* and val/CLASS/*.")
]
Architecture = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Model to start from, like --pretrained; for classification, timm's name of a vision transformer.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Rows: .jsonl, .json, .parquet, .csv or .tar files, a folder of images, or a name on the hub.",
    ),
]
ValData = Annotated[
    str | None,
    typer.Option("--val-data", "--val_data", metavar="FILE", help="Rows to evaluate on. [default: a share of --data]"),
]
ImageRoot = Annotated[
    Path | None,
    typer.Option(
        "--image-root", "--image_root", help="Folder that image paths are relative to. [default: the file's folder]"
    ),
]
ColumnNames = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="ROLE=NAME", help="Column of a role, as in answer=reply; repeatable."),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="vision, text, projector, or a pattern of groups; repeatable. [default: all]"),
]
Exclude = Annotated[list[str] | None, typer.Option(help="A pattern of groups not to prune; repeatable.")]
Samples = Annotated[int | None, typer.Option(help="Calibration samples. [default: 128]")]
Lora = Annotated[
    int | None,
    typer.Option(metavar="RANK", help="Recover with LoRA of this rank, merged at the end; with --method one-shot."),
]
RowCount = Annotated[int | None, typer.Option("--rows", metavar="N", help="Use only the first N rows of --data.")]
OutputDir = Annotated[Path | None, typer.Option("--output-dir", "--output_dir", help="Run directory.")]
DeviceName = Annotated[Device | None, typer.Option(help="Device; torchrun sets the number of processes.")]
Fsdp = Annotated[
    bool | None,
    typer.Option("--fsdp", help="Shard weights, gradients and optimizer state over torchrun's processes."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of all random draws. [default: 42; classification 0]")]
Amp = Annotated[bool | None, typer.Option("--amp", help="bfloat16 autocast.")]
BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch-size", "--batch_size", help="Samples per process and forward pass, or auto: the largest that fits."
    ),
]
GradCheckpointing = Annotated[
    bool | None,
    typer.Option("--grad-checkpointing", help="Recompute activations in the backward pass, to save memory."),
]
Tracker = Annotated[
    list[str] | None, typer.Option("--tracker", help="tensorboard, or any other tracker of Accelerate; repeatable.")
]
_RATIO = "Share of the prunable cost to remove; 0.5 is 2x, 0.75 is 4x. [default: 0.5]"
Ratio = Annotated[float | None, typer.Option("--ratio", parser=as_ratio, metavar="<float>", help=_RATIO)]
OldRatio = Annotated[float | None, typer.Option("--p", parser=as_ratio, metavar="<float>", hidden=True)]
PublishedRatio = Annotated[
    float | None, typer.Option("--p", "--ratio", parser=as_ratio, metavar="<float>", help=_RATIO)
]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="KIND=LEFT",
        help="Instead of --ratio, a target for the whole model: params=0.5 (or 12M, 40MB@float16), macs=2x, or both, "
        "with a comma.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", "--dry_run", help="Only print what would be done.")]
Epochs = Annotated[
    int | None, typer.Option("--epochs", help="All epochs, including the search. [default: the config's]")
]
OldEpoch = Annotated[int | None, typer.Option("--epoch", hidden=True)]
PublishedEpoch = Annotated[
    int | None, typer.Option("--epoch", help="Epochs of the search, and of retraining: half of all epochs.")
]
_METHODS = starting_with(lambda: ("upop", "reference", "magnitude", "one-shot"))
Method = Annotated[
    str | None,
    typer.Option(
        help="upop, one-shot (no search), reference (as published), or magnitude: by weight norm. [default: upop]",
        autocompletion=_METHODS,
    ),
]
PublishedMethod = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="reference (the published search, with its constants), upop (better: the default of `upop compress`), or "
        "magnitude: one cut by weight norm. [default: reference]",
        autocompletion=_METHODS,
    ),
]
SparsityAttention = Annotated[
    float | None,
    typer.Option("--w-sp-attn", "--w_sp_attn", help="Weight of the sum of attention masks in the logged loss."),
]
SparsityMlp = Annotated[
    float | None,
    typer.Option("--w-sp-mlp", "--w_sp_mlp", help="Weight of the sum of MLP masks in the logged loss."),
]
Interval = Annotated[
    int | None, typer.Option("--interval", help="Steps between updates of the masks, with --method reference.")
]
EpochsSearch = Annotated[int | None, typer.Option("--epochs-search", help="Epochs of the published search.")]
SearchRate = Annotated[
    float | None, typer.Option("--lr-search", help="Learning rate of the search, with --method reference.")
]
OldAlign = Annotated[str | None, typer.Option("--align", hidden=True)]
RoundTo = Annotated[
    str | None,
    typer.Option(
        "--round-to",
        "--round_to",
        metavar="N",
        help="Round kept channels to multiples of this; or by kind: attention=8,mlp=128.",
    ),
]
Uniform = Annotated[
    str | None,
    typer.Option(
        metavar="tower",
        help="Keep equally many heads and neurons in all layers of a tower: libraries load the result without upop.",
        autocompletion=starting_with(lambda: ("tower",)),
    ),
]
Depth = Annotated[
    bool | None,
    typer.Option(
        "--depth", help="Also prune whole attentions and MLPs; with --uniform, whole layers.", show_default=False
    ),
]
Width = Annotated[
    bool | None,
    typer.Option("--width", help="Also prune channels of residual streams; requires a --target.", show_default=False),
]
Vocabulary = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="First remove all words that these texts (one per line) or token ids (a JSON list) do not use.",
    ),
]
Resume = Annotated[
    ResumeWhen | None,
    typer.Option(
        "--resume",
        help="Resume from the newest checkpoint in --output-dir; auto starts a new run if there is none. "
        "[without a value: must]",
    ),
]
AllowChanges = Annotated[
    bool | None,
    typer.Option(
        "--allow-changes",
        "--allow_changes",
        help="With --resume: continue even if weights, data or libraries have changed, and record the changes.",
    ),
]
SkipBadImages = Annotated[
    int | None,
    typer.Option(
        "--skip-bad-images",
        "--skip_bad_images",
        metavar="N",
        help="Skip up to N unreadable image files, and list them; one more stops the run. [default: 0]",
    ),
]
AllowOutside = Annotated[
    bool | None,
    typer.Option(
        "--allow-outside",
        "--allow_outside",
        help="Allow images outside of their folder: by absolute paths, .. or links.",
    ),
]
TaskOfFile = Annotated[
    str | None,
    typer.Option("--task", help="Task of a published checkpoint file. [default: derived from its tensors]"),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Also replace a file that upop did not write, or a folder of upop that has changed since; never a folder "
        "with other files.",
    ),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; repeatable.")]


_SETS: Mapping[str, tuple[str, ...]] = {
    "fsdp": ("sharding",),
    "whole_batch": ("batch_size_train",),
    "scheduler": ("schedule",),
    "finetune": ("pretrained",),
    "evaluate": ("pretrained",),
    "checkpoint": ("pretrained", "resume"),
    "model_ema": ("ema_decay",),
    "repeated_aug": ("repeats",),
    "column": ("columns",),
    "architecture": ("architecture", "pretrained"),
}
"""Parameter of a command -> settings that it sets under other names."""


def read(
    context: typer.Context,
    kind: type[S],
    config: Path | None,
    assignments: Sequence[str] | None = None,
    *,
    also: Mapping[str, Any] | None = None,
    nothing: Sequence[str] = (),
    beneath: Mapping[str, Any] | None = None,
    sources: Mapping[str, str] | None = None,
    published: bool = False,
) -> S:
    """Return the settings of a command: `--set` overrides flags, and flags override the file.

    Args:
        context: of the command; its parameters with the name of a setting are flags for it.
        kind: class of the settings.
        config: the YAML file.
        assignments: of `--set`.
        also: settings from other parameters; None means not given.
        nothing: settings that flags set to null.
        beneath: settings that override the file, but no flag.
        sources: origin of settings in `also` and `beneath`, for messages, if not flags.
        published: whether the default method is the published one.

    Raises:
        SettingError: a setting is not valid; the message says where it is from.
    """
    from upop.settings import OLDER, current_names, read_settings
    from upop.tasks import TASKS

    named = {*OLDER, *kind.model_fields, *(name for task in TASKS.values() for name in task.settings.model_fields)}
    flags = {name: value for name, value in context.params.items() if name in named and value not in ((), [])}
    flags = _model_flag(kind, flags)
    given = current_names(overrides(flags)) | overrides(also or {}) | dict.fromkeys(nothing)
    assigned = current_names(overrides({}, assignments))
    origins = {**(sources or {}), **{name: place for name in given if (place := _flag(context, name))}}
    origins |= {name: f"from --set {name}" for name in assigned}
    values = {**current_names(beneath or {}), **given, **assigned}
    return read_settings(kind, config, values, origins, published=published)


def _model_flag(kind: type[RunSettings], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags with --model replaced by `pretrained`, unless the settings have an architecture."""
    model = flags.get("architecture")
    if model is None or "architecture" in kind.model_fields:
        return dict(flags)
    if flags.get("pretrained") is not None:
        from upop.errors import SettingError

        raise SettingError(
            f"--model {model} and --pretrained {flags['pretrained']} both name the model to start from. Leave one out."
        )
    return {name: value for name, value in flags.items() if name != "architecture"} | {"pretrained": model}


def quiet_libraries() -> None:
    """Turn off the progress bars of transformers, which shows one per file."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def columns(assignments: Sequence[str] | None) -> dict[str, dict[str, str] | None]:
    """Return the setting of `--column ROLE=NAME`.

    Raises:
        SettingError: an assignment is not ROLE=NAME.
    """
    found = {}
    for each in assignments or ():
        role, equals, column = each.partition("=")
        if not (role and equals and column):
            from upop.errors import SettingError

            raise SettingError(f"--column takes ROLE=NAME, such as --column answer=reply; found {each!r}.")
        found[role.strip()] = column.strip()
    return {"columns": found or None}


def _flag(context: typer.Context, setting: str) -> str | None:
    """Return the flag that gave a setting, as typed; None if none did."""
    from upop.settings import OLDER

    for parameter in context.command.params:
        stands_for = {**OLDER, **_SETS}.get(str(parameter.name), (parameter.name,))
        typed = [
            flag
            for flag in (*parameter.opts, *parameter.secondary_opts)
            if any(word.partition("=")[0] == flag for word in sys.argv)
        ]
        if setting in stands_for and typed:
            return f"from {typed[0]}"
    return None


def overrides(flags: Mapping[str, Any], assignments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return settings from the flags that were given (are not None) and from `--set` assignments, read as YAML.

    Raises:
        SettingError: an assignment is not KEY=VALUE.
    """
    from upop.errors import SettingError
    from upop.yaml_files import parse_yaml

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
    """Return the setting of `--fsdp`."""
    return {"sharding": "fsdp" if fsdp else None}
