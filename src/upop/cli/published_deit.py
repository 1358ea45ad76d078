"""The published command of DeiT, `compress_deit.py`, with the flags of DeiT's training, on top of `upop compress`.

What no flag says is in the config file, which holds DeiT's usual values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from upop.cli import options as o
from upop.cli.app import main
from upop.cli.dry import explain
from upop.cli.help import Command
from upop.errors import SettingError
from upop.runs.verbs import compress, evaluate_checkpoint
from upop.tasks import find_task
from upop.tasks.classification import ClassificationSettings

TASK = "classification"
CONFIG = Path("configs/classification.yaml")
_REPEATS = 3
_IGNORED = "Accepted and without effect."

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    cls=Command,
    epilog="Example: python compress_deit.py --eval --data-path datasets/vision/imagenet --resume model.pth",
)
def command(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="YAML file of settings; flags beat it.")] = CONFIG,
    data_path: o.DataPath = None,
    architecture: o.Architecture = None,
    finetune: Annotated[str | None, typer.Option("--finetune", help="Dense checkpoint: a file, or a URL.")] = None,
    evaluate: Annotated[bool, typer.Option("--eval", help="Only evaluate --resume.")] = False,
    dry_run: o.DryRun = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--resume",
            help="With --eval the checkpoint to evaluate: a file, or a URL. Else go on from the newest checkpoint of "
            "the run; auto starts it where there is none. [without a value: must]",
        ),
    ] = None,
    output_dir: o.OutputDir = Path("output/classification"),
    ratio: o.PublishedRatio = None,
    method: o.PublishedMethod = None,
    interval: o.Interval = None,
    w_sp_attn: o.SparsityAttention = None,
    w_sp_mlp: o.SparsityMlp = None,
    search_epochs: o.EpochsSearch = None,
    max_epoch: Annotated[int | None, typer.Option("--epochs", help="Epochs of retraining.")] = None,
    batch_size_train: Annotated[int | None, typer.Option("--batch-size", help="Per process.")] = None,
    search_lr: o.SearchRate = None,
    init_lr: Annotated[
        float | None, typer.Option("--lr", help="Highest learning rate, for 512 samples per step.")
    ] = None,
    min_lr: Annotated[float | None, typer.Option("--min-lr", help="Where the learning rate ends.")] = None,
    warmup_epochs: Annotated[
        int | None, typer.Option("--warmup-epochs", help="In which the learning rate climbs.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="Of matrices alone.")] = None,
    clip_grad: Annotated[float | None, typer.Option("--clip-grad", help="Largest norm of gradients.")] = None,
    image_size: Annotated[int | None, typer.Option("--input-size", help="Side of images, in pixels.")] = None,
    crop_ratio: Annotated[float | None, typer.Option("--eval-crop-ratio", help="Share that evaluation sees.")] = None,
    dropout: Annotated[float | None, typer.Option("--drop", help="Dropout.")] = None,
    drop_path: Annotated[float | None, typer.Option("--drop-path", help="Stochastic depth, at the last block.")] = None,
    model_ema: Annotated[
        bool | None, typer.Option("--model-ema/--no-model-ema", help="Keep a moving average of the weights.")
    ] = None,
    ema_decay: Annotated[float | None, typer.Option("--model-ema-decay", help="How slowly it forgets.")] = None,
    repeated_aug: Annotated[
        bool | None, typer.Option("--repeated-aug/--no-repeated-aug", help="Three copies of a sample in an epoch.")
    ] = None,
    auto_augment: Annotated[str | None, typer.Option("--aa", help="timm's name of a policy, or none.")] = None,
    color_jitter: Annotated[float | None, typer.Option("--color-jitter", help="Where there is no policy.")] = None,
    train_interpolation: Annotated[
        str | None, typer.Option("--train-interpolation", help="bicubic, bilinear or random.")
    ] = None,
    reprob: Annotated[float | None, typer.Option("--reprob", help="Probability of random erasing.")] = None,
    remode: Annotated[str | None, typer.Option("--remode", help="Filled with: const, rand or pixel.")] = None,
    recount: Annotated[int | None, typer.Option("--recount", help="Rectangles, at most.")] = None,
    smoothing: Annotated[float | None, typer.Option("--smoothing", help="Label smoothing.")] = None,
    mixup: Annotated[float | None, typer.Option("--mixup", help="Alpha; 0 is without.")] = None,
    cutmix: Annotated[float | None, typer.Option("--cutmix", help="Alpha; 0 is without.")] = None,
    cutmix_minmax: Annotated[
        tuple[float, float] | None, typer.Option("--cutmix-minmax", help="Smallest and largest side of what is cut.")
    ] = None,
    mixup_prob: Annotated[float | None, typer.Option("--mixup-prob", help="That a batch is mixed.")] = None,
    mixup_switch_prob: Annotated[float | None, typer.Option("--mixup-switch-prob", help="Of cutmix.")] = None,
    mixup_mode: Annotated[str | None, typer.Option("--mixup-mode", help="batch, pair or elem.")] = None,
    device: o.DeviceName = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random draws. [default: 0]")] = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    num_workers: Annotated[
        int | None, typer.Option("--num_workers", "--num-workers", help="Processes that decode images.")
    ] = None,
    amp: o.Amp = None,
    opt: Annotated[str, typer.Option("--opt", help="adamw, and no other.")] = "adamw",
    sched: Annotated[str, typer.Option("--sched", help="cosine, and no other.")] = "cosine",
    data_set: Annotated[str, typer.Option("--data-set", help="IMNET: any folder laid out like ImageNet.")] = "IMNET",
    dist_eval: Annotated[bool, typer.Option("--dist-eval", help=_IGNORED)] = False,
    pin_mem: Annotated[bool, typer.Option("--pin-mem/--no-pin-mem", help=_IGNORED)] = True,
    ema_on_cpu: Annotated[bool, typer.Option("--model-ema-force-cpu", help=_IGNORED)] = False,
    world_size: Annotated[int | None, typer.Option("--world_size", help=_IGNORED)] = None,
    dist_url: Annotated[str | None, typer.Option("--dist_url", help=_IGNORED)] = None,
    assign: o.Set = None,
) -> None:
    """Search, shrink, retrain and evaluate; or evaluate a checkpoint."""
    del dist_eval, pin_mem, ema_on_cpu, world_size, dist_url
    _refuse_others({"--opt": (opt, "adamw"), "--sched": (sched, "cosine"), "--data-set": (data_set, "IMNET")})
    goes_on = checkpoint in tuple(o.ResumeWhen)
    if evaluate and (checkpoint is None or goes_on):
        raise SettingError("--eval evaluates the checkpoint in --resume, and none was given there.")
    if checkpoint is not None and not evaluate and not goes_on:
        raise SettingError(
            f"--resume {checkpoint} was given without --eval, which evaluates a checkpoint. Runs begin with "
            "--finetune; --resume auto goes on with one."
        )
    also: dict[str, Any] = {"pretrained": checkpoint} if evaluate else {"pretrained": finetune, "resume": checkpoint}
    if batch_size_train is not None:
        also["batch_size_test"] = batch_size_train * 3 // 2  # as DeiT evaluates
    if repeated_aug is not None:
        also["repeats"] = _REPEATS if repeated_aug else 1
    off = {"auto_augment": auto_augment == "none", "ema_decay": model_ema is False}
    nothing = [name for name, is_off in off.items() if is_off]
    settings = o.read(
        context, ClassificationSettings, config, assign, also=also, nothing=nothing, published=not evaluate
    )
    if dry_run:
        explain(find_task(TASK), settings, "evaluate" if evaluate else "compress")
        return
    verb = evaluate_checkpoint if evaluate else compress
    verb(find_task(TASK), settings)


def _refuse_others(choices: dict[str, tuple[str, str]]) -> None:
    for flag, (found, known) in choices.items():
        if found != known:
            raise SettingError(f"{flag} {found} was asked for, and only {known} is known here. Leave it out.")


def run_deit() -> None:
    """Run the published command."""
    main(app)
