"""The published command of DeiT, `compress_deit.py`, with the flags of DeiT's training, on top of `upop compress`.

All other settings are in the config file, which has DeiT's values.
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
_IGNORED = "Accepted, but has no effect."

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    cls=Command,
    epilog="Example: python compress_deit.py --eval --data-path datasets/vision/imagenet --resume model.pth",
)
def command(
    context: typer.Context,
    config: Annotated[Path, typer.Option(help="YAML file of settings; flags override it.")] = CONFIG,
    data_path: o.DataPath = None,
    architecture: o.Architecture = None,
    finetune: Annotated[str | None, typer.Option("--finetune", help="Dense checkpoint: a file, or a URL.")] = None,
    evaluate: Annotated[bool, typer.Option("--eval", help="Only evaluate --resume.")] = False,
    dry_run: o.DryRun = False,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--resume",
            help="With --eval, the checkpoint to evaluate: a file or URL. Otherwise resume from the newest checkpoint "
            "of the run; auto starts a new run if there is none. [without a value: must]",
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
    batch_size_train: Annotated[int | None, typer.Option("--batch-size", help="Samples per process.")] = None,
    search_lr: o.SearchRate = None,
    init_lr: Annotated[
        float | None, typer.Option("--lr", help="Highest learning rate, for 512 samples per step.")
    ] = None,
    min_lr: Annotated[float | None, typer.Option("--min-lr", help="Final learning rate.")] = None,
    warmup_epochs: Annotated[int | None, typer.Option("--warmup-epochs", help="Epochs of linear warm-up.")] = None,
    weight_decay: Annotated[float | None, typer.Option("--weight-decay", help="Weight decay of matrices.")] = None,
    clip_grad: Annotated[float | None, typer.Option("--clip-grad", help="Maximum norm of the gradients.")] = None,
    image_size: Annotated[int | None, typer.Option("--input-size", help="Side of images, in pixels.")] = None,
    crop_ratio: Annotated[
        float | None, typer.Option("--eval-crop-ratio", help="Share of the short side in evaluation's centre crop.")
    ] = None,
    dropout: Annotated[float | None, typer.Option("--drop", help="Dropout.")] = None,
    drop_path: Annotated[
        float | None, typer.Option("--drop-path", help="Stochastic depth rate of the last block.")
    ] = None,
    model_ema: Annotated[
        bool | None, typer.Option("--model-ema/--no-model-ema", help="Keep a moving average of the weights.")
    ] = None,
    ema_decay: Annotated[float | None, typer.Option("--model-ema-decay", help="Decay of the moving average.")] = None,
    repeated_aug: Annotated[
        bool | None, typer.Option("--repeated-aug/--no-repeated-aug", help="Three copies of a sample per epoch.")
    ] = None,
    auto_augment: Annotated[
        str | None, typer.Option("--aa", help="Augmentation policy, by timm's name, or none.")
    ] = None,
    color_jitter: Annotated[
        float | None, typer.Option("--color-jitter", help="Strength of colour jitter without a policy.")
    ] = None,
    train_interpolation: Annotated[
        str | None, typer.Option("--train-interpolation", help="bicubic, bilinear or random.")
    ] = None,
    reprob: Annotated[float | None, typer.Option("--reprob", help="Probability of random erasing.")] = None,
    remode: Annotated[
        str | None, typer.Option("--remode", help="Content of erased rectangles: const, rand or pixel.")
    ] = None,
    recount: Annotated[int | None, typer.Option("--recount", help="Maximum number of erased rectangles.")] = None,
    smoothing: Annotated[float | None, typer.Option("--smoothing", help="Label smoothing.")] = None,
    mixup: Annotated[float | None, typer.Option("--mixup", help="Mixup alpha; 0 turns it off.")] = None,
    cutmix: Annotated[float | None, typer.Option("--cutmix", help="Cutmix alpha; 0 turns it off.")] = None,
    cutmix_minmax: Annotated[
        tuple[float, float] | None,
        typer.Option("--cutmix-minmax", help="Smallest and largest side of cutmix's rectangle."),
    ] = None,
    mixup_prob: Annotated[float | None, typer.Option("--mixup-prob", help="Probability of mixing a batch.")] = None,
    mixup_switch_prob: Annotated[
        float | None, typer.Option("--mixup-switch-prob", help="Probability of cutmix, if both are on.")
    ] = None,
    mixup_mode: Annotated[
        str | None, typer.Option("--mixup-mode", help="Draw weights per batch, pair or elem.")
    ] = None,
    device: o.DeviceName = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random draws. [default: 0]")] = None,
    skip_bad_images: o.SkipBadImages = None,
    allow_outside: o.AllowOutside = None,
    num_workers: Annotated[
        int | None, typer.Option("--num_workers", "--num-workers", help="Worker processes of the loader.")
    ] = None,
    amp: o.Amp = None,
    opt: Annotated[str, typer.Option("--opt", help="Only adamw.")] = "adamw",
    sched: Annotated[str, typer.Option("--sched", help="Only cosine.")] = "cosine",
    data_set: Annotated[str, typer.Option("--data-set", help="Only IMNET: any folder like ImageNet's.")] = "IMNET",
    dist_eval: Annotated[bool, typer.Option("--dist-eval", help=_IGNORED)] = False,
    pin_mem: Annotated[bool, typer.Option("--pin-mem/--no-pin-mem", help=_IGNORED)] = True,
    ema_on_cpu: Annotated[bool, typer.Option("--model-ema-force-cpu", help=_IGNORED)] = False,
    world_size: Annotated[int | None, typer.Option("--world_size", help=_IGNORED)] = None,
    dist_url: Annotated[str | None, typer.Option("--dist_url", help=_IGNORED)] = None,
    assign: o.Set = None,
) -> None:
    """Search, cut, retrain and evaluate; or evaluate a checkpoint."""
    del dist_eval, pin_mem, ema_on_cpu, world_size, dist_url
    _check_choices({"--opt": (opt, "adamw"), "--sched": (sched, "cosine"), "--data-set": (data_set, "IMNET")})
    resumes = checkpoint in tuple(o.ResumeWhen)
    if evaluate and (checkpoint is None or resumes):
        raise SettingError("--eval evaluates the checkpoint in --resume, and none was given. Give --resume FILE.")
    if checkpoint is not None and not evaluate and not resumes:
        raise SettingError(
            f"--resume {checkpoint} names a checkpoint to evaluate, and --eval was not given. Add --eval; or start a "
            "run with --finetune, and resume it with --resume auto."
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


def _check_choices(choices: dict[str, tuple[str, str]]) -> None:
    for flag, (found, known) in choices.items():
        if found != known:
            raise SettingError(f"{flag} {found} was given, and only {known} is supported. Leave it out.")


def run_deit() -> None:
    """Run the published command."""
    main(app)
